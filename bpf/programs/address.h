/* Between the hooks' context and struct target. */
#ifndef WEFT_ADDRESS_H
#define WEFT_ADDRESS_H

#include <linux/in.h>
#include "types.h"

#define MAPPED_PREFIX __builtin_bswap32(0xffff)

/* Comparisons are of all words at once: the verifier would go on with what it has learnt of each, once
 * for every way there is to differ. */
static __always_inline int is_ipv4(const struct target *target)
{
	return !(target->address[0] | target->address[1] | (target->address[2] ^ MAPPED_PREFIX));
}

static __always_inline int is_loopback(const struct target *target)
{
	if (is_ipv4(target))
		return (target->address[3] & __builtin_bswap32(0xff000000)) ==
		       __builtin_bswap32(0x7f000000);
	return !(target->address[0] | target->address[1] | target->address[2] |
		 (target->address[3] ^ __builtin_bswap32(1)));
}

/* Linux takes it for the own loopback address where it is a destination. */
static __always_inline int is_unspecified(const struct target *target)
{
	return !(target->address[0] | target->address[1] | target->address[3]) &&
	       (!target->address[2] || target->address[2] == MAPPED_PREFIX);
}

static __always_inline int same_address(const struct target *end, const struct address *address)
{
	return !((end->address[0] ^ address->words[0]) | (end->address[1] ^ address->words[1]) |
		 (end->address[2] ^ address->words[2]) | (end->address[3] ^ address->words[3]));
}

static __always_inline int same_target(const struct target *one, const struct target *other)
{
	return !((one->address[0] ^ other->address[0]) | (one->address[1] ^ other->address[1]) |
		 (one->address[2] ^ other->address[2]) | (one->address[3] ^ other->address[3]) |
		 (one->port ^ other->port) | (one->protocol ^ other->protocol));
}

/* An address as a key of a trie. */
static __always_inline struct prefix whole(const u32 *address)
{
	return (struct prefix){
		.bits = 128,
		.address = {{address[0], address[1], address[2], address[3]}},
	};
}

/* Stream sockets of MPTCP and others have numbers that do not fit; they match no frontend. */
static __always_inline u8 protocol_of(const struct bpf_sock_addr *ctx)
{
	return ctx->protocol < 256 ? ctx->protocol : 0;
}

static __always_inline void read4(const struct bpf_sock_addr *ctx, struct target *target)
{
	*target = (struct target){
		.address = {0, 0, MAPPED_PREFIX, ctx->user_ip4},
		.port = ctx->user_port,
		.protocol = protocol_of(ctx),
	};
}

static __always_inline void read6(const struct bpf_sock_addr *ctx, struct target *target)
{
	*target = (struct target){
		.address = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]},
		.port = ctx->user_port,
		.protocol = protocol_of(ctx),
	};
}

static __always_inline void write4(struct bpf_sock_addr *ctx, const struct target *target)
{
	ctx->user_ip4 = target->address[3];
	ctx->user_port = target->port;
}

static __always_inline void write6(struct bpf_sock_addr *ctx, const struct target *target)
{
	ctx->user_ip6[0] = target->address[0];
	ctx->user_ip6[1] = target->address[1];
	ctx->user_ip6[2] = target->address[2];
	ctx->user_ip6[3] = target->address[3];
	ctx->user_port = target->port;
}

#endif
