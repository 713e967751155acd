/* judge.h as the kernel runs it: what a test sends on a socket is judged. (It is passed: once one
 * message is dropped the kernel asks for no other of that socket.) */
#pragma clang diagnostic ignored "-Wunused-function"

#include <uapi/linux/bpf.h>
#include <linux/types.h>
#include "judge.h"

struct question {
	u64 generation;
	u32 egress;
	u32 ingress;
};

BPF_SOCKHASH(senders, u32, 4);
BPF_TABLE("array", u32, struct question, questions, 1);
BPF_TABLE("array", u32, struct judged, verdicts, 1);

int judge_message(struct sk_msg_md *message)
{
	struct judged judged, *verdict;
	struct question *question;
	u32 zero = 0;

	question = questions.lookup(&zero);
	verdict = verdicts.lookup(&zero);
	if (!question || !verdict || bpf_msg_pull_data(message, 0, message->size, 0))
		return SK_PASS;
	judge_head(message, question->generation, question->egress, question->ingress, &judged);
	*verdict = judged;
	return SK_PASS;
}
