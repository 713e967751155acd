/* Ends and tuples of TCP sockets, as sockops sees them. */
#ifndef WEFT_SOCKET_H
#define WEFT_SOCKET_H

#include "address.h"
#include "verifier.h"

#define AF_INET 2

static __always_inline void local_end(struct bpf_sock_ops *ctx, struct target *end)
{
	*end = (struct target){.protocol = IPPROTO_TCP};
	end->port = __builtin_bswap16((u16)ctx->local_port);
	if (ctx->family == AF_INET) {
		end->address[2] = MAPPED_PREFIX;
		end->address[3] = kept_apart(ctx->local_ip4);
	} else {
		end->address[0] = ctx->local_ip6[0];
		end->address[1] = ctx->local_ip6[1];
		end->address[2] = ctx->local_ip6[2];
		end->address[3] = ctx->local_ip6[3];
	}
}

static __always_inline void remote_end(struct bpf_sock_ops *ctx, struct target *end)
{
	*end = (struct target){.protocol = IPPROTO_TCP};
	/* In network order, in the upper half (sock_ops_convert_ctx_access, little endian). */
	end->port = ctx->remote_port >> 16;
	if (ctx->family == AF_INET) {
		end->address[2] = MAPPED_PREFIX;
		end->address[3] = kept_apart(ctx->remote_ip4);
	} else {
		end->address[0] = ctx->remote_ip6[0];
		end->address[1] = ctx->remote_ip6[1];
		end->address[2] = ctx->remote_ip6[2];
		end->address[3] = ctx->remote_ip6[3];
	}
}

/* Of a connection that this socket opened. */
static __always_inline void opened(struct bpf_sock_ops *ctx, struct tuple *tuple)
{
	local_end(ctx, &tuple->opener);
	remote_end(ctx, &tuple->peer);
}

/* Of a connection that this socket was accepted for. */
static __always_inline void taken(struct bpf_sock_ops *ctx, struct tuple *tuple)
{
	remote_end(ctx, &tuple->opener);
	local_end(ctx, &tuple->peer);
}

#endif
