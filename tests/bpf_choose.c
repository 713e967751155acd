/* choose.h under BPF_PROG_TEST_RUN, which sock_addr programs do not have: a packet in, the same
 * packet with the backend written into it out. */
/* It needs a part of the headers only. */
#pragma clang diagnostic ignored "-Wunused-function"

#include "choose.h"

struct question {
	u8 ethernet[14];
	u64 cookie;
	struct target target; /* frontend in, backend out */
} __attribute__((packed));

int choose_for_packet(struct __sk_buff *skb)
{
	struct question *question = (void *)(long)skb->data;
	struct target target = {};
	struct frontend *frontend;
	struct backend backend;
	u32 at, reason;
	int result;

	if ((void *)(question + 1) > (void *)(long)skb->data_end)
		return -1;
	__builtin_memcpy(&target, &question->target, sizeof(target));
	frontend = frontends.lookup(&target);
	if (!frontend)
		return -2;
	at = slot_for(frontend, question->cookie);
	result = table_backend(frontend, &at, &target, &backend, &reason);
	if (!result)
		__builtin_memcpy(&question->target, &backend.target, sizeof(backend.target));
	return result;
}
