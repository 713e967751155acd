/* From a frontend to one of its backends. */
#ifndef WEFT_CHOOSE_H
#define WEFT_CHOOSE_H

#include "address.h"
#include "affinity.h"
#include "count.h"

/* Socket cookies count up; their bits are spread over the table (the finaliser of MurmurHash3). */
static __always_inline u32 spread(u64 cookie)
{
	cookie ^= cookie >> 33;
	cookie *= 0xff51afd7ed558ccdULL;
	cookie ^= cookie >> 33;
	cookie *= 0xc4ceb9fe1a85ec53ULL;
	cookie ^= cookie >> 33;
	return cookie;
}

/* Which slot of its table a frontend has for a cookie. */
static __always_inline u32 slot_for(const struct frontend *frontend, u64 cookie)
{
	return frontend->size ? spread(cookie) % frontend->size : 0;
}

/* The backend that a frontend's table has in slot `at`, which then is one that has another; 0 or
 * negative errno. */
static __always_inline int table_backend(const struct frontend *frontend, u32 *at,
					 const struct target *asked, struct backend *backend,
					 u32 *reason)
{
	struct backend *found;
	u32 index;
	u64 *slot;

	if (!frontend->size)
		return REFUSE(NO_BACKENDS);
	index = frontend->offset + *at;
	slot = slots.lookup(&index);
	if (!slot || !*slot)
		return REFUSE(STALE_TABLE);
	index = *slot;
	*at = *slot >> 32;
	found = backends.lookup(&index);
	if (!found || !found->target.port)
		return REFUSE(STALE_TABLE);
	*backend = *found;
	if (is_ipv4(asked) && !is_ipv4(&backend->target))
		return REFUSE(WRONG_FAMILY);
	return 0;
}

/* 0 and `backend`, or negative errno: refused, and counted. The same socket is given the same
 * backend for as long as the table says so, which is what keeps a conversation over unconnected UDP
 * in one place. */
static __always_inline int choose(struct bpf_sock_addr *ctx, u64 cookie,
				  const struct frontend *frontend, const struct target *asked,
				  struct backend *backend, u32 *reason)
{
	struct affinity_key key = {.client = bpf_get_netns_cookie(ctx), .frontend = *asked};
	int result;
	u32 at;

	if (!frontend->affinity_s || !affine_backend(frontend, &key, backend)) {
		at = slot_for(frontend, cookie);
		result = table_backend(frontend, &at, asked, backend, reason);
		if (result < 0)
			return result;
	}
	if (frontend->affinity_s)
		keep_affinity(&key, backend);
	return 0;
}

#endif
