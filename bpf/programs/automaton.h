/* Walks the tables of l7proxy/automaton.py over the bytes of a request head: one source for the
 * kernel (bcc) and for the proxy (the C compiler; l7proxy/native.c).
 *
 * A step has no branch: a row that leads nowhere leads to itself, and what a step finds is written to a
 * log whether it is something or not. Where the verifier does not know an index it is masked: tables
 * never need it. Nor does it follow all rounds of a loop (`may_loop`; here the numbers that it is not
 * to know begin with a zero from the table).
 */
#ifndef WEFT_AUTOMATON_H
#define WEFT_AUTOMATON_H

/* As in l7proxy/automaton_table.py. */
#define AUTOMATON_WORDS (1 << 19)
#define AUTOMATON_HEAD_MAX 8000
#define AUTOMATON_EVENTS 32
#define AUTOMATON_CANDIDATES 256
#define AUTOMATON_DIGITS 9

/* A cell: the row that comes next, whether a field ended, what was found and whether it is
 * something. */
#define AUTOMATON_ROW 0x7ffff
#define AUTOMATON_FIELD_SHIFT 19
#define AUTOMATON_FOUND_SHIFT 20
#define AUTOMATON_FOUND 0x7ff00000
#define AUTOMATON_EVENT_SHIFT 31
#define AUTOMATON_COUNTED (1u << AUTOMATON_EVENT_SHIFT | 1u << AUTOMATON_FIELD_SHIFT)

/* What was found, beside facts: the end of the head; the first digit of Content-Length; where the
 * host begins, and ends. */
enum {
	AUTOMATON_END = 1,
	AUTOMATON_LENGTH = 2,
	AUTOMATON_HOST = 3,
	AUTOMATON_HOST_END = 4,
	AUTOMATON_MARKS = 8, /* a power of two */
};

/* No rule of the list holds. In the proxy's tables 0 is PUNT. */
#define AUTOMATON_NONE 0xffff

/* A table: rows of cells, then what the offsets (in words) are of. Row 0 is the end of everything. */
struct automaton {
	u64 generation;
	u32 start;
	u32 plain; /* rows below stay where they are with bytes 0x20 to 0x7e */
	u32 found; /* offset of struct automaton_found[] */
	u32 lists; /* offset of u32[][paths]: offsets of struct automaton_rule[] */
	u32 paths;
	u32 fields_max;
	u32 head_max;
	u32 pad;
	u64 body_max;
	u64 zero;
	u8 classes[256]; /* a byte's column */
	u32 words[];
};

struct automaton_found {
	u32 what;
	u32 path; /* 0: no path; else its class */
	u64 once; /* in facts[0]: not to be found twice */
	u64 facts[4];
};

/* Ends with one that needs nothing. */
struct automaton_rule {
	u64 need[3]; /* of facts[1] to facts[3] */
	u32 verdict;
	u32 zero;
};

/* In facts[0]: there is a Host field; without a length there would be one on the proxy's way. */
#define AUTOMATON_HOST_SEEN 1
#define AUTOMATON_LENGTH_WANTED 2
/* A longer one matches other patterns (l7proxy/routing.py). */
#define AUTOMATON_HOST_MAX 253

/* What is to become of a head. */
struct judged {
	u32 rule;    /* the route's rule, from 1; 0: the proxy's */
	u32 egress;  /* the policy rules that let it pass, from 1; 0: none was asked */
	u32 ingress;
	u32 size;    /* bytes of the head, the empty line included */
	u64 length;  /* of the body */
};

/* `count` sums what cells have in AUTOMATON_COUNTED: fields below, events above. It begins with a
 * zero from the table: of a number that it does not know the verifier does not see that it grows, and
 * finds what it has seen before. */
struct automaton_walk {
	u32 cell;
	u64 count;
	u32 log[AUTOMATON_EVENTS]; /* what was found, and where */
};

static __always_inline void automaton_step(const struct automaton *automaton, u8 byte,
					   u32 at, struct automaton_walk *walk)
{
	/* A row and a column are below `words`; what is above them in the cell is masked away. */
	u32 cell = automaton->words[(walk->cell + automaton->classes[byte]) & (AUTOMATON_WORDS - 1)];

	walk->log[(walk->count >> AUTOMATON_EVENT_SHIFT) & (AUTOMATON_EVENTS - 1)] =
		(cell & AUTOMATON_FOUND) + at;
	walk->count += cell & AUTOMATON_COUNTED;
	walk->cell = cell;
}

/* Bytes between two looks at the end. */
#define AUTOMATON_CHUNK 8

/* Whether one of eight bytes is outside 0x20 to 0x7e. */
static __always_inline u64 automaton_special(u64 bytes)
{
	return (bytes | (bytes - 0x2020202020202020ull) | (bytes + 0x0101010101010101ull)) &
	       0x8080808080808080ull;
}

static __always_inline void automaton_chunk(const struct automaton *automaton, const u8 *data,
					    u32 at, struct automaton_walk *walk)
{
	u64 row = walk->cell & AUTOMATON_ROW;

	if (row < automaton->plain && !automaton_special(*(const u64 *)data))
		return;
#pragma clang loop unroll(full)
	for (u32 j = 0; j < AUTOMATON_CHUNK; j++)
		automaton_step(automaton, data[j], at + j, walk);
}

/* All bytes but the last few. */
static __always_inline void automaton_chunks(const struct automaton *automaton,
					     const u8 *data, const u8 *end,
					     struct automaton_walk *walk)
{
#pragma clang loop unroll(disable)
	for (u32 i = automaton->zero; i < AUTOMATON_HEAD_MAX && may_loop(); i += 2 * AUTOMATON_CHUNK) {
		const u8 *chunk;

		asm volatile("" : "+r"(i));
		chunk = data + (i & 0x1fff);
		/* One pointer, whose bounds the looks are about. */
		asm volatile("" : "+r"(chunk));
		if (chunk + AUTOMATON_CHUNK > end || !(walk->cell & AUTOMATON_ROW))
			break;
		automaton_chunk(automaton, chunk, i, walk);
		/* Two in a round, whose end costs as much as two bytes. */
		if (chunk + 2 * AUTOMATON_CHUNK > end)
			break;
		automaton_chunk(automaton, chunk + AUTOMATON_CHUNK, i + AUTOMATON_CHUNK, walk);
	}
}

/* The last few, if all before have been read. A program reads `data` and `end` from its context
 * again before this, so that the verifier does not look at them once for each number of chunks. */
static __always_inline void automaton_tail(const struct automaton *automaton,
					   const u8 *data, const u8 *end,
					   struct automaton_walk *walk)
{
	u32 size = (u32)(end - data);
	u32 i = size & (0x1fff & ~(AUTOMATON_CHUNK - 1));

	if (size > AUTOMATON_HEAD_MAX)
		return;
	data += i;
	/* One pointer, whose bounds the looks below are about. */
	asm volatile("" : "+r"(data));
#pragma clang loop unroll(full)
	for (u32 j = 0; j < AUTOMATON_CHUNK - 1; j++) {
		if (data + j + 1 > end)
			break;
		automaton_step(automaton, data[j], i + j, walk);
	}
}

/* What the log says, all of it. `at`: where the marks were found; 0: nowhere. */
struct automaton_facts {
	u64 facts[4];
	u32 path;
	u32 at[AUTOMATON_MARKS];
};

/* 0; -1: the head is not whole, or something is in it twice. */
static __always_inline int automaton_facts(const struct automaton *automaton,
					   const struct automaton_walk *walk,
					   struct automaton_facts *facts)
{
	u64 events = walk->count >> AUTOMATON_EVENT_SHIFT;
	u64 twice = 0;

	/* The next place is written to by whatever follows, a body too: it must not be the first one. */
	if (events >= AUTOMATON_EVENTS)
		return -1;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < AUTOMATON_EVENTS; i++) {
		const struct automaton_found *found;
		u32 entry, offset;

		if (i >= events)
			break;
		asm volatile("" : "+r"(i));
		entry = walk->log[i & (AUTOMATON_EVENTS - 1)];
		offset = automaton->found + (entry >> AUTOMATON_FOUND_SHIFT) * (sizeof(*found) / 4);
		/* A wrong table must not be read beyond. */
		offset &= AUTOMATON_WORDS - 1;
		if (offset > AUTOMATON_WORDS - sizeof(*found) / 4)
			return -1;
		found = (const void *)&automaton->words[offset];
		twice |= facts->facts[0] & found->once;
		facts->facts[0] |= found->facts[0];
		facts->facts[1] |= found->facts[1];
		facts->facts[2] |= found->facts[2];
		facts->facts[3] |= found->facts[3];
		facts->path |= found->path;
		facts->at[found->what & (AUTOMATON_MARKS - 1)] = entry & 0x1fff;
	}
	if (twice || !facts->at[AUTOMATON_END] || !(facts->facts[0] & AUTOMATON_HOST_SEEN) ||
	    (facts->facts[0] & AUTOMATON_LENGTH_WANTED && !facts->at[AUTOMATON_LENGTH]) ||
	    facts->at[AUTOMATON_HOST_END] - facts->at[AUTOMATON_HOST] > AUTOMATON_HOST_MAX ||
	    facts->at[AUTOMATON_END] >= automaton->head_max ||
	    ((walk->count >> AUTOMATON_FIELD_SHIFT) & 0xfff) > automaton->fields_max)
		return -1;
	return 0;
}

/* The verdict of the first rule of a list that holds. */
static __always_inline u32 automaton_verdict(const struct automaton *automaton, u32 list,
					     const struct automaton_facts *facts)
{
	u32 at = automaton->lists + list * automaton->paths + facts->path;
	u32 first = automaton->words[at & (AUTOMATON_WORDS - 1)];

#pragma clang loop unroll(disable)
	for (u32 i = automaton->zero; i < AUTOMATON_CANDIDATES && may_loop(); i++) {
		u32 offset = (first + i * (sizeof(struct automaton_rule) / 4)) & (AUTOMATON_WORDS - 1);
		const struct automaton_rule *rule;

		if (offset > AUTOMATON_WORDS - sizeof(*rule) / 4)
			break;
		rule = (const void *)&automaton->words[offset];
		if (!((rule->need[0] & ~facts->facts[1]) | (rule->need[1] & ~facts->facts[2]) |
		      (rule->need[2] & ~facts->facts[3])))
			return rule->verdict;
	}
	return 0;
}

/* Content-Length, whose first digit the table has found. */
static __always_inline u64 automaton_length(const u8 *data, const u8 *end, u32 at)
{
	u64 length = 0;

	if (!at)
		return 0;
	data += at & 0x1fff;
	asm volatile("" : "+r"(data));
#pragma clang loop unroll(full)
	for (u32 i = 0; i < AUTOMATON_DIGITS; i++) {
		if (data + i + 1 > end || (u8)(data[i] - '0') > 9)
			break;
		length = length * 10 + (u8)(data[i] - '0');
	}
	return length;
}

/* What is to become of a head that was walked. `egress`, `ingress`: which list of policy rules must
 * let it pass as well, 0: none. */
static __always_inline void automaton_decide(const struct automaton *automaton,
					     const struct automaton_facts *facts, u64 length,
					     u32 egress, u32 ingress, struct judged *judged)
{
	u32 rule, first = 0, second = 0;

	if (length > automaton->body_max)
		return;
	rule = automaton_verdict(automaton, 0, facts);
	if (egress)
		first = automaton_verdict(automaton, egress, facts);
	if (ingress)
		second = automaton_verdict(automaton, ingress, facts);
	if (!rule || rule == AUTOMATON_NONE || first == AUTOMATON_NONE || second == AUTOMATON_NONE ||
	    (egress && !first) || (ingress && !second))
		return;
	judged->rule = rule;
	judged->egress = first;
	judged->ingress = second;
	judged->size = facts->at[AUTOMATON_END] + 1;
	judged->length = length;
}

#endif
