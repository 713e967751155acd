/* What a socket asked for, before it was given a backend. */
#ifndef WEFT_ORIGIN_H
#define WEFT_ORIGIN_H

#include "count.h"

static __always_inline int remember(u64 cookie, const struct target *backend,
				    const struct target *asked)
{
	struct origin_key key = {.cookie = cookie, .peer = *backend};
	struct target origin = *asked;

	return origins.update(&key, &origin) ? REFUSE(NO_ORIGIN) : 0;
}

/* A socket can be connected anew, to an address that was once its backend. */
static __always_inline void forget(u64 cookie, const struct target *peer)
{
	struct origin_key key = {.cookie = cookie, .peer = *peer};

	origins.delete(&key);
}

/* The target that the socket asked for when it was given `peer`, or null. */
static __always_inline struct target *recall(u64 cookie, const struct target *peer)
{
	struct origin_key key = {.cookie = cookie, .peer = *peer};
	struct target *origin = origins.lookup(&key);

	if (origin)
		count(REASON_ANSWERED);
	return origin;
}

#endif
