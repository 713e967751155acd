/* The maps, all pinned; bpf/maps.py opens them. */
#ifndef WEFT_MAPS_H
#define WEFT_MAPS_H

#include "types.h"

/* Frontend -> its table. One update switches all new connections from an old table to a new one. */
BPF_F_TABLE("hash", struct target, struct frontend, frontends, FRONTENDS, BPF_F_NO_PREALLOC);
/* All Maglev tables; a slot is an index into backends, 0 none. User space writes it mapped. */
BPF_F_TABLE("array", u32, u64, slots, SLOTS, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct backend, backends, BACKENDS, 0);
/* What a connected socket asked for, for as long as it lives. */
BPF_SK_STORAGE(connected, struct connected);
/* And one that is not connected, lately. */
BPF_SK_STORAGE(asked, struct asked);
/* What a socket asked for, by its cookie and the peer it was given: for the next version of Weft, and
 * what is not kept with the socket. Evicted when long unused, also by other pods' sockets. */
BPF_F_TABLE("lru_hash", struct origin_key, struct origin, origins, ORIGINS, 0);
/* Which backend a client of a frontend had last: valid while it is a member, and used lately. */
BPF_F_TABLE("lru_hash", struct affinity_key, struct affinity, affinities, AFFINITIES, 0);
BPF_F_TABLE("hash", struct member, u32, members, MEMBERS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("array", u32, struct config, config, 1, 0);

/* Workloads' connections to the proxy that the proxy's side has not seen yet. */
BPF_F_TABLE("lru_hash", struct tuple, struct proxied, incoming, CONNECTING, 0);
/* The proxy's connections, from their first packet to their end. */
BPF_F_TABLE("hash", struct tuple, struct outgoing, outgoing, OUTGOING_MAX, BPF_F_NO_PREALLOC);
/* The proxy's socket -> the workload's at the other end, of connections that the proxy opened. */
BPF_F_TABLE("lru_hash", u64, u64, accepted, CONNECTING, 0);
/* With a proxy's socket, for as long as that lives. */
BPF_SK_STORAGE(proxied, struct proxied);
/* Backends that may be enrolled, and when (CLOCK_MONOTONIC, ns) which proved not to be able to. */
BPF_F_TABLE("hash", struct target, u32, fast, BACKENDS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lru_hash", struct target, u64, plain, PLAIN, 0);

/* Sockets by their cookies. A key is never deleted, nor overwritten: queued bytes would be lost.
 * BPF_SOCKHASH's leaf is u32; user space is shown cookies only by one of 8 bytes. */
#define SOCKETS(name)                                                                              \
	struct name##_table {                                                                      \
		u64 key;                                                                           \
		u64 leaf;                                                                          \
		int (*update)(u64 *, int *);                                                       \
		int (*delete)(u64 *);                                                              \
		int (*sock_hash_update)(void *, void *, u64);                                      \
		int (*msg_redirect_hash)(void *, void *, u64);                                     \
		u64 *(*lookup)(u64 *);                                                             \
		u32 max_entries;                                                                   \
	};                                                                                         \
	__attribute__((section("maps/sockhash"))) struct name##_table name = {                     \
		.max_entries = (SOCKETS_MAX)}
SOCKETS(workload_sockets);
/* What is sent on one of these goes through the program `verdict`. */
SOCKETS(proxy_sockets);

/* With an enrolled socket of a workload, for as long as that lives. */
BPF_SK_STORAGE(workload, struct workload);
/* By the client's socket's cookie; the proxy writes. */
BPF_F_TABLE("hash", u64, struct pair, pairs, PAIRS_MAX, BPF_F_NO_PREALLOC);
/* By the backend's socket's cookie; the proxy writes. */
BPF_F_TABLE("hash", u64, struct paired, paired, PAIRED_MAX, BPF_F_NO_PREALLOC);
/* By the client's socket's cookie; the proxy makes them, then only the programs write. Deleted when
 * that socket has been gone for a while, and no sooner: a program may still count in one, and its
 * memory would be another's at once. */
BPF_F_TABLE("hash", u64, struct exchange, exchanges, EXCHANGES_MAX, BPF_F_NO_PREALLOC);
/* What has passed by the proxy. User space deletes what it knows nobody to count in any more. */
BPF_F_TABLE("percpu_hash", struct passed_key, struct passed, passed, PASSED_MAX, BPF_F_NO_PREALLOC);
/* Each of them, as long as somebody takes them out. */
BPF_RINGBUF_OUTPUT(passings, PASSING_PAGES);
/* The automaton over response heads: by state and byte, what follows (bpf/response.py). */
BPF_F_TABLE("array", u32, struct responses, responses, 1, 0);

/* Address of a local pod -> interface index of its end of the veth on the node. */
BPF_F_TABLE("hash", struct address, u32, interfaces, PODS, BPF_F_NO_PREALLOC);
/* Cookie of a pod's network namespace -> its addresses. */
BPF_F_TABLE("hash", u64, struct addresses, namespaces, PODS, BPF_F_NO_PREALLOC);
/* The longest prefix says; pods have whole addresses. */
BPF_F_TABLE("lpm_trie", struct prefix, struct identity, identities, IDENTITIES, BPF_F_NO_PREALLOC);
/* Address of a local pod -> what is in force for it, all at once. */
BPF_F_TABLE("hash", struct address, struct pod, pods, PODS, BPF_F_NO_PREALLOC);
/* Ports of pods whose mode is another than their pod's: 1 if it is STRICT. Of any protocol: 0. */
BPF_F_TABLE("hash", struct target, u32, mtls_ports, MTLS_PORTS, BPF_F_NO_PREALLOC);
/* Sets of rules, each as one that does not change; the longest prefix has the answer. */
BPF_F_TABLE("lpm_trie", struct policy_key, struct policy, policies, POLICIES, BPF_F_NO_PREALLOC);
/* What is in force of identities and pods: each change of them has a greater number, and all of it
 * counts from when the number is written. The second number: when a pod has come or gone last. The
 * third: when the configuration was made that proxies have (CLOCK_MONOTONIC). */
BPF_F_TABLE("array", u32, u64, generation, 3, 0);
/* What pods have opened, and what was opened to them, at each pod's interface. */
BPF_F_TABLE("lru_hash", struct flow_key, struct flow, flows, FLOWS, 0);
/* Packets whose first fragment has passed, and when (CLOCK_MONOTONIC, ns). */
BPF_F_TABLE("lru_hash", struct fragment, u64, fragments, FRAGMENTS, 0);
/* Of packets that are refused, of those that are not, and of the node's own: whoever sends them can
 * bring them about as often as it likes. */
BPF_F_TABLE("percpu_array", u32, struct told, told, 3, 0);
BPF_RINGBUF_OUTPUT(events, EVENT_PAGES);
/* By reason, see bpf/reasons.py. */
BPF_F_TABLE("percpu_array", u32, u64, counters, REASONS, 0);

#endif
