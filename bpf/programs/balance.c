/* Socket-level load balancing: the hooks of a cgroup; HOOKS in bpf/loader.py attaches them. */
#include "steer.h"

/* What the hook answers: go on, or fail the system call with the errno. */
static __always_inline int verdict(int result)
{
	if (result >= 0)
		return 1;
	bpf_set_retval(result);
	return 0;
}

int connect4(struct bpf_sock_addr *ctx)
{
	return verdict(steer4(ctx, CONNECT));
}

int connect6(struct bpf_sock_addr *ctx)
{
	return verdict(steer6(ctx, CONNECT));
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	return verdict(steer4(ctx, SENDMSG));
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	return verdict(steer6(ctx, SENDMSG));
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
