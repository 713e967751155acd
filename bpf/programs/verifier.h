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

#endif
