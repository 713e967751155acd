#ifndef WEFT_SHIM_PAGE_H
#define WEFT_SHIM_PAGE_H

/* bcc's helpers.h names PAGE_SIZE in code that networking programs do not use. */
#define PAGE_SIZE 4096

#endif
