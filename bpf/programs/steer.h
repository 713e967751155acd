/* A socket names a peer: give it a backend. A socket is told its peer: name what it asked for. */
#ifndef WEFT_STEER_H
#define WEFT_STEER_H

#include "choose.h"
#include "origin.h"

enum calls { CONNECT, SENDMSG };

/* As choose(); with 1 the origin is kept. A connection to what is no frontend ends what was kept
 * for it, a datagram does not: sendmsg4 also sees those that a connected IPv6 socket with an IPv4
 * peer sends, with the backend as their destination. */
static __always_inline int steer(struct bpf_sock_addr *ctx, enum calls call,
				 const struct target *asked, struct target *backend)
{
	u64 cookie = bpf_get_socket_cookie(ctx);
	int result = choose(ctx, cookie, asked, backend);

	if (!result && call == CONNECT)
		forget(cookie, asked);
	if (result <= 0)
		return result;
	result = remember(cookie, backend, asked);
	if (result < 0)
		return result;
	count(REASON_BALANCED);
	return 1;
}

static __always_inline int steer4(struct bpf_sock_addr *ctx, enum calls call)
{
	struct target asked, backend;
	int result;

	read4(ctx, &asked);
	result = steer(ctx, call, &asked, &backend);
	if (result > 0)
		write4(ctx, &backend);
	return result;
}

static __always_inline int steer6(struct bpf_sock_addr *ctx, enum calls call)
{
	struct target asked, backend;
	int result;

	read6(ctx, &asked);
	result = steer(ctx, call, &asked, &backend);
	if (result > 0)
		write6(ctx, &backend);
	return result;
}

static __always_inline void answer4(struct bpf_sock_addr *ctx)
{
	struct target peer, *origin;

	read4(ctx, &peer);
	origin = recall(bpf_get_socket_cookie(ctx), &peer);
	if (origin)
		write4(ctx, origin);
}

static __always_inline void answer6(struct bpf_sock_addr *ctx)
{
	struct target peer, *origin;

	read6(ctx, &peer);
	origin = recall(bpf_get_socket_cookie(ctx), &peer);
	if (origin)
		write6(ctx, origin);
}

#endif
