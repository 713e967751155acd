/* bpf/programs/automaton.h for the proxy and for tests; l7proxy/native.py calls it. */
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;
#undef __always_inline
#define __always_inline inline __attribute__((always_inline))

#include "../bpf/programs/automaton.h"

_Static_assert(sizeof(struct automaton) == 312, "l7proxy/automaton_table.py: _HEADER");
_Static_assert(sizeof(struct automaton_found) == 48, "l7proxy/automaton_table.py: _ENTRY");
_Static_assert(sizeof(struct automaton_rule) == 32, "l7proxy/automaton_table.py: _RULE");

/* `table` is followed by as much memory as the largest takes, since indices are masked, not held
 * against its own size. */
void weft_judge(const struct automaton *table, const u8 *head, size_t size, u32 egress, u32 ingress,
		struct judged *judged)
{
	struct automaton_walk walk = {.cell = table->start};
	struct automaton_facts facts = {0};

	*judged = (struct judged){0};
	automaton_chunks(table, head, head + size, &walk);
	automaton_tail(table, head, head + size, &walk);
	if (automaton_facts(table, &walk, &facts))
		return;
	automaton_decide(table, &facts, automaton_length(head, head + size, facts.at[AUTOMATON_LENGTH]), egress,
			 ingress, judged);
}
