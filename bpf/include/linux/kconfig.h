#ifndef WEFT_SHIM_KCONFIG_H
#define WEFT_SHIM_KCONFIG_H

/* bcc includes this before anything else, so what a kernel tree would have defined by then is
 * defined here. Without CONFIG_BPF_SYSCALL bcc's helpers are not declared. */
#define CONFIG_BPF_SYSCALL 1

typedef __SIZE_TYPE__ size_t;
typedef __UINTPTR_TYPE__ uintptr_t;

#endif
