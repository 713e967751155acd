/* Who somebody is, and what a pod's policy says of it. */
#ifndef WEFT_POLICY_H
#define WEFT_POLICY_H

#include "count.h"
#include "membership.h"
#include "verifier.h"

/* One bit for each direction, from the left. */
#define POLICY_KEY_BITS 96

static __always_inline int is_workload(u32 number)
{
	return number >= FIRST_WORKLOAD && number < FIRST_CIDR;
}

/* Who an address is, and what is in force for it if it is a local pod's. What a range says is not of a
 * pod that nobody has told of yet: its rules are under no address. Of one that is known there are some,
 * unless there was no room for them: everything is refused then. `any`: as in `forgotten`. */
static __always_inline struct party party_of(const u32 *address, u64 now, u32 any)
{
	struct address key = {{address[0], address[1], address[2], address[3]}};
	struct party party = {.who = who_is(address, now)};
	int is_local = !!interfaces.lookup(&key);
	struct pod *pod;

	party.who.number = forgotten(party.who.number, any);
	party.who.flags = forgotten(party.who.flags, any);
	if (is_local && !is_workload(party.who.number)) {
		party.who.number = IDENTITY_INIT;
		__builtin_memset(&key, 0, sizeof(key));
		is_local = 0;
	}
	for (int i = 0; i < 4; i++)
		key.words[i] = forgotten(key.words[i], any);
	is_local = forgotten(is_local, any);
	pod = pods.lookup(&key);
	if (!pod) {
		party.flags = is_local ? POD_CLOSED : 0;
	} else if (pod->since <= now) {
		party.policy = pod->policy;
		party.flags = pod->flags;
	} else {
		party.policy = pod->old_policy;
		party.flags = pod->old_flags;
	}
	/* Whoever should take that back may hang. */
	if (party.flags & POD_PROVEN) {
		party.proven_until = pod->proven_until;
		if (bpf_ktime_get_ns() >= party.proven_until)
			party.flags &= ~POD_PROVEN;
	}
	party.who.number = forgotten(party.who.number ?: IDENTITY_WORLD, any);
	party.policy = forgotten(party.policy, any);
	party.flags = forgotten(party.flags, any);
	return party;
}

/* Until when both ends are pods of this node that hold valid SVIDs: who they are the kernel knows;
 * 0: they are not. */
static __always_inline u64 are_proven(const struct party *one, const struct party *other)
{
	if (!(one->flags & other->flags & POD_PROVEN))
		return 0;
	return one->proven_until < other->proven_until ? one->proven_until : other->proven_until;
}

/* Why a pod's policy refuses it, or would (POLICY_AUDIT); 0: it does not. `safe`: both ends are
 * proven, here or by mutual TLS. */
static __always_inline u32 policy_refusal(const struct party *pod, u32 direction, u32 identity,
					  u8 protocol, u16 port, int safe, u32 any, u32 *rule)
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
	said = forgotten(said, any);
	*rule = forgotten(*rule, any);
	key.identity = 0;
	found = policies.lookup(&key);
	if (found) {
		/* One that denies is the one to name. */
		if (!*rule || found->flags & ~said & (POLICY_DENY | POLICY_AUDIT_DENY))
			*rule = found->rule;
		said |= found->flags;
	}
	said = forgotten(said, any);
	*rule = forgotten(*rule, any);
	/* Of a policy that is not in audit mode, whatever the default is. */
	if (said & POLICY_DENY)
		return REASON_POLICY_DENIED;
	if (flags & POD_DEFAULT_DENY && !(said & POLICY_ALLOW) && !(safe && said & POLICY_SAFE))
		return flags & POD_AUDIT ? REASON_POLICY_AUDIT : REASON_POLICY_DENIED;
	return said & POLICY_AUDIT_DENY ? REASON_POLICY_AUDIT : 0;
}

#endif
