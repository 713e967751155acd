#ifndef WEFT_SHIM_TYPES_H
#define WEFT_SHIM_TYPES_H

/* The kernel's short names over the user-space header of linux-libc-dev. */
#include_next <linux/types.h>

typedef __s8 s8;
typedef __u8 u8;
typedef __s16 s16;
typedef __u16 u16;
typedef __s32 s32;
typedef __u32 u32;
typedef __s64 s64;
typedef __u64 u64;

#endif
