/* Who is in the mesh, and who of them is on another node. */
#ifndef WEFT_MEMBERSHIP_H
#define WEFT_MEMBERSHIP_H

#include "address.h"

static __always_inline u32 identity_flags(const u32 *address)
{
	struct prefix key = whole(address);
	struct identity *found = identities.lookup(&key);

	return found ? found->flags : 0;
}

/* A pod that has opted out: its connections go to no proxy. */
static __always_inline int is_apart(u64 netns, const struct target *asked)
{
	struct addresses *own = namespaces.lookup(&netns);

	return own && identity_flags(is_ipv4(asked) ? own->v4.words : own->v6.words) & IDENTITY_APART;
}

/* A pod of the mesh on another node, whatever its ports are. */
static __always_inline int is_far(const struct target *asked)
{
	return asked->protocol == IPPROTO_TCP && identity_flags(asked->address) & IDENTITY_FAR;
}

#endif
