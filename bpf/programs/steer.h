/* A socket names a peer: give it a backend, or this node's proxy. A socket is told its peer: name
 * what it asked for. */
#ifndef WEFT_STEER_H
#define WEFT_STEER_H

#include "choose.h"
#include "membership.h"
#include "origin.h"
#include "report.h"

enum calls { CONNECT, SENDMSG };

/* Where the proxy listens for connections of a pod to `asked`, of HTTP or to be relayed; null:
 * nowhere. */
static __always_inline const struct target *listening(u64 netns, const struct target *asked, int http)
{
	u32 zero = 0;
	struct config *at = config.lookup(&zero);
	const struct target *target;

	if (!at || is_apart(netns, asked))
		return 0;
	if (is_ipv4(asked))
		target = http ? &at->http4 : &at->relay4;
	else
		target = http ? &at->http6 : &at->relay6;
	return target->port ? target : 0;
}

/* The peer for a socket that asked for a frontend: 0 and the reason it is that one, or negative
 * errno. Before a proxy has ever listened, everything goes straight to backends. */
static __always_inline int peer_of(struct bpf_sock_addr *ctx, u64 cookie, u64 netns,
				   const struct frontend *frontend, struct origin *origin,
				   struct target *peer, u32 *reason)
{
	int tcp = origin->asked.protocol == IPPROTO_TCP;
	const struct target *proxy = 0;
	struct backend backend = {};
	int result;

	if (tcp && frontend->flags & FRONTEND_HTTP)
		proxy = listening(netns, &origin->asked, 1);
	if (proxy && !frontend->affinity_s) {
		*reason = REASON_TO_PROXY;
	} else {
		result = choose(ctx, cookie, frontend, &origin->asked, &backend, reason);
		/* The proxy may know of a route to other backends. */
		if (result < 0 && !proxy)
			return result;
		*reason = proxy ? REASON_TO_PROXY : REASON_BALANCED;
		if (!proxy && tcp && backend.flags & BACKEND_REMOTE) {
			proxy = listening(netns, &origin->asked, 0);
			if (proxy)
				*reason = REASON_TO_RELAY;
		}
	}
	origin->backend = backend.target;
	origin->flags = frontend->flags;
	*peer = proxy ? *proxy : backend.target;
	return 0;
}

/* The same of a pod of another node that was asked for at a port of no frontend. 0: it goes
 * straight. */
static __always_inline int far_peer(u64 netns, struct origin *origin, struct target *peer,
				    u32 *reason)
{
	const struct target *relay = is_far(&origin->asked) ? listening(netns, &origin->asked, 0) : 0;

	if (!relay)
		return 0;
	origin->backend = origin->asked;
	*peer = *relay;
	*reason = REASON_TO_RELAY;
	return 1;
}

/* 1: `peer` is filled in and the origin kept; 0: `asked` is no frontend; negative errno: refused.
 * A connection to what is no frontend ends what was kept for it, a datagram does not: sendmsg4 also
 * sees those that a connected IPv6 socket with an IPv4 peer sends, with the backend as their
 * destination. */
static __always_inline int steer(struct bpf_sock_addr *ctx, enum calls call,
				 const struct target *asked, struct target *peer)
{
	u64 cookie = bpf_get_socket_cookie(ctx), netns = bpf_get_netns_cookie(ctx);
	struct origin origin = {.asked = *asked};
	struct target key = *asked;
	struct frontend *frontend = frontends.lookup(&key);
	u32 reason = REASON_PASSED;
	int result = 0;

	if (!frontend && !(call == CONNECT && far_peer(netns, &origin, peer, &reason))) {
		count(REASON_PASSED);
		if (call == CONNECT) {
			forget(cookie, asked);
			/* Resolvers connect datagram sockets to ask for a route, and send nothing. */
			if (asked->protocol == IPPROTO_TCP)
				report(netns, asked, asked, reason, 0);
		}
		return 0;
	}
	if (frontend)
		result = peer_of(ctx, cookie, netns, frontend, &origin, peer, &reason);
	if (!result)
		result = remember(cookie, peer, &origin, &reason);
	if (result < 0) {
		report(netns, asked, &origin.backend, reason, 0);
		return result;
	}
	count(reason);
	/* The proxy tells of the connections that it gets. */
	if (call == CONNECT && reason == REASON_BALANCED)
		report(netns, asked, peer, reason, 0);
	return 1;
}

static __always_inline int steer4(struct bpf_sock_addr *ctx, enum calls call)
{
	struct target asked, peer;
	int result;

	read4(ctx, &asked);
	result = steer(ctx, call, &asked, &peer);
	if (result > 0)
		write4(ctx, &peer);
	return result;
}

static __always_inline int steer6(struct bpf_sock_addr *ctx, enum calls call)
{
	struct target asked, peer;
	int result;

	read6(ctx, &asked);
	result = steer(ctx, call, &asked, &peer);
	if (result > 0)
		write6(ctx, &peer);
	return result;
}

static __always_inline void answer4(struct bpf_sock_addr *ctx)
{
	struct target peer;
	struct origin *origin;

	read4(ctx, &peer);
	origin = recall(bpf_get_socket_cookie(ctx), &peer);
	if (origin) {
		count(REASON_ANSWERED);
		write4(ctx, &origin->asked);
	}
}

static __always_inline void answer6(struct bpf_sock_addr *ctx)
{
	struct target peer;
	struct origin *origin;

	read6(ctx, &peer);
	origin = recall(bpf_get_socket_cookie(ctx), &peer);
	if (origin) {
		count(REASON_ANSWERED);
		write6(ctx, &origin->asked);
	}
}

#endif
