/* Whether a message begins a response that may pass by the proxy: a walk over the tables of
 * bpf/response.py, which say what that is. */
#ifndef WEFT_RESPONSE_H
#define WEFT_RESPONSE_H

#include "maps.h"
#include "verifier.h"

/* Bytes at once between two looks at the end. */
#define RESPONSE_CHUNK 8

struct response {
	u32 state;
	u32 size;   /* of the head, as far as it was read */
	u32 length; /* Content-Length; none: 0 */
	u32 status;
};

/* Without branches, as the verifier follows each of them in each step. */
static __always_inline void response_step(const u16 *table, u8 byte, struct response *response)
{
	u16 cell = table[(response->state & (RESPONSE_STATES - 1)) << 8 | byte];
	u32 digit = cell >> RESPONSE_DIGIT & 1;

	response->length += digit * (9 * response->length + (byte - '0'));
	response->size += cell >> RESPONSE_ALIVE & 1;
	response->state = cell & (RESPONSE_STATES - 1);
}

/* A message that begins with the whole head of a response; other than 0: it is the proxy's.
 * `response->state` is RESPONSE_START. */
static __always_inline int read_response(struct sk_msg_md *message, struct response *response)
{
	const u8 *data, *end, *chunk;
	u32 zero = 0, any = message->size, i, j;
	const u16 *table;

	table = (void *)responses.lookup(&zero);
	if (!table)
		return -1;
	data = (void *)(long)message->data;
	end = (void *)(long)message->data_end;
#pragma clang loop unroll(disable)
	for (i = 0; i < RESPONSE_HEAD_MAX && may_loop(); i += RESPONSE_CHUNK) {
		i = forgotten(i, any);
		chunk = data + (i & (RESPONSE_HEAD_MAX - 1));
		/* One pointer, whose bounds this look is about. */
		asm volatile("" : "+r"(chunk));
		if (chunk + RESPONSE_CHUNK > end)
			break;
#pragma clang loop unroll(full)
		for (j = 0; j < RESPONSE_CHUNK; j++)
			response_step(table, chunk[j], response);
		/* It may grow no further than in the round before. */
		response->size = forgotten(response->size, any);
		if (response->state == RESPONSE_DONE)
			break;
	}
	data = (void *)(long)message->data;
	end = (void *)(long)message->data_end;
	i = (u32)(end - data);
	if (response->state != RESPONSE_DONE && i > RESPONSE_HEAD_MAX)
		return -1;
	/* The last few; if the head has ended they change nothing. */
	i &= 2 * RESPONSE_HEAD_MAX - RESPONSE_CHUNK;
	data += i;
	asm volatile("" : "+r"(data));
#pragma clang loop unroll(full)
	for (j = 0; j < RESPONSE_CHUNK - 1; j++) {
		if (data + j + 1 > end)
			break;
		response_step(table, data[j], response);
	}
	if (response->state != RESPONSE_DONE)
		return -1;
	data = (void *)(long)message->data;
	end = (void *)(long)message->data_end;
	if (data + sizeof("HTTP/1.1 200") > end)
		return -1;
	response->status = (data[9] - '0') * 100 + (data[10] - '0') * 10 + (data[11] - '0');
	return 0;
}

#endif
