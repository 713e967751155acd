/* The answer to a packet of TCP that is refused: RST, made of the packet itself. */
#ifndef WEFT_RESET_H
#define WEFT_RESET_H

#include <linux/pkt_cls.h>
#include "packet.h"
#include "count.h"

#define TCP_CHECK __builtin_offsetof(struct tcphdr, check)

/* What pods send cannot have a mark: it is lost between network namespaces. */
#define is_reset(skb) ((skb)->mark == RESET_MARK)

static __always_inline u16 folded(s64 sum)
{
	u64 rest = (u32)sum;

	rest = (rest & 0xffff) + (rest >> 16);
	rest = (rest & 0xffff) + (rest >> 16);
	return rest;
}

/* Whether the checksum of TCP is to be made when the packet leaves the machine, and what stands
 * there is that of the pseudo-header (CHECKSUM_PARTIAL): then a change of what follows does not
 * change it. 0, 1, or negative errno. */
static __always_inline int is_partial(struct __sk_buff *skb, u32 at)
{
	u16 before, after;

	if (bpf_skb_load_bytes(skb, at, &before, sizeof(before)) ||
	    bpf_l4_csum_replace(skb, at, 0, __builtin_bswap16(1), sizeof(u16)) ||
	    bpf_skb_load_bytes(skb, at, &after, sizeof(after)))
		return -1;
	return before == after;
}

/* RFC 9293 §3.5.2: believed because it names what the other end expects next. */
static __always_inline void turn_tcp(const struct tcphdr *from, struct tcphdr *to)
{
	u32 next = __builtin_bswap32(__builtin_bswap32(from->seq) + from->syn + from->fin);

	*to = (struct tcphdr){.source = from->dest, .dest = from->source, .doff = 5, .rst = 1};
	if (from->ack) {
		to->seq = from->ack_seq;
	} else {
		to->ack = 1;
		to->ack_seq = next;
	}
}

static __always_inline void turn_ethernet(struct ethhdr *header)
{
	struct ethhdr from = *header;

	__builtin_memcpy(header->h_dest, from.h_source, ETH_ALEN);
	__builtin_memcpy(header->h_source, from.h_dest, ETH_ALEN);
}

static __always_inline u16 tcp_check(const struct tcphdr *tcp, int partial, s64 pseudo)
{
	if (partial)
		return folded(pseudo);
	return ~folded(bpf_csum_diff(0, 0, (u32 *)tcp, sizeof(*tcp), pseudo));
}

static __always_inline int make_reset4(struct __sk_buff *skb)
{
	u32 pseudo[3], at = AFTER_ETHERNET(iphdr);
	struct {
		u16 align;
		struct ethhdr ethernet;
		struct iphdr ip;
		struct tcphdr tcp;
	} out = {};
	struct tcphdr tcp;
	int partial;
	u32 source;

	partial = is_partial(skb, at + TCP_CHECK);
	if (partial < 0 ||
	    bpf_skb_load_bytes(skb, 0, &out.ethernet, AFTER_ETHERNET(iphdr)) ||
	    bpf_skb_load_bytes(skb, at, &tcp, sizeof(tcp)) ||
	    bpf_skb_change_tail(skb, at + sizeof(tcp), 0))
		return 0;
	turn_ethernet(&out.ethernet);
	turn_tcp(&tcp, &out.tcp);
	source = out.ip.saddr;
	out.ip.saddr = out.ip.daddr;
	out.ip.daddr = source;
	out.ip.tos = 0;
	out.ip.tot_len = __builtin_bswap16(sizeof(out.ip) + sizeof(out.tcp));
	out.ip.id = 0;
	out.ip.frag_off = __builtin_bswap16(0x4000);
	out.ip.ttl = 64;
	out.ip.check = 0;
	out.ip.check = ~folded(bpf_csum_diff(0, 0, (u32 *)&out.ip, sizeof(out.ip), 0));
	pseudo[0] = out.ip.saddr;
	pseudo[1] = out.ip.daddr;
	pseudo[2] = __builtin_bswap32(IPPROTO_TCP << 16 | sizeof(out.tcp));
	out.tcp.check = tcp_check(&out.tcp, partial, bpf_csum_diff(0, 0, pseudo, sizeof(pseudo), 0));
	return !bpf_skb_store_bytes(skb, 0, &out.ethernet, at + sizeof(out.tcp),
				    BPF_F_RECOMPUTE_CSUM);
}

static __always_inline int make_reset6(struct __sk_buff *skb)
{
	u32 pseudo[10], at = AFTER_ETHERNET(ipv6hdr);
	struct {
		u16 align;
		struct ethhdr ethernet;
		struct ipv6hdr ip;
		struct tcphdr tcp;
	} out = {};
	struct in6_addr source;
	struct tcphdr tcp;
	int partial;

	partial = is_partial(skb, at + TCP_CHECK);
	if (partial < 0 ||
	    bpf_skb_load_bytes(skb, 0, &out.ethernet, AFTER_ETHERNET(ipv6hdr)) ||
	    bpf_skb_load_bytes(skb, at, &tcp, sizeof(tcp)) ||
	    bpf_skb_change_tail(skb, at + sizeof(tcp), 0))
		return 0;
	turn_ethernet(&out.ethernet);
	turn_tcp(&tcp, &out.tcp);
	source = out.ip.saddr;
	out.ip.saddr = out.ip.daddr;
	out.ip.daddr = source;
	out.ip.payload_len = __builtin_bswap16(sizeof(out.tcp));
	out.ip.hop_limit = 64;
	__builtin_memcpy(pseudo, &out.ip.saddr, 2 * sizeof(out.ip.saddr));
	pseudo[8] = __builtin_bswap32(sizeof(out.tcp));
	pseudo[9] = __builtin_bswap32(IPPROTO_TCP);
	out.tcp.check = tcp_check(&out.tcp, partial, bpf_csum_diff(0, 0, pseudo, sizeof(pseudo), 0));
	return !bpf_skb_store_bytes(skb, 0, &out.ethernet, at + sizeof(out.tcp),
				    BPF_F_RECOMPUTE_CSUM);
}

/* Sends a refused packet back as RST, to where it came from; the action for it. Nothing answers RST,
 * nor what has headers that would have to be turned as well. */
static __always_inline int turn_back(struct __sk_buff *skb, const struct packet *packet,
				     u32 direction)
{
	int made = 0;

	if (packet->tuple.opener.protocol != IPPROTO_TCP || packet->tcp & TCP_RST ||
	    packet->flags & (PACKET_UNREADABLE | PACKET_OPTIONS))
		return TC_ACT_SHOT;
	made = is_ipv4(&packet->tuple.opener) ? make_reset4(skb) : make_reset6(skb);
	if (!made)
		return TC_ACT_SHOT;
	count(REASON_RESET);
	skb->mark = RESET_MARK;
	return bpf_redirect(skb->ifindex, direction == INGRESS ? BPF_F_INGRESS : 0);
}

#endif
