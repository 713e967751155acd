/* What the proxy has done in C: bpf/programs/automaton.h over request heads, and response heads.
 * l7proxy/native.py calls it. Nothing is allocated, and nothing is read beyond what is given. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <strings.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;
#undef __always_inline
#define __always_inline inline __attribute__((always_inline))
#define may_loop() 1

#include "../bpf/programs/automaton.h"

_Static_assert(sizeof(struct automaton) == 312, "l7proxy/automaton_table.py: _HEADER");
_Static_assert(sizeof(struct automaton_found) == 48, "l7proxy/automaton_table.py: _ENTRY");
_Static_assert(sizeof(struct automaton_rule) == 32, "l7proxy/automaton_table.py: _RULE");

/* `table` is followed by as much memory as the largest takes, since indices are masked, not held
 * against its own size. */
static void judge(const struct automaton *table, const u8 *head, size_t size, u32 egress, u32 ingress,
		  struct automaton_facts *facts, struct judged *judged)
{
	struct automaton_walk walk = {.cell = table->start};

	*facts = (struct automaton_facts){0};
	*judged = (struct judged){0};
	automaton_chunks(table, head, head + size, &walk);
	automaton_tail(table, head, head + size, &walk);
	if (automaton_facts(table, &walk, facts))
		return;
	automaton_decide(table, facts, automaton_length(head, head + size, facts->at[AUTOMATON_LENGTH]), egress,
			 ingress, judged);
}

void weft_judge(const struct automaton *table, const u8 *head, size_t size, u32 egress, u32 ingress,
		struct judged *judged)
{
	struct automaton_facts facts;

	judge(table, head, size, egress, ingress, &facts, judged);
}

/* A part of a head; both 0: it is not there. */
struct part {
	u32 at;
	u32 end;
};

/* A table and lists of policy rules, and what was found of the head that was judged last. */
struct request {
	const struct automaton *table;
	u32 lists[2];
	u32 told; /* backends are told of the client: what it says of that itself is not for here */
	u32 zero;
	u32 egress;
	u32 ingress;
	struct part target;
	struct part host;
	struct part request_id;
	u32 method_end;
	u32 size; /* of the head */
};

static int is_named(const u8 *line, const u8 *colon, const char *name, size_t size)
{
	return (size_t)(colon - line) == size && !strncasecmp((const char *)line, name, size);
}

static struct part stripped(const u8 *data, const u8 *from, const u8 *to)
{
	while (from < to && (*from == ' ' || *from == '\t'))
		from++;
	while (from < to && (to[-1] == ' ' || to[-1] == '\t'))
		to--;
	return (struct part){(u32)(from - data), (u32)(to - data)};
}

/* As l7proxy/forwarding.py, _CLAIMS and what begins with x-forwarded-. */
static int is_claim(const u8 *line, const u8 *colon)
{
	switch (colon - line) {
	case 3:
		return is_named(line, colon, "via", 3);
	case 9:
		return is_named(line, colon, "forwarded", 9) || is_named(line, colon, "x-real-ip", 9);
	case 12:
		if (is_named(line, colon, "x-request-id", 12))
			return 1;
	}
	return colon - line >= 12 && !strncasecmp((const char *)line, "x-forwarded-", 12);
}

/* The rule of a request that is whole, all of `data`; 0: it is for slower eyes. */
u32 weft_request(struct request *request, const u8 *data, size_t size)
{
	const u8 *end, *line, *next, *colon;
	struct automaton_facts facts;
	struct judged judged;

	judge(request->table, data, size, request->lists[0], request->lists[1], &facts, &judged);
	if (!judged.rule || judged.size + judged.length != size)
		return 0;
	request->size = judged.size;
	size = judged.size;
	end = data + size;
	request->egress = judged.egress;
	request->ingress = judged.ingress;
	request->host = (struct part){facts.at[AUTOMATON_HOST], facts.at[AUTOMATON_HOST_END]};
	request->request_id = (struct part){0, 0};
	/* From here on the grammar of the automaton holds. */
	next = memchr(data, ' ', size);
	request->method_end = (u32)(next - data);
	line = memchr(next + 1, ' ', (size_t)(end - next - 1));
	request->target = (struct part){request->method_end + 1, (u32)(line - data)};
	line = (const u8 *)memchr(line, '\n', (size_t)(end - line)) + 1;
	for (; *line != '\r'; line = next + 1) {
		next = memchr(line, '\n', (size_t)(end - line));
		colon = memchr(line, ':', (size_t)(next - line));
		if (request->told && is_claim(line, colon))
			return 0;
		if (is_named(line, colon, "x-request-id", 12) && !request->request_id.end)
			request->request_id = stripped(data, colon + 1, next - 1);
	}
	return judged.rule;
}

/* --- responses -------------------------------------------------------------------------------- */

/* Of a response head. `limits`: bytes of it, fields in it. `left`: bytes of the message behind what
 * was given, negative: so many too many. `drop`: a field that goes no further, its line whole;
 * `dated`: there is a Date. */
struct response {
	u32 limits[2];
	u32 size;
	u32 dated;
	int64_t left;
	struct part drop;
};

/* Bytes of a token, and of text (RFC 9110 §5.6.2, §5.5). */
enum { TOKEN = 1, TEXT = 2 };

static const u8 kinds[256] = {
	['\t'] = TEXT, [0x20 ... 0x7e] = TEXT, [0x80 ... 0xff] = TEXT,
	['0' ... '9'] = TOKEN | TEXT, ['a' ... 'z'] = TOKEN | TEXT, ['A' ... 'Z'] = TOKEN | TEXT,
	['!'] = TOKEN | TEXT, ['#' ... '\''] = TOKEN | TEXT, ['*'] = TOKEN | TEXT, ['+'] = TOKEN | TEXT,
	['-'] = TOKEN | TEXT, ['.'] = TOKEN | TEXT, ['^' ... '`'] = TOKEN | TEXT, ['|'] = TOKEN | TEXT,
	['~'] = TOKEN | TEXT,
};

/* Fields that concern a connection or framing: as l7proxy/normalise.py, HOP_BY_HOP, but for those
 * that are looked at. Trailer, because chunks are not understood here. */
static int is_unusual(const u8 *line, const u8 *colon)
{
	static const char *const names[] = {"transfer-encoding", "upgrade", "te", "trailer", "proxy-connection",
					    "proxy-authenticate", "proxy-authorization",
					    "proxy-authentication-info"};

	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
		if ((*line | 32) == *names[i] && is_named(line, colon, names[i], strlen(names[i])))
			return 1;
	return 0;
}

/* A plain decimal number of at most 15 digits; -1: it is none. */
static int64_t number(const u8 *data, struct part part)
{
	u32 digits = part.end - part.at;
	int64_t result = 0;

	if (!digits || digits > 15 || (digits > 1 && data[part.at] == '0'))
		return -1;
	for (u32 i = part.at; i < part.end; i++) {
		if (data[i] < '0' || data[i] > '9')
			return -1;
		result = result * 10 + (data[i] - '0');
	}
	return result;
}

/* The status of a final response whose head is whole, which keeps its connection and whose length is
 * known; 0: it is for slower eyes. `bodiless`: it answers HEAD. */
u32 weft_response(struct response *response, const u8 *data, size_t size, u32 bodiless)
{
	const u8 *end = data + size, *line, *colon, *at;
	int64_t length = -1;
	u32 status, fields = 0;

	response->dated = 0;
	response->drop = (struct part){0, 0};
	if (size < 15 || memcmp(data, "HTTP/1.1 ", 9))
		return 0;
	for (int i = 9; i < 12; i++)
		if (data[i] < '0' || data[i] > '9')
			return 0;
	status = (data[9] - '0') * 100u + (data[10] - '0') * 10u + (data[11] - '0');
	if (status < 200 || status > 599)
		return 0;
	at = data + 12;
	if (*at == ' ')
		while (at < end && (kinds[*at] & TEXT))
			at++;
	for (;; fields++) {
		struct part value;

		if (end - at < 4 || at[0] != '\r' || at[1] != '\n')
			return 0;
		line = at + 2;
		if (*line == '\r')
			break;
		for (colon = line; colon < end && (kinds[*colon] & TOKEN); colon++)
			;
		if (colon == line || colon == end || *colon != ':')
			return 0;
		for (at = colon + 1; at < end && (kinds[*at] & TEXT); at++)
			;
		if (end - at < 2)
			return 0;
		value = stripped(data, colon + 1, at);
		switch (colon - line) {
		case 4:
			response->dated |= is_named(line, colon, "date", 4);
			break;
		case 10:
			if (is_named(line, colon, "connection", 10) &&
			    !is_named(data + value.at, data + value.end, "keep-alive", 10))
				return 0;
			if (is_named(line, colon, "keep-alive", 10)) {
				if (response->drop.end)
					return 0;
				response->drop = (struct part){(u32)(line - data), (u32)(at - data) + 2};
			}
			break;
		case 14:
			if (!is_named(line, colon, "content-length", 14))
				break;
			if (length >= 0 || (length = number(data, value)) < 0)
				return 0;
			break;
		}
		if (is_unusual(line, colon))
			return 0;
	}
	if (line[1] != '\n')
		return 0;
	response->size = (u32)(line + 2 - data);
	if (response->size > response->limits[0] || fields > response->limits[1])
		return 0;
	if (status == 204 || status == 205) {
		/* Some send a length there, and some believe it. */
		if (status == 205 || length >= 0)
			return 0;
		length = 0;
	} else if (bodiless || status == 304) {
		length = 0;
	} else if (length < 0) {
		return 0;
	}
	response->left = (int64_t)response->size + length - (int64_t)size;
	return status;
}
