/* Flows: who opened what, so that answers to what is allowed pass, and what policy says now reaches
 * what was opened before. */
#ifndef WEFT_CONNTRACK_H
#define WEFT_CONNTRACK_H

#include "packet.h"
#include "policy.h"

static __always_inline int is_alive(const struct flow *flow, const struct flow_key *key, u64 now)
{
	s64 idle = now - flow->seen_ns;

	if (key->tuple.opener.protocol == IPPROTO_TCP && flow->flags & FLOW_ANSWERED &&
	    (flow->flags & FLOW_ENDED) != FLOW_ENDED)
		return idle < (s64)(FLOW_TCP_S * SECOND_NS);
	return idle < (s64)(FLOW_S * SECOND_NS);
}

static __always_inline void turned(const struct tuple *tuple, struct tuple *other)
{
	other->opener = tuple->peer;
	other->peer = tuple->opener;
}

/* The flow that a packet with this tuple belongs to, passing a pod's interface in this direction;
 * `key` is the flow's, or the one that it would get. A packet that opens a connection is no answer. */
static __always_inline struct flow *find_flow(const struct tuple *tuple, u32 direction, int opens,
					      u64 now, struct flow_key *key)
{
	struct flow_key answered = {};
	struct flow *flow;

	key->tuple = *tuple;
	key->direction = direction;
	flow = flows.lookup(key);
	if (flow && is_alive(flow, key, now))
		return flow;
	if (opens)
		return 0;
	turned(tuple, &answered.tuple);
	answered.direction = !direction;
	flow = flows.lookup(&answered);
	if (!flow || !is_alive(flow, &answered, now))
		return 0;
	*key = answered;
	return flow;
}

/* A packet of the flow has passed. */
static __always_inline void note(struct flow *flow, const struct packet *packet, int answers,
				 u64 now)
{
	u32 flags = answers ? FLOW_ANSWERED : 0;

	if (packet->tuple.opener.protocol == IPPROTO_TCP) {
		if (packet->tcp & TCP_RST)
			flags |= FLOW_ENDED;
		else if (packet->tcp & TCP_FIN)
			flags |= answers ? FLOW_ENDED_BY_PEER : FLOW_ENDED_BY_OPENER;
	}
	/* One that another CPU overwrites is set by the next packet, or makes a flow live longer. */
	if ((flow->flags & flags) != flags)
		flow->flags |= flags;
	if ((s64)(now - flow->seen_ns) > (s64)SECOND_NS)
		flow->seen_ns = now;
}

/* The fragments of a packet by the key they share. */
static __always_inline void fragment_of(const struct packet *packet, u32 direction,
					struct fragment *key)
{
	__builtin_memcpy(&key->source, packet->tuple.opener.address, sizeof(key->source));
	__builtin_memcpy(&key->destination, packet->tuple.peer.address, sizeof(key->destination));
	key->id = packet->id;
	key->direction = direction;
}

/* The first fragment has passed, and so may the others, which have no ports. */
static __always_inline void note_first(const struct packet *packet, u32 direction)
{
	struct fragment key = {};
	u64 now = bpf_ktime_get_ns();

	fragment_of(packet, direction, &key);
	fragments.update(&key, &now);
}

static __always_inline int follows(const struct packet *packet, u32 direction)
{
	struct fragment key = {};
	u64 *since;

	fragment_of(packet, direction, &key);
	since = fragments.lookup(&key);
	return since && bpf_ktime_get_ns() - *since < FRAGMENT_S * SECOND_NS;
}

#endif
