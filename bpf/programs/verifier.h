/* What the verifier needs to be told, or kept from. */
#ifndef WEFT_VERIFIER_H
#define WEFT_VERIFIER_H

#include "types.h"

/* It wants to see the offset in each access to the context; clang would join those of two branches
 * into one through a pointer. */
static __always_inline u32 kept_apart(u32 word)
{
	asm volatile("" : "+r"(word));
	return word;
}

/* It follows every value that is known on some way, and all that comes after once for each: here it
 * forgets. `any` is a word of the context. */
static __always_inline u32 forgotten(u32 value, u32 any)
{
	asm volatile("%0 ^= %1\n\t%0 ^= %1" : "+r"(value) : "r"(any));
	return value;
}

/* For the condition of a loop of which it need not see the end: may_goto (kernel 6.9) leaves the loop
 * after very long, so the verifier is done once a further round brings it nothing new. What changes
 * from round to round must be a number that it has not looked at closely: begin with one that is
 * `forgotten`. (clang knows the instruction by no name yet: opcode, registers, then offset and immediate
 * together: it resolves no label in two bytes.) */
#define may_loop()                                                                                 \
	({                                                                                         \
		__label__ end, done;                                                           \
		int more = 1;                                                                      \
		asm volatile goto("1: .byte 0xe5, 0; .long ((%l[end] - 1b - 8) / 8) & 0xffff; .short 0"\
				  : : : : end);                                                    \
		goto done;                                                                         \
	end:                                                                                       \
		more = 0;                                                                          \
	done:                                                                                      \
		more;                                                                              \
	})

/* Declares a call, `name`_apart, of a function that the verifier looks at by itself (bpf/functions.py):
 * not once more on every way that leads there. It knows nothing then of what the function is given, not
 * even that the pointer is not null. */
#define FUNCTION(name, type)                                                                       \
	_Static_assert(sizeof(type) == SIZE_##name, "bpf/functions.py: FUNCTIONS[\"" #name "\"]"); \
	static u32 (*const name##_apart)(type *) = (void *)FUNCTION_##name

#endif
