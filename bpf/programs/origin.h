/* What a socket asked for, before it was given a peer. */
#ifndef WEFT_ORIGIN_H
#define WEFT_ORIGIN_H

#include "count.h"

static __always_inline int remember(u64 cookie, const struct target *peer,
				    const struct origin *origin, u32 *reason)
{
	struct origin_key key = {.cookie = cookie, .peer = *peer};

	return origins.update(&key, (struct origin *)origin) ? REFUSE(NO_ORIGIN) : 0;
}

/* A socket can be connected anew, to an address that was once its backend. */
static __always_inline void forget(u64 cookie, const struct target *peer)
{
	struct origin_key key = {.cookie = cookie, .peer = *peer};

	origins.delete(&key);
}

/* What the socket asked for when it was given `peer`, or null. */
static __always_inline struct origin *recall(u64 cookie, const struct target *peer)
{
	struct origin_key key = {.cookie = cookie, .peer = *peer};

	return origins.lookup(&key);
}

#endif
