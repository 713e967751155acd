/* Who somebody is, and what a pod's policy says of it. */
#ifndef WEFT_POLICY_H
#define WEFT_POLICY_H

#include "count.h"
#include "membership.h"

/* One bit for each direction, from the left. */
#define POLICY_KEY_BITS 96

static __always_inline int is_workload(u32 number)
{
	return number >= FIRST_WORKLOAD && number < FIRST_CIDR;
}

static __always_inline u32 identity_of(const u32 *address, u64 now)
{
	struct address key = {{address[0], address[1], address[2], address[3]}};
	u32 number = who_is(address, now).number;

	/* What a range says is not of a pod that nobody has told of yet. */
	if (!is_workload(number) && interfaces.lookup(&key))
		return IDENTITY_INIT;
	return number ?: IDENTITY_WORLD;
}

/* Of a local pod, by its address; flags 0: there are none, or it is none. Those of a pod that nobody
 * has told of are under no address. Of one that is known there is something, unless there was no room
 * for it: everything is refused then. */
static __always_inline struct rules rules_of(const u32 *address, u64 now)
{
	struct address key = {{address[0], address[1], address[2], address[3]}};
	struct rules rules = {};
	struct pod *pod;

	if (identity_of(address, now) == IDENTITY_INIT && interfaces.lookup(&key))
		__builtin_memset(&key, 0, sizeof(key));
	pod = pods.lookup(&key);
	if (!pod) {
		rules.flags = interfaces.lookup(&key) ? POD_CLOSED : 0;
	} else if (pod->since <= now) {
		rules.policy = pod->policy;
		rules.flags = pod->flags;
	} else {
		rules.policy = pod->old_policy;
		rules.flags = pod->old_flags;
	}
	if (rules.flags & POD_PROVEN) {
		rules.proven_until = pod->proven_until;
		/* Whoever should say so may hang. */
		if (bpf_ktime_get_ns() >= rules.proven_until)
			rules.flags &= ~POD_PROVEN;
	}
	return rules;
}

/* Until when both ends are pods of this node that hold valid SVIDs: who they are the kernel knows;
 * 0: they are not. */
static __always_inline u64 are_proven(struct rules pod, const u32 *other, u64 now)
{
	struct rules rules;

	if (!(pod.flags & POD_PROVEN))
		return 0;
	rules = rules_of(other, now);
	if (!(rules.flags & POD_PROVEN))
		return 0;
	return pod.proven_until < rules.proven_until ? pod.proven_until : rules.proven_until;
}

/* Why a pod's policy refuses it, or would (POLICY_AUDIT); 0: it does not. `safe`: both ends are
 * proven, here or by mutual TLS. */
static __always_inline u32 policy_refusal(struct rules pod, u32 direction, u32 identity,
					  u8 protocol, u16 port, int safe, u32 *rule)
{
	u32 said = 0, flags = direction == EGRESS ? pod.flags : pod.flags >> POD_INGRESS_SHIFT;
	struct policy_key key = {
		.bits = POLICY_KEY_BITS,
		.set = pod.policy,
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
	/* Of a policy that is not in audit mode, whatever the default is. */
	if (said & POLICY_DENY)
		return REASON_POLICY_DENIED;
	if (flags & POD_DEFAULT_DENY && !(said & POLICY_ALLOW) && !(safe && said & POLICY_SAFE))
		return flags & POD_AUDIT ? REASON_POLICY_AUDIT : REASON_POLICY_DENIED;
	return said & POLICY_AUDIT_DENY ? REASON_POLICY_AUDIT : 0;
}

#endif
