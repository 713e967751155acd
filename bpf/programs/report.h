/* Events for flow records. */
#ifndef WEFT_REPORT_H
#define WEFT_REPORT_H

#include "address.h"
#include "count.h"

/* A full buffer loses events, counted; it never holds up traffic. */
static __always_inline struct event *new_event(const struct target *asked, const struct target *peer,
					       u32 reason, u32 rule)
{
	struct event *event = events.ringbuf_reserve(sizeof(*event));

	if (!event) {
		count(REASON_EVENTS_LOST);
		return 0;
	}
	event->time_ns = bpf_ktime_get_ns();
	event->netns = 0;
	event->source = (struct target){};
	event->asked = *asked;
	event->peer = *peer;
	event->reason = reason;
	event->rule = rule;
	event->zero = 0;
	return event;
}

/* A socket of a namespace named a peer; its own port is not known yet. */
static __always_inline void report(u64 netns, const struct target *asked,
				   const struct target *peer, u32 reason, u32 rule)
{
	struct addresses *own = namespaces.lookup(&netns);
	struct event *event;

	if (is_loopback(asked))
		return;
	event = new_event(asked, peer, reason, rule);
	if (!event)
		return;
	event->netns = netns;
	if (own) {
		const struct address *source = is_ipv4(asked) ? &own->v4 : &own->v6;

		__builtin_memcpy(event->source.address, source->words, sizeof(source->words));
		event->source.protocol = asked->protocol;
	}
	events.ringbuf_submit(event, 0);
}

/* Of a packet, unless there were too many in this second. */
static __always_inline void report_packet(const struct tuple *tuple, u32 reason, u32 rule)
{
	u64 second = bpf_ktime_get_ns() / SECOND_NS;
	struct event *event;
	u32 which = reason == REASON_FROM_HOST ? 2 : reason == REASON_PLAIN;
	struct told *last;

	last = told.lookup(&which);
	if (!last)
		return;
	if (last->second != second) {
		last->second = second;
		last->events = 0;
	}
	if (++last->events > (reason == REASON_FROM_HOST ? TOLD_FROM_HOST_MAX : TOLD_MAX)) {
		count(REASON_UNTOLD);
		return;
	}
	event = new_event(&tuple->peer, &tuple->peer, reason, rule);
	if (event) {
		event->source = tuple->opener;
		events.ringbuf_submit(event, 0);
	}
}

#endif
