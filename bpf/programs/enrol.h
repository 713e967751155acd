/* Enrolment: which sockets of workloads receive by redirect, and from whom.
 *
 * The one rule: an enrolled workload's socket receives only by redirect, from its first byte to its
 * last; a proxy's socket only by TCP. So enrolment is settled while a connection is established,
 * and only where both ends are: the end that opened the connection comes first (its ESTABLISHED
 * runs before its ACK is sent), the accepting end follows or leaves it plain.
 *
 *   workload -> proxy   CONNECT announces by tuple; ESTABLISHED enrols the workload; the proxy's
 *                       end follows in turn, or (no room) the proxy is not told and closes it
 *   proxy -> workload   CONNECT announces; ESTABLISHED enrols the proxy's end; the workload's end
 *                       follows and is told under `accepted`, before which the proxy sends nothing
 */
#ifndef WEFT_ENROL_H
#define WEFT_ENROL_H

#include "address.h"
#include "count.h"
#include "origin.h"
#include "policy.h"
#include "socket.h"

static __always_inline int redirects(void)
{
	u32 zero = 0;
	struct config *at = config.lookup(&zero);

	return at && at->flags & CONFIG_SOCKMAP;
}

/* Who is not known (yet) may have opted out. */
static __always_inline int opted_out(const struct target *end)
{
	struct who who = who_is(end->address, in_force());

	return !who.number || who.flags & IDENTITY_PLAIN;
}

/* A pod can bind to any address (IP_TRANSPARENT). The filter drops its packets then, but whoever has
 * the address would be taken for steered by the proxy. */
static __always_inline int is_own(u64 netns, const struct target *end)
{
	struct addresses *own = namespaces.lookup(&netns);

	return !own || same_address(end, &own->v4) || same_address(end, &own->v6);
}

/* Why the proxy must not take a connection for whose it may think it is: whose a socket is nobody has
 * told yet, and there are policies, or identities. The proxy may still know a pod that had the address
 * before, or connect plainly for one that is not known: it is told of no connection, and closes it. */
static __always_inline u32 nobodys(const struct target *opener, u32 any)
{
	struct party party = party_of(opener->address, in_force(), any);

	if (party.who.number != IDENTITY_INIT)
		return 0;
	if (party.flags & (POD_POLICED | POD_POLICED << POD_INGRESS_SHIFT))
		return REASON_POLICY_DENIED;
	return party.flags & POD_STRICT ? REASON_MTLS_REQUIRED : 0;
}

/* Into the maps of sockets, by cookie; 0 or negative errno. (bcc makes a statement of the call.) */
static __always_inline long enrol_workload(struct bpf_sock_ops *ctx, u64 cookie)
{
	long result;

	result = workload_sockets.sock_hash_update(ctx, &cookie, BPF_NOEXIST);
	return result;
}

/* What it sends by TCP from now on is known by number; without it nothing of it passes the proxy by. */
static __always_inline void number_workload(struct bpf_sock_ops *ctx, u64 cookie, u32 is_backend)
{
	struct workload own = {.cookie = cookie, .base = ctx->snd_nxt, .is_backend = is_backend};
	struct bpf_sock *sk = ctx->sk;

	if (sk)
		workload.sk_storage_get(sk, &own, BPF_SK_STORAGE_GET_F_CREATE);
}

static __always_inline long enrol_proxy(struct bpf_sock_ops *ctx, u64 cookie)
{
	long result;

	result = proxy_sockets.sock_hash_update(ctx, &cookie, BPF_NOEXIST);
	return result;
}

/* --- a workload opens a connection to the proxy ----------------------------------------------- */

static __always_inline void announce_workload(struct bpf_sock_ops *ctx)
{
	struct tuple tuple;
	struct proxied value = {};
	struct origin *origin;
	u32 reason;

	opened(ctx, &tuple);
	value.cookie = bpf_get_socket_cookie(ctx);
	origin = recall(ctx->sk, value.cookie, &tuple.peer);
	if (!origin) {
		/* Of an earlier connection that never came about. */
		incoming.delete(&tuple);
		return;
	}
	value.netns = bpf_get_netns_cookie(ctx);
	if (!is_own(value.netns, &tuple.opener))
		return;
	reason = nobodys(&tuple.opener, ctx->op);
	if (reason) {
		count(reason);
		incoming.delete(&tuple);
		return;
	}
	value.asked = origin->asked;
	value.backend = origin->backend;
	/* Every network namespace has the same loopback tuples. */
	if (origin->flags & FRONTEND_SOCKMAP && redirects() && !is_loopback(&tuple.opener) &&
	    !opted_out(&tuple.opener))
		value.state = STATE_WANTED;
	incoming.update(&tuple, &value);
}

static __always_inline void establish_workload(struct bpf_sock_ops *ctx)
{
	struct tuple tuple;
	struct proxied *value;

	opened(ctx, &tuple);
	value = incoming.lookup(&tuple);
	if (!value || value->state != STATE_WANTED || value->cookie != bpf_get_socket_cookie(ctx))
		return;
	if (enrol_workload(ctx, value->cookie)) {
		value->state = 0;
		count(REASON_ENROL_FAILED);
		return;
	}
	number_workload(ctx, value->cookie, 0);
	value->state = STATE_ENROLLED;
}

static __always_inline void take_client(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct proxied *value, *own;
	struct tuple tuple;

	taken(ctx, &tuple);
	value = incoming.lookup(&tuple);
	if (!value || !sk)
		return;
	if (value->state == STATE_ENROLLED) {
		if (enrol_proxy(ctx, bpf_get_socket_cookie(ctx))) {
			/* The proxy finds nothing with the socket, and closes it. */
			count(REASON_ENROL_FAILED);
			return;
		}
		value->peer = value->cookie;
		count(REASON_ENROLLED);
	}
	own = proxied.sk_storage_get(sk, value, BPF_SK_STORAGE_GET_F_CREATE);
	if (!own)
		count(REASON_ENROL_FAILED);
	incoming.delete(&tuple);
}

/* --- the proxy opens a connection to a workload ------------------------------------------------ */

/* A backend is tried again now and then: it may have been slow just once. */
static __always_inline int proved_plain(struct target *backend)
{
	u64 *since = plain.lookup(backend);

	return since && bpf_ktime_get_ns() - *since < PLAIN_S * SECOND_NS;
}

static __always_inline void announce_proxy(struct bpf_sock_ops *ctx)
{
	struct outgoing value = {};
	struct tuple tuple;

	opened(ctx, &tuple);
	value.cookie = bpf_get_socket_cookie(ctx);
	if (redirects() && fast.lookup(&tuple.peer) && !proved_plain(&tuple.peer))
		value.state = STATE_WANTED;
	if (outgoing.update(&tuple, &value))
		count(REASON_ENROL_FAILED);
	else
		bpf_sock_ops_cb_flags_set(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void establish_proxy(struct bpf_sock_ops *ctx)
{
	struct proxied own = {.state = STATE_ENROLLED};
	struct bpf_sock *sk = ctx->sk;
	struct outgoing *value;
	struct tuple tuple;

	opened(ctx, &tuple);
	value = outgoing.lookup(&tuple);
	if (!value || !sk || value->state != STATE_WANTED)
		return;
	own.cookie = value->cookie;
	/* What is in the map without storage cannot send at all; so storage comes first. */
	if (!proxied.sk_storage_get(sk, &own, BPF_SK_STORAGE_GET_F_CREATE)) {
		value->state = 0;
		count(REASON_ENROL_FAILED);
		return;
	}
	if (enrol_proxy(ctx, own.cookie)) {
		proxied.sk_storage_delete(sk);
		value->state = 0;
		count(REASON_ENROL_FAILED);
		return;
	}
	value->state = STATE_ENROLLED;
}

static __always_inline void take_proxy(struct bpf_sock_ops *ctx)
{
	struct outgoing *value;
	struct tuple tuple;
	u64 cookie, theirs;

	taken(ctx, &tuple);
	value = outgoing.lookup(&tuple);
	if (!value || value->state != STATE_ENROLLED)
		return;
	cookie = bpf_get_socket_cookie(ctx);
	theirs = value->cookie;
	if (enrol_workload(ctx, cookie)) {
		count(REASON_ENROL_FAILED);
		return;
	}
	number_workload(ctx, cookie, 1);
	if (accepted.update(&theirs, &cookie))
		count(REASON_ENROL_FAILED);
	else
		count(REASON_ENROLLED);
}

static __always_inline void forget_outgoing(struct bpf_sock_ops *ctx)
{
	struct tuple tuple;

	opened(ctx, &tuple);
	outgoing.delete(&tuple);
}

#endif
