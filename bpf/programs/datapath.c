/* All programs of the data path; PROGRAMS in bpf/programs.py says what each is and where it goes. */
#include "enrol.h"
#include "filter.h"
#include "pair.h"
#include "judge.h"
#include "queue.h"
#include "steer.h"
#include "verdict.h"

/* What a hook of the address family answers: go on, or fail the system call with the errno. */
static __always_inline int answer(int result)
{
	if (result >= 0)
		return 1;
	bpf_set_retval(result);
	return 0;
}

int connect4(struct bpf_sock_addr *ctx)
{
	return answer(steer4(ctx, CONNECT));
}

int connect6(struct bpf_sock_addr *ctx)
{
	return answer(steer6(ctx, CONNECT));
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	return answer(steer4(ctx, SENDMSG));
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	return answer(steer6(ctx, SENDMSG));
}

int recvmsg4(struct bpf_sock_addr *ctx)
{
	answer4(ctx);
	return 1;
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	answer6(ctx);
	return 1;
}

int getpeername4(struct bpf_sock_addr *ctx)
{
	answer4(ctx);
	return 1;
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	answer6(ctx);
	return 1;
}

/* Sockets of workloads. */
int workloads(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		announce_workload(ctx);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		establish_workload(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		take_proxy(ctx);
		break;
	}
	return 1;
}

/* Sockets of the proxy. */
int proxies(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		announce_proxy(ctx);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		establish_proxy(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		take_client(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ctx->args[1] == BPF_TCP_CLOSE)
			forget_outgoing(ctx);
		break;
	}
	return 1;
}

int verdict(struct sk_msg_md *message)
{
	return redirect(message);
}

int exchange(struct sk_msg_md *message)
{
	return exchange_message(message);
}

int queue(struct __sk_buff *skb)
{
	return queued(skb);
}

int holders(struct __sk_buff *skb)
{
	return held(skb);
}

/* What they do not drop, others at the interface may. */
int pod_egress(struct __sk_buff *skb)
{
	return filter_from_pod(skb);
}

int pod_ingress(struct __sk_buff *skb)
{
	return filter_to_pod(skb);
}
