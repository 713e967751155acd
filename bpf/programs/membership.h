/* Who an address is; who is in the mesh, and who of them is on another node. */
#ifndef WEFT_MEMBERSHIP_H
#define WEFT_MEMBERSHIP_H

#include "address.h"

/* To be asked once for a decision, before all else: no decision is made by parts of two states. */
static __always_inline u64 in_force(void)
{
	u32 zero = 0;
	u64 *now = generation.lookup(&zero);

	return now ? *now : 0;
}

/* What flows were judged by as well: who has come or gone counts before anybody is told of it, since
 * another pod may have the address by now. */
static __always_inline u64 with_pods(u64 now)
{
	u32 one = 1;
	u64 *pods_changed = generation.lookup(&one);

	return pods_changed ? now + *pods_changed : now;
}

/* What a proxy says by a configuration that was made before this does not count. */
static __always_inline u64 proxies_have(void)
{
	u32 two = 2;
	u64 *made = generation.lookup(&two);

	return made ? *made : 0;
}

static __always_inline struct who who_is(const u32 *address, u64 now)
{
	struct prefix key = whole(address);
	struct identity *found = identities.lookup(&key);
	struct who who = {};

	if (found && found->since <= now) {
		who.number = found->number;
		who.flags = found->flags;
	} else if (found) {
		who.number = found->old_number;
		who.flags = found->old_flags;
	}
	return who;
}

/* A pod that has opted out: its connections go to no proxy. */
static __always_inline int is_apart(u64 netns, const struct target *asked)
{
	struct addresses *own = namespaces.lookup(&netns);

	return own && who_is(is_ipv4(asked) ? own->v4.words : own->v6.words, in_force()).flags &
			      IDENTITY_APART;
}

/* A pod of the mesh on another node, whatever its ports are. */
static __always_inline int is_far(const struct target *asked)
{
	return asked->protocol == IPPROTO_TCP &&
	       who_is(asked->address, in_force()).flags & IDENTITY_FAR;
}

#endif
