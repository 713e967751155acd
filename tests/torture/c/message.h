/* HTTP/1.1 messages whose bodies are streams: what is sent of one, and what is received of one,
 * compared byte by byte. Does no I/O.
 */
#pragma once
#include "stream.h"

#define HEAD_MAX 8192

struct outlet {
	uint64_t key, size, sent;
	size_t piece_max; /* of one chunk, or of what is produced at once */
	bool chunked, ended;
};

/* The next bytes of a body, as far as `until`; `to` has room for piece_max and 32 more. */
static size_t outlet_next(struct outlet *outlet, uint8_t *to, uint64_t until, uint64_t *random)
{
	uint64_t count = 1 + below(random, outlet->piece_max);
	size_t length = 0;

	if (count > until - outlet->sent)
		count = until - outlet->sent;
	if (count && outlet->chunked)
		length = sprintf((char *)to, chance(random, 50) ? "%zx\r\n" : "%03zX;a=b\r\n",
				 (size_t)count);
	stream_copy(outlet->key, outlet->sent, to + length, count);
	length += count;
	if (count && outlet->chunked)
		length += sprintf((char *)to + length, "\r\n");
	outlet->sent += count;
	if (outlet->sent == outlet->size && !outlet->ended) {
		outlet->ended = true;
		if (outlet->chunked)
			length += sprintf((char *)to + length, "0\r\n\r\n");
	}
	return length;
}

struct intake {
	uint64_t key, size, got;
	enum { LENGTH, CHUNKED, UNTIL_END } framing;
	enum { CHUNK_SIZE, CHUNK_EXTENSION, CHUNK_DATA, CHUNK_END, TRAILER } state;
	uint64_t left; /* of the body, or of this chunk */
	unsigned line; /* bytes of this line of the trailer section */
	bool done;
	char wrong[400]; /* why, if it is */
};

/* A received head, copied as a string. */
struct head {
	char text[HEAD_MAX];
};

/* True: a whole head was there, and `used` bytes were its. */
static bool head_take(struct head *head, const uint8_t *data, size_t count, size_t *used)
{
	const uint8_t *end = memmem(data, count, "\r\n\r\n", 4);

	if (!end || end - data + 4 >= HEAD_MAX)
		return false;
	*used = end - data + 4;
	memcpy(head->text, data, *used);
	head->text[*used] = 0;
	return true;
}

/* A field's value, up to its line's end; NULL: none. `name` as in "\nname:". */
static const char *head_field(const struct head *head, const char *name)
{
	const char *found = strcasestr(head->text, name);

	if (!found)
		return NULL;
	found += strlen(name);
	return found + strspn(found, " ");
}

static bool field_is(const char *value, const char *text)
{
	return value && !strncasecmp(value, text, strlen(text));
}

/* Framing by the head (RFC 9112 section 6.3). */
static void intake_begin(struct intake *intake, const struct head *head, bool request)
{
	const char *length = head_field(head, "\ncontent-length:");

	if (field_is(head_field(head, "\ntransfer-encoding:"), "chunked")) {
		intake->framing = CHUNKED;
	} else if (length || request) {
		intake->framing = LENGTH;
		intake->left = length ? strtoull(length, NULL, 10) : 0;
		intake->done = !intake->left;
		if (intake->left != intake->size)
			snprintf(intake->wrong, sizeof(intake->wrong),
				 "its length is %llu instead of %llu",
				 (unsigned long long)intake->left, (unsigned long long)intake->size);
	} else {
		intake->framing = UNTIL_END;
	}
}

static char *hex(char *to, const uint8_t *data, size_t count)
{
	for (size_t i = 0; i < count; i++)
		sprintf(to + 2 * i, "%02x", data[i]);
	return to;
}

static void intake_compare(struct intake *intake, const uint8_t *data, size_t count)
{
	size_t same = intake->got + count <= intake->size
			      ? stream_same(intake->key, intake->got, data, count)
			      : 0;
	uint8_t right[12] = { 0 };
	char got[25] = "", expected[25];
	size_t shown = count - same < 12 ? count - same : 12;

	intake->got += same;
	if (same == count)
		return;
	stream_copy(intake->key, intake->got, right, 12);
	snprintf(intake->wrong, sizeof(intake->wrong),
		 "byte %llu of %llu is wrong: %s instead of %s; these stand at %lld of this stream",
		 (unsigned long long)intake->got, (unsigned long long)intake->size,
		 hex(got, data + same, shown), hex(expected, right, shown),
		 (long long)(shown < 4 ? -1
				       : stream_find(intake->key, intake->size, data + same, shown)));
}

/* Takes bytes of the body, and returns how many were its; `wrong` says if they were not right. */
static size_t intake_take(struct intake *intake, const uint8_t *data, size_t count)
{
	size_t used = 0;

	while (used < count && !intake->done && !*intake->wrong) {
		uint64_t run = count - used;
		uint8_t byte = data[used];

		if (intake->framing != CHUNKED || intake->state == CHUNK_DATA) {
			if (intake->framing != UNTIL_END && run > intake->left)
				run = intake->left;
			intake_compare(intake, data + used, run);
			used += run;
			intake->left -= run;
			if (intake->left == 0) {
				intake->done = intake->framing == LENGTH;
				intake->state = CHUNK_END;
			}
			continue;
		}
		used++;
		switch (intake->state) {
		case CHUNK_SIZE:
			if (byte == '\n') {
				intake->state = intake->left ? CHUNK_DATA : TRAILER;
			} else if (byte == ';') {
				intake->state = CHUNK_EXTENSION;
			} else if (byte != '\r') {
				if (!strchr("0123456789abcdefABCDEF", byte) || !byte)
					snprintf(intake->wrong, sizeof(intake->wrong),
						 "byte %02x in the size of a chunk, after %llu of %llu",
						 byte, (unsigned long long)intake->got,
						 (unsigned long long)intake->size);
				intake->left = intake->left * 16 +
					       (byte <= '9' ? byte - '0' : (byte | 32) - 'a' + 10);
			}
			break;
		case CHUNK_EXTENSION:
			if (byte == '\n')
				intake->state = intake->left ? CHUNK_DATA : TRAILER;
			break;
		case CHUNK_END:
			if (byte == '\n')
				intake->state = CHUNK_SIZE;
			break;
		default:
			if (byte == '\n') {
				intake->done = !intake->line;
				intake->line = 0;
			} else if (byte != '\r') {
				intake->line++;
			}
		}
	}
	if (intake->done && intake->got != intake->size && !*intake->wrong)
		snprintf(intake->wrong, sizeof(intake->wrong), "it ended after %llu of %llu bytes",
			 (unsigned long long)intake->got, (unsigned long long)intake->size);
	return used;
}

/* What a client asks a backend to do, in the request's field "x-plan". */
struct plan {
	unsigned long long id;	     /* of the transfer; 2 id and 2 id + 1 are the keys of its bodies */
	unsigned long long request, response; /* sizes of the bodies */
	unsigned chunked;	     /* the response */
	unsigned at_once;	     /* answer while the request still comes, all but the last byte */
	unsigned end;		     /* enum end */
	unsigned long long end_at;   /* bytes of the response sent, of the request read for EARLY */
	unsigned long long pause_at; /* bytes of the request after which it does not read for */
	unsigned pause_ms;	     /* so long */
	unsigned piece_max;	     /* most that is written at once */
};

enum end {
	KEEP,	/* the connection goes on */
	EARLY,	/* a whole answer before the request was read, then a close as RFC 9112 9.6 wants it */
	ABRUPT, /* the same with a plain close at once */
	RESET,	/* SO_LINGER 0 in the response */
};

#define PLAN_FORMAT "%llu %llu %llu %u %u %u %llu %llu %u %u"
