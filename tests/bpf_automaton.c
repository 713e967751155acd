/* judge.h under BPF_PROG_TEST_RUN, which sk_msg programs do not have: a packet of generation, lists
 * and a head in, what was judged in its first bytes out. */
#pragma clang diagnostic ignored "-Wunused-function"

#include <uapi/linux/bpf.h>
#include <linux/types.h>

struct question {
	u8 ethernet[16];
	u64 generation;
	u32 egress;
	u32 ingress;
};
#define JUDGE_CONTEXT struct __sk_buff
#define JUDGE_SKIPPED sizeof(struct question)
#include "judge.h"

BPF_TABLE("array", int, struct judged, verdicts, 1);

int judge_packet(struct __sk_buff *skb)
{
	struct question *question;
	struct judged judged, *verdict;
	int zero = 0;

	if (bpf_skb_pull_data(skb, skb->len))
		return -2;
	question = (void *)(long)skb->data;
	if ((void *)(question + 1) > (void *)(long)skb->data_end)
		return -1;
	judge_head(skb, question->generation, question->egress, question->ingress, &judged);
	verdict = verdicts.lookup(&zero);
	if (!verdict)
		return -3;
	*verdict = judged;
	return 0;
}
