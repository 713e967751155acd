/* What a proxy's socket sends: to the workload's socket at the other end, and nowhere else. */
#ifndef WEFT_VERDICT_H
#define WEFT_VERDICT_H

#include "count.h"

/* SK_DROP fails the send with EACCES, and the proxy closes: nothing ever falls back to TCP, where
 * it could overtake, or be overtaken by, what was redirected. */
static __always_inline int redirect(struct sk_msg_md *message)
{
	struct bpf_sock *sk = message->sk;
	struct proxied *own;
	int result;
	u64 peer;

	own = sk ? proxied.sk_storage_get(sk, 0, 0) : 0;
	if (!own || !own->peer) {
		count(REASON_UNPAIRED);
		return SK_DROP;
	}
	peer = own->peer;
	result = workload_sockets.msg_redirect_hash(message, &peer, BPF_F_INGRESS);
	if (result != SK_PASS) {
		count(REASON_REDIRECT_MISSED);
		return SK_DROP;
	}
	count(REASON_REDIRECTED);
	return SK_PASS;
}

#endif
