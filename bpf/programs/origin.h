/* What a socket asked for, before it was given a peer. */
#ifndef WEFT_ORIGIN_H
#define WEFT_ORIGIN_H

#include "address.h"
#include "count.h"

/* The number of the peer among the socket's last ones, or ASKED_LATELY. */
static __always_inline u32 find_asked(const struct asked *own, const struct target *peer)
{
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < ASKED_LATELY; i++)
		if (same_target(&own->last[i].peer, peer))
			return i;
	return ASKED_LATELY;
}

/* Two threads may send at once on one socket: at worst an answer to it has its backend's name. Nor is
 * it more than that if there is no memory. */
static __always_inline void keep_asked(struct bpf_sock_addr *ctx, const struct target *peer,
				       const struct origin *origin)
{
	struct asked *own =
		ctx->sk ? asked.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE) : 0;
	u32 at;

	if (!own)
		return;
	at = find_asked(own, peer);
	if (at == ASKED_LATELY)
		at = own->next++;
	at &= ASKED_LATELY - 1;
	own->last[at].peer = *peer;
	own->last[at].origin = *origin;
}

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
	if (!connects)
		keep_asked(ctx, peer, origin);
	return origins.update(&key, (struct origin *)origin) ? REFUSE(NO_ORIGIN) : 0;
}

/* A socket can be connected anew, to an address that was once its backend. */
static __always_inline void forget(struct bpf_sock_addr *ctx, u64 cookie, const struct target *peer)
{
	struct origin_key key = {.cookie = cookie, .peer = *peer};

	if (ctx->sk) {
		connected.sk_storage_delete(ctx->sk);
		asked.sk_storage_delete(ctx->sk);
	}
	origins.delete(&key);
}

/* What the socket asked for when it was given `peer`, or null. */
static __always_inline struct origin *recall(struct bpf_sock *sk, u64 cookie,
					     const struct target *peer)
{
	struct origin_key key = {.cookie = cookie, .peer = *peer};
	struct connected *own = sk ? connected.sk_storage_get(sk, 0, 0) : 0;
	struct asked *lately;
	u32 at;

	if (own && same_target(&own->peer, peer))
		return &own->origin;
	lately = sk && peer->protocol == IPPROTO_UDP ? asked.sk_storage_get(sk, 0, 0) : 0;
	at = lately ? find_asked(lately, peer) : ASKED_LATELY;
	if (at < ASKED_LATELY)
		return &lately->last[at & (ASKED_LATELY - 1)].origin;
	return origins.lookup(&key);
}

#endif
