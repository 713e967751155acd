/* Counting by reason, and the errno of reasons that refuse. */
#ifndef WEFT_COUNT_H
#define WEFT_COUNT_H

#include "maps.h"

#define SECOND_NS 1000000000ULL

static __always_inline void count(u32 reason)
{
	u64 *counter = counters.lookup(&reason);

	/* Per CPU, but a program can be preempted by another on its CPU: hence the atomic. */
	if (counter)
		__sync_fetch_and_add(counter, 1);
}

static __always_inline int refuse(u32 reason, int error)
{
	count(reason);
	return -error;
}

/* return REFUSE(NO_BACKENDS); counts the reason, puts it into *reason, and is its negative errno. */
#define REFUSE(why) (*reason = REASON_##why, refuse(REASON_##why, ERRNO_##why))

#endif
