/* Who somebody is, and what a pod's policy says of it. */
#ifndef WEFT_POLICY_H
#define WEFT_POLICY_H

#include "address.h"
#include "count.h"

/* One bit for each direction, from the left. */
#define POLICY_KEY_BITS 96

static __always_inline u32 identity_of(const u32 *address)
{
	struct prefix key = whole(address);
	struct identity *found = identities.lookup(&key);

	if (found)
		return found->number;
	/* Of a pod that nobody has told of yet. */
	return interfaces.lookup(&key.address) ? IDENTITY_INIT : IDENTITY_WORLD;
}

static __always_inline struct pod *pod_at(const u32 *address)
{
	struct address key = {{address[0], address[1], address[2], address[3]}};

	return pods.lookup(&key);
}

/* Whether both ends are pods of this node that hold valid SVIDs: who they are the kernel knows. */
static __always_inline int are_proven(const struct pod *pod, const u32 *other)
{
	struct pod *found;

	if (!(pod->flags & POD_PROVEN))
		return 0;
	found = pod_at(other);
	return found && found->flags & POD_PROVEN;
}

/* Why a pod's policy refuses it, or would (POLICY_AUDIT); 0: it does not. `safe`: both ends are
 * proven, here or by mutual TLS. */
static __always_inline u32 policy_refusal(const struct pod *pod, u32 direction, u32 identity,
					  u8 protocol, u16 port, int safe, u32 *rule)
{
	u32 said = 0, flags = direction == EGRESS ? pod->flags : pod->flags >> POD_INGRESS_SHIFT;
	struct policy_key key = {
		.bits = POLICY_KEY_BITS,
		.set = pod->policy,
		.identity = identity,
		.direction = direction,
		.protocol = protocol,
		.port = port,
	};
	struct policy *found;

	if (!(flags & POD_POLICED))
		return 0;
	found = policies.lookup(&key);
	if (found) {
		said = found->flags;
		*rule = found->rule;
	}
	key.identity = 0;
	found = policies.lookup(&key);
	if (found) {
		/* One that denies is the one to name. */
		if (!*rule || found->flags & ~said & (POLICY_DENY | POLICY_AUDIT_DENY))
			*rule = found->rule;
		said |= found->flags;
	}
	if (said & POLICY_DENY ||
	    (flags & POD_DEFAULT_DENY && !(said & POLICY_ALLOW) && !(safe && said & POLICY_SAFE)))
		return flags & POD_AUDIT ? REASON_POLICY_AUDIT : REASON_POLICY_DENIED;
	return said & POLICY_AUDIT_DENY ? REASON_POLICY_AUDIT : 0;
}

#endif
