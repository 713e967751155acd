/* Requests judged in the kernel: the tables in force, and what becomes of one head. */
#ifndef WEFT_JUDGE_H
#define WEFT_JUDGE_H

#include "types.h"
#include "verifier.h"
#include "automaton.h"

/* Tables stand in arenas, one after another, and are never changed: a new one gets a place and a
 * generation of its own, a number that follows from all that was compiled into it. One that is gone
 * from `automata` is the proxy's; its arena is let go when no table in it is in force, and the kernel
 * frees it once nobody reads it. */
BPF_F_TABLE("hash", u64, struct automaton_place, automata, AUTOMATA, BPF_F_NO_PREALLOC);
/* bcc makes code for every element of a leaf but chars. */
struct automaton_arena {
	char raw[AUTOMATON_ARENA];
};
BPF_F_TABLE("array", u32, struct automaton_arena, automaton_inner, 1, BPF_F_MMAPABLE);
BPF_TABLE("array_of_maps$automaton_inner", u32, int, automaton_arenas, AUTOMATON_ARENAS);

/* What has `data` and `data_end`; a test has another, and something before the head in it. */
#ifndef JUDGE_CONTEXT
#define JUDGE_CONTEXT struct sk_msg_md
#define JUDGE_SKIPPED 0
#endif
#define JUDGE_DATA(context) ((const u8 *)(long)(context)->data + JUDGE_SKIPPED)
#define JUDGE_END(context) ((const u8 *)(long)(context)->data_end)

/* The table of a generation; 0: there is none. */
static __always_inline const struct automaton *automaton_of(u64 generation)
{
	const struct automaton *automaton;
	struct automaton_place *place;
	void *arena;
	u32 zero = 0, index;

	place = automata.lookup(&generation);
	if (!place)
		return 0;
	index = place->arena;
	arena = automaton_arenas.lookup(&index);
	if (!arena)
		return 0;
	arena = bpf_map_lookup_elem(arena, &zero);
	if (!arena)
		return 0;
	automaton = arena + 4 * (place->word & (AUTOMATON_WORDS - 2));
	/* It may be another arena by now. */
	return automaton->generation == generation ? automaton : 0;
}

/* Judges the head at the context's `data` (bpf_msg_pull_data comes before). `egress`, `ingress`:
 * the lists of policy rules that must let it pass as well, 0: none. `judged->rule` 0: it is the
 * proxy's: no such generation, no whole head, something unusual, or a rule that needs it. */
static __always_inline __attribute__((unused)) void
judge_head(JUDGE_CONTEXT *context, u64 generation, u32 egress, u32 ingress, struct judged *judged)
{
	const struct automaton *automaton = automaton_of(generation);
	struct automaton_facts facts = {};
	struct automaton_walk walk = {};
	u64 length;

	*judged = (struct judged){};
	if (!automaton)
		return;
	walk.cell = automaton->start;
	walk.count = automaton->zero;
	automaton_chunks(automaton, JUDGE_DATA(context), JUDGE_END(context), &walk);
	automaton_tail(automaton, JUDGE_DATA(context), JUDGE_END(context), &walk);
	if (automaton_facts(automaton, &walk, &facts))
		return;
	length = automaton_length(JUDGE_DATA(context), JUDGE_END(context), facts.at[AUTOMATON_LENGTH]);
	automaton_decide(automaton, &facts, length, egress, ingress, judged);
}

#endif
