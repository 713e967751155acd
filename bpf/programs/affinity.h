/* Session affinity: a client's next connection goes where its last one went. */
#ifndef WEFT_AFFINITY_H
#define WEFT_AFFINITY_H

#include "count.h"

/* 1: `backend` is the one that the client of this frontend had within the timeout. */
static __always_inline int affine_backend(const struct frontend *frontend,
					  struct affinity_key *key, struct backend *backend)
{
	struct affinity *last = affinities.lookup(key);
	struct member member = {.frontend = key->frontend};
	u64 now = bpf_ktime_get_ns();

	if (!last || now - last->used_ns > frontend->affinity_s * SECOND_NS)
		return 0;
	member.backend = last->backend.target;
	if (!members.lookup(&member))
		return 0;
	*backend = last->backend;
	return 1;
}

/* The timeout runs from the last connection. A full map forgets who connected longest ago, and a
 * client that is forgotten is balanced anew, so a failure to write is none to report. */
static __always_inline void keep_affinity(struct affinity_key *key, const struct backend *backend)
{
	struct affinity last = {.used_ns = bpf_ktime_get_ns(), .backend = *backend};

	affinities.update(key, &last);
}

#endif
