/* A socket names a peer: give it a backend, or this node's proxy. A socket is told its peer: name
 * what it asked for. */
#ifndef WEFT_STEER_H
#define WEFT_STEER_H

#include "choose.h"
#include "membership.h"
#include "origin.h"
#include "policy.h"
#include "report.h"
#include "verifier.h"

/* How many backends of a frontend are tried by its table, which spreads the connections of those that
 * cannot be reached, before all are, one after the other. */
#define BY_TABLE 3

enum calls { CONNECT, SENDMSG };

/* Where the proxy listens for connections of a pod to `asked`, of HTTP or to be relayed: 1, and
 * `peer`; 0: nowhere; negative: nor does anything go plainly instead that takes mutual TLS. */
static __always_inline int listening(u64 netns, const struct target *asked, int http,
				     struct target *peer)
{
	u32 zero = 0;
	struct config *at = config.lookup(&zero);

	if (!at || is_apart(netns, asked))
		return 0;
	if (is_ipv4(asked))
		*peer = http ? at->http4 : at->relay4;
	else
		*peer = http ? at->http6 : at->relay6;
	if (peer->port)
		return 1;
	return at->flags & CONFIG_MTLS ? -1 : 0;
}

/* Whose a socket is: its pod's address of the family that it speaks; null where policy has no say in
 * where it goes. */
static __always_inline const struct address *client_of(u64 netns, const struct target *asked)
{
	struct addresses *own = namespaces.lookup(&netns);
	const struct address *client;

	if (!own || (asked->protocol != IPPROTO_TCP && asked->protocol != IPPROTO_UDP) ||
	    is_loopback(asked) || is_unspecified(asked))
		return 0;
	client = is_ipv4(asked) ? &own->v4 : &own->v6;
	return client->words[0] | client->words[1] | client->words[2] | client->words[3] ? client : 0;
}

/* Whether a client may reach a target. `judged`: policy has a say; `relayed`: by the proxies of two
 * nodes; `relay` as from `listening`. */
struct candidate {
	u64 now;
	struct party client; /* once it is known */
	struct address own;
	struct target to;
	u32 judged;
	u32 known;
	int relayed;
	int relay;
	u32 rule; /* out: as in struct policy */
};
FUNCTION(refused, struct candidate);

/* Why policy refuses that a client reaches a target: the client's own rules, and those of the target
 * if it is a pod of this node, but if it is relayed the other node judges for its pod; or that it takes
 * mutual TLS and nobody relays. 0: it is not refused. What is in audit mode the filter tells of. */
int refused(struct candidate *one)
{
	struct party client, server;
	u32 reason = 0, any;
	int safe;

	if (!one)
		return REASON_UNJUDGED;
	any = one->now;
	if (one->judged && !one->known) {
		one->client = party_of(one->own.words, one->now, any);
		one->known = 1;
	}
	client = one->client;
	server = party_of(one->to.address, one->now, any);
	if (one->judged && !same_address(&one->to, &one->own)) {
		safe = one->relayed || client.flags & server.flags & POD_PROVEN;
		reason = policy_refusal(&client, EGRESS, server.who.number, one->to.protocol,
					one->to.port, safe, any, &one->rule);
		reason = forgotten(reason, any);
		if (reason != REASON_POLICY_DENIED && !one->relayed)
			reason = policy_refusal(&server, INGRESS, client.who.number, one->to.protocol,
						one->to.port, safe, any, &one->rule);
		reason = forgotten(reason, any);
		if (reason == REASON_POLICY_DENIED)
			return reason;
	}
	return one->relay < 0 && server.who.flags & IDENTITY_MTLS ? REASON_MTLS_REQUIRED : 0;
}

/* From the backend that was chosen on, the first one of the frontend that is not refused (of no frontend
 * there is only one): whether by the relay, or negative errno. */
static __always_inline int permitted(struct bpf_sock_addr *ctx, u64 cookie, int relay,
				     const struct target *asked, const struct address *from,
				     const struct frontend *frontend, struct backend *backend,
				     u32 *reason, u32 *rule)
{
	u32 why, at = 0, any = ctx->protocol, tried = forgotten(0, any);
	struct candidate one = {.now = in_force(), .relay = relay};
	int result;

	if (from) {
		one.judged = 1;
		one.own = *from;
	}
#pragma clang loop unroll(disable)
	do {
		one.to = backend->target;
		one.rule = 0;
		one.relayed = relay > 0 && backend->flags & BACKEND_REMOTE;
		why = refused_apart(&one);
		if (!why)
			return one.relayed;
		if (!frontend || tried >= BY_TABLE + frontend->backends)
			break;
		if (++tried < BY_TABLE)
			at = slot_for(frontend, cookie + tried);
		result = table_backend(frontend, &at, asked, backend, reason);
		if (result < 0)
			return result;
	} while (may_loop());
	*rule = one.rule;
	return why == REASON_POLICY_DENIED ? REFUSE(POLICY_DENIED) : REFUSE(MTLS_REQUIRED);
}

/* The peer for a socket, and the reason it is that one: 0 or negative errno. Before a proxy has ever
 * listened, everything goes straight to backends that do not take mutual TLS. What goes to the proxy
 * is judged there. */
static __always_inline int peer_of(struct bpf_sock_addr *ctx, enum calls call, u64 cookie, u64 netns,
				   const struct frontend *frontend, struct origin *origin,
				   struct target *peer, u32 *reason, u32 *rule)
{
	const struct target *asked = &origin->asked;
	int http = 0, relay = 0, result = 0;
	struct backend backend = {};
	const struct address *from = 0;

	if (frontend) {
		origin->flags = frontend->flags;
		if (asked->protocol == IPPROTO_TCP && frontend->flags & FRONTEND_HTTP)
			http = listening(netns, asked, 1, peer) > 0;
		/* The proxy may know of a route to other backends than these. */
		if (!http || frontend->affinity_s)
			result = choose(netns, cookie, frontend, asked, &backend, reason);
	} else {
		backend.target = *asked;
		if (call == CONNECT && is_far(asked))
			backend.flags = BACKEND_REMOTE;
	}
	if (!http && result >= 0) {
		if (asked->protocol == IPPROTO_TCP)
			relay = listening(netns, asked, 0, peer);
		/* A datagram may be an answer, which only the filter knows. */
		if (frontend || asked->protocol == IPPROTO_TCP)
			from = client_of(netns, asked);
		result = permitted(ctx, cookie, relay, asked, from, frontend, &backend, reason, rule);
		if (!result)
			*peer = backend.target;
	}
	if (frontend && frontend->affinity_s && result >= 0)
		keep_affinity(netns, asked, &backend);
	origin->backend = backend.target;
	if (http)
		*reason = REASON_TO_PROXY;
	else if (result > 0)
		*reason = REASON_TO_RELAY;
	else if (!result)
		*reason = frontend ? REASON_BALANCED : REASON_PASSED;
	return http || result >= 0 ? 0 : result;
}

/* The node's own sockets in the workloads' cgroup: those of pods in its network, the proxy's among
 * them where that is a pod. */
static __always_inline int is_home(u64 netns)
{
	u32 zero = 0;
	struct config *at = config.lookup(&zero);

	return at && at->home == netns;
}

/* 1: `peer` is filled in and the origin kept; 0: it goes where it asked; negative errno: refused.
 * A connection that goes where it asked ends what was kept for it, a datagram does not: sendmsg4 also
 * sees those that a connected IPv6 socket with an IPv4 peer sends, with the backend as their
 * destination. */
static __always_inline int steer(struct bpf_sock_addr *ctx, enum calls call, struct origin *origin,
				 struct target *peer)
{
	u64 cookie = bpf_get_socket_cookie(ctx), netns = bpf_get_netns_cookie(ctx);
	struct frontend *frontend = frontends.lookup(&origin->asked);
	const struct target *asked = &origin->asked;
	u32 reason = 0, rule = 0;
	int result;

	if (is_home(netns))
		return 0;
	result = peer_of(ctx, call, cookie, netns, frontend, origin, peer, &reason, &rule);
	if (!result && reason == REASON_PASSED) {
		count(REASON_PASSED);
		if (call == CONNECT) {
			forget(ctx, cookie, asked);
			/* Resolvers connect datagram sockets to ask for a route, and send nothing. */
			if (asked->protocol == IPPROTO_TCP)
				report(netns, asked, asked, reason, 0);
		}
		return 0;
	}
	if (!result)
		result = remember(ctx, call == CONNECT, cookie, peer, origin, &reason);
	if (result < 0) {
		report(netns, asked, &origin->backend, reason, rule);
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
	struct origin origin = {};
	struct target peer = {};
	int result;

	read4(ctx, &origin.asked);
	result = steer(ctx, call, &origin, &peer);
	if (result > 0)
		write4(ctx, &peer);
	return result;
}

static __always_inline int steer6(struct bpf_sock_addr *ctx, enum calls call)
{
	struct origin origin = {};
	struct target peer = {};
	int result;

	read6(ctx, &origin.asked);
	result = steer(ctx, call, &origin, &peer);
	if (result > 0)
		write6(ctx, &peer);
	return result;
}

static __always_inline void answer4(struct bpf_sock_addr *ctx)
{
	struct target peer;
	struct origin *origin;

	read4(ctx, &peer);
	origin = recall(ctx->sk, bpf_get_socket_cookie(ctx), &peer);
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
	origin = recall(ctx->sk, bpf_get_socket_cookie(ctx), &peer);
	if (origin) {
		count(REASON_ANSWERED);
		write6(ctx, &origin->asked);
	}
}

#endif
