/* The maps, all pinned; bpf/maps.py opens them. */
#ifndef WEFT_MAPS_H
#define WEFT_MAPS_H

#include "types.h"

/* Frontend -> its table. One update switches all new connections from an old table to a new one. */
BPF_F_TABLE("hash", struct target, struct frontend, frontends, FRONTENDS, BPF_F_NO_PREALLOC);
/* All Maglev tables; a slot is an index into backends, 0 none. User space writes it mapped. */
BPF_F_TABLE("array", u32, u64, slots, SLOTS, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct target, backends, BACKENDS, 0);
/* What a socket asked for, by its cookie and the backend it was given: evicted when long unused,
 * not deleted when a socket closes, because a proxy may ask after that. */
BPF_F_TABLE("lru_hash", struct origin_key, struct target, origins, ORIGINS, 0);
/* Which backend a client of a frontend had last: valid while it is a member, and used lately. */
BPF_F_TABLE("lru_hash", struct affinity_key, struct affinity, affinities, AFFINITIES, 0);
BPF_F_TABLE("hash", struct member, u32, members, MEMBERS, BPF_F_NO_PREALLOC);
/* By reason, see bpf/reasons.py. */
BPF_F_TABLE("percpu_array", u32, u64, counters, REASONS, 0);

#endif
