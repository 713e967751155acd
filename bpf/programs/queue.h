/* How much a workload's socket holds that was not read: asked by the proxy, which runs this with
 * BPF_PROG_RUN on a frame that begins with the socket's cookie. */
#ifndef WEFT_QUEUE_H
#define WEFT_QUEUE_H

#include "maps.h"

#define NOT_THERE -1
/* File, psock, and who looks. */
#define SOCKET_HOLDERS 3

static __always_inline int queued(struct __sk_buff *skb)
{
	u64 *frame = (void *)(long)skb->data, cookie;
	int bytes = NOT_THERE;
	struct bpf_sock *sk;
	void *tcp;

	if ((void *)(frame + 1) > (void *)(long)skb->data_end)
		return NOT_THERE;
	cookie = *frame;
	sk = (void *)workload_sockets.lookup(&cookie);
	if (!sk)
		return NOT_THERE;
	tcp = bpf_skc_to_tcp_sock(sk);
	/* Redirected bytes are charged to sk_rmem_alloc as received ones are. */
	if (tcp)
		bytes = *(int *)(tcp + SK_RMEM_ALLOC);
	bpf_sk_release(sk);
	return bytes;
}

/* Who holds a socket besides its file and its psock: senders whose message is on its way into its
 * queue do (tcp_bpf_send_verdict), from before their program's verdict takes effect until it is there.
 * Pending timers do, too, and do not count; nor does this look-up. */
static __always_inline int held(struct __sk_buff *skb)
{
	u64 *frame = (void *)(long)skb->data, cookie;
	int holders = 0;
	struct bpf_sock *sk;
	void *tcp;

	if ((void *)(frame + 1) > (void *)(long)skb->data_end)
		return NOT_THERE;
	cookie = *frame;
	sk = (void *)workload_sockets.lookup(&cookie);
	if (!sk)
		return NOT_THERE;
	tcp = bpf_skc_to_tcp_sock(sk);
	if (tcp) {
		holders = *(int *)(tcp + SK_REFCNT) - SOCKET_HOLDERS;
		holders -= *(u64 *)(tcp + SK_TIMER) != 0;
		holders -= *(u64 *)(tcp + TCP_RETRANSMIT_TIMER) != 0;
		holders -= *(u64 *)(tcp + TCP_DELACK_TIMER) != 0;
		holders -= *(u8 *)(tcp + TCP_PACING_TIMER) != 0;
		holders -= *(u8 *)(tcp + TCP_COMPRESSED_ACK_TIMER) != 0;
	}
	bpf_sk_release(sk);
	return holders;
}

#endif
