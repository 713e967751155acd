/* judge.h under BPF_PROG_TEST_RUN, which sk_msg programs do not have: the head is behind 16 bytes. */
#pragma clang diagnostic ignored "-Wunused-function"

#include <uapi/linux/bpf.h>
#include <linux/types.h>
#define JUDGE_CONTEXT struct __sk_buff
#define JUDGE_SKIPPED 16
#include "judge.h"

BPF_TABLE("array", u32, struct judged, verdicts, 1);
BPF_TABLE("array", u32, u64, generations, 1);

int judge_packet(struct __sk_buff *skb)
{
	struct judged judged, *verdict;
	u64 *generation;
	u32 zero = 0;

	verdict = verdicts.lookup(&zero);
	generation = generations.lookup(&zero);
	if (!verdict || !generation || bpf_skb_pull_data(skb, skb->len))
		return -1;
	judge_head(skb, *generation, 0, 0, &judged);
	*verdict = judged;
	return 0;
}
