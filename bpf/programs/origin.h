/* What a socket asked for, before it was given a peer. */
#ifndef WEFT_ORIGIN_H
#define WEFT_ORIGIN_H

#include "address.h"
#include "count.h"

static __always_inline int remember(struct bpf_sock_addr *ctx, int connects, u64 cookie,
				    const struct target *peer, const struct origin *origin,
				    u32 *reason)
{
	struct origin_key key = {.cookie = cookie, .peer = *peer};
	struct connected *own;

	if (connects && ctx->sk) {
		own = connected.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (!own)
			return REFUSE(NO_ORIGIN);
		own->peer = *peer;
		own->origin = *origin;
	}
	return origins.update(&key, (struct origin *)origin) ? REFUSE(NO_ORIGIN) : 0;
}

/* A socket can be connected anew, to an address that was once its backend. */
static __always_inline void forget(struct bpf_sock_addr *ctx, u64 cookie, const struct target *peer)
{
	struct origin_key key = {.cookie = cookie, .peer = *peer};

	if (ctx->sk)
		connected.sk_storage_delete(ctx->sk);
	origins.delete(&key);
}

/* What the socket asked for when it was given `peer`, or null. */
static __always_inline struct origin *recall(struct bpf_sock *sk, u64 cookie,
					     const struct target *peer)
{
	struct origin_key key = {.cookie = cookie, .peer = *peer};
	struct connected *own = sk ? connected.sk_storage_get(sk, 0, 0) : 0;

	if (own && same_target(&own->peer, peer))
		return &own->origin;
	return origins.lookup(&key);
}

#endif
