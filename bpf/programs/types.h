/* The structs in the maps. bpf/layout.py has the same in Python; its checks are compiled in. */
#ifndef WEFT_TYPES_H
#define WEFT_TYPES_H

/* Address and port in network order, IPv4 as ::ffff:a.b.c.d; protocol is an IP protocol number. */
struct target {
	u32 address[4];
	u16 port;
	u8 protocol;
	u8 zero;
};

/* The Maglev table of a frontend is slots[offset .. offset + size); no backends: size 0. */
struct frontend {
	u32 offset;
	u32 size;
};

struct origin_key {
	u64 cookie;
	struct target peer;
	u32 zero;
};

#endif
