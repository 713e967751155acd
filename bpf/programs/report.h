/* Events for flow records. */
#ifndef WEFT_REPORT_H
#define WEFT_REPORT_H

#include "address.h"
#include "count.h"

/* A full buffer loses events, counted; it never holds up traffic. */
static __always_inline void emit(struct event *event)
{
	event->time_ns = bpf_ktime_get_ns();
	if (events.ringbuf_output(event, sizeof(*event), 0))
		count(REASON_EVENTS_LOST);
}

/* A socket of a namespace named a peer; its own port is not known yet. */
static __always_inline void report(u64 netns, const struct target *asked,
				   const struct target *peer, u32 reason, u32 rule)
{
	struct event event = {
		.netns = netns, .asked = *asked, .peer = *peer, .reason = reason, .rule = rule};
	struct addresses *own = namespaces.lookup(&netns);

	if (is_loopback(asked))
		return;
	if (own) {
		const struct address *source = is_ipv4(asked) ? &own->v4 : &own->v6;

		__builtin_memcpy(event.source.address, source->words, sizeof(source->words));
		event.source.protocol = asked->protocol;
	}
	emit(&event);
}

/* Of a packet, unless there were too many in this second. */
static __always_inline void report_packet(const struct tuple *tuple, u32 reason, u32 rule)
{
	struct event event = {.source = tuple->opener,
			      .asked = tuple->peer,
			      .peer = tuple->peer,
			      .reason = reason,
			      .rule = rule};
	u64 second = bpf_ktime_get_ns() / SECOND_NS;
	struct told *last;
	u32 zero = 0;

	last = told.lookup(&zero);
	if (!last)
		return;
	if (last->second != second) {
		last->second = second;
		last->events = 0;
	}
	if (++last->events > TOLD_MAX) {
		count(REASON_UNTOLD);
		return;
	}
	emit(&event);
}

#endif
