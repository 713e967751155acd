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
	u32 affinity_s; /* 0: none */
};

/* `backend` belongs to `frontend`; only kept for frontends with affinity. */
struct member {
	struct target frontend;
	struct target backend;
};

/* A client is a network namespace: that of a pod. */
struct affinity_key {
	u64 client;
	struct target frontend;
	u32 zero;
};

struct affinity {
	u64 used_ns; /* CLOCK_MONOTONIC */
	struct target backend;
	u32 zero;
};

struct origin_key {
	u64 cookie;
	struct target peer;
	u32 zero;
};

#endif
