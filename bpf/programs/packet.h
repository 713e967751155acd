/* What the filter reads of a packet: its ends, as far as they can be told, with ports. */
#ifndef WEFT_PACKET_H
#define WEFT_PACKET_H

#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include "address.h"
#include "verifier.h"

#define AFTER_ETHERNET(header) (ETH_HLEN + sizeof(struct header))

/* Extension headers of IPv6 before the one that has ports. */
#define EXTENSIONS 4

/* RFC 792; of ICMPv6 (RFC 4443) errors are those below the echo. */
enum { ICMP_ECHOREPLY = 0, ICMP_UNREACHABLE = 3, ICMP_ECHO = 8, ICMP_EXCEEDED = 11, ICMP_PARAMETER = 12 };
enum { ICMPV6_ECHO_REQUEST = 128, ICMPV6_ECHO_REPLY = 129 };

/* RFC 791 §3.1: the most bytes of options; types of them. */
enum { IPV4_OPTIONS = 40, LOOSE_ROUTE = 131, STRICT_ROUTE = 137 };

/* RFC 9293 §3.1. */
enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16 };

enum {
	/* There is no telling its ports, or where it goes: a fragment that is not the first, cut off,
	 * too deep, with a source route. */
	PACKET_UNREADABLE = 1,
	/* Nothing answers it, or it belongs to what another packet has opened. */
	PACKET_OPENS_NOTHING = 2,
	/* It opens a connection, and answers nothing. */
	PACKET_SYN = 4,
	/* ICMP's, about another packet. */
	PACKET_ERROR = 8,
	/* Headers between IP's fixed one and the next. */
	PACKET_OPTIONS = 16,
	PACKET_FRAGMENT = 32,
	/* One that is not the first. */
	PACKET_LATER = 64,
};

struct packet {
	struct tuple tuple; /* the sender as opener; ports of ICMP echoes as in struct flow_key */
	u32 at;		    /* where the header after those of IP begins */
	u32 id;		    /* of a fragment */
	u16 port;	    /* what rules name: the destination's, or the type of ICMP */
	u8 tcp;		    /* TCP's flags */
	u8 flags;	    /* PACKET_… */
};

/* The first `size` bytes of a packet, or null if it has fewer. */
static __always_inline void *head(struct __sk_buff *skb, u32 size)
{
	void *start = (void *)(long)skb->data;

	if (start + size <= (void *)(long)skb->data_end)
		return start;
	/* They may lie in a page that is not mapped into the packet's linear part. */
	if (bpf_skb_pull_data(skb, size))
		return 0;
	start = (void *)(long)skb->data;
	return start + size <= (void *)(long)skb->data_end ? start : 0;
}

/* IPv6 has no packets with IPv4-mapped addresses: those here are IPv4's. */
static __always_inline int read_ipv6(struct __sk_buff *skb, struct packet *packet)
{
	u8 next, extension[8] __attribute__((aligned(4)));
	struct ipv6hdr *ip;

	ip = head(skb, ETH_HLEN + sizeof(*ip));
	if (!ip)
		return 0;
	ip = (void *)ip + ETH_HLEN;
	__builtin_memcpy(packet->tuple.opener.address, &ip->saddr, sizeof(ip->saddr));
	__builtin_memcpy(packet->tuple.peer.address, &ip->daddr, sizeof(ip->daddr));
	if (is_ipv4(&packet->tuple.opener) || is_ipv4(&packet->tuple.peer))
		return 0;
	next = ip->nexthdr;
	packet->at = ETH_HLEN + sizeof(*ip);
#pragma clang loop unroll(full)
	for (int i = 0; i <= EXTENSIONS; i++) {
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING &&
		    next != IPPROTO_DSTOPTS && next != IPPROTO_FRAGMENT)
			break;
		packet->flags |= PACKET_OPTIONS;
		if (i == EXTENSIONS ||
		    bpf_skb_load_bytes(skb, packet->at, extension, sizeof(extension))) {
			packet->flags |= PACKET_UNREADABLE;
			break;
		}
		if (next == IPPROTO_FRAGMENT) {
			packet->flags |= PACKET_FRAGMENT;
			packet->id = *(u32 *)(extension + 4);
			packet->at += 8;
			/* An offset: only the first one has the next header. */
			if (extension[2] || extension[3] & 0xf8) {
				packet->flags |= PACKET_LATER | PACKET_UNREADABLE;
				next = extension[0];
				break;
			}
		} else {
			/* Segments left: it goes on elsewhere from where it is sent to. */
			if (next == IPPROTO_ROUTING && extension[3])
				packet->flags |= PACKET_UNREADABLE;
			packet->at += (extension[1] + 1) * 8;
		}
		next = extension[0];
	}
	packet->tuple.opener.protocol = next;
	return 1;
}

/* Nonzero if a byte of a word is this one. */
static __always_inline u32 has_byte(u32 word, u8 byte)
{
	u32 zero = word ^ byte * 0x01010101U;

	return (zero - 0x01010101U) & ~zero & 0x80808080U;
}

/* Whether IPv4 options may say that the packet goes on elsewhere from where it is sent to (RFC 791
 * §3.1, loose and strict source route). Any byte that could be the type of such an option counts. */
static __always_inline int may_go_on(struct __sk_buff *skb, u32 size)
{
	u32 found = 0, word;

#pragma clang loop unroll(disable)
	for (u32 at = 0; at < IPV4_OPTIONS && at < size; at += sizeof(word)) {
		if (bpf_skb_load_bytes(skb, AFTER_ETHERNET(iphdr) + at, &word, sizeof(word)))
			return 1;
		found |= has_byte(word, LOOSE_ROUTE) | has_byte(word, STRICT_ROUTE);
	}
	return !!forgotten(found, skb->len);
}

static __always_inline int read_ipv4(struct __sk_buff *skb, struct packet *packet)
{
	struct iphdr *ip;

	ip = head(skb, ETH_HLEN + sizeof(*ip));
	if (!ip)
		return 0;
	ip = (void *)ip + ETH_HLEN;
	packet->tuple.opener.address[2] = MAPPED_PREFIX;
	packet->tuple.opener.address[3] = ip->saddr;
	packet->tuple.peer.address[2] = MAPPED_PREFIX;
	packet->tuple.peer.address[3] = ip->daddr;
	packet->tuple.opener.protocol = ip->protocol;
	packet->at = ETH_HLEN + ip->ihl * 4;
	if (ip->frag_off & __builtin_bswap16(0x3fff)) {
		packet->flags |= PACKET_FRAGMENT;
		packet->id = ip->id;
	}
	if (ip->frag_off & __builtin_bswap16(0x1fff))
		packet->flags |= PACKET_LATER | PACKET_UNREADABLE;
	if (ip->ihl != 5) {
		packet->flags |= PACKET_OPTIONS;
		if (may_go_on(skb, packet->at - AFTER_ETHERNET(iphdr)))
			packet->flags |= PACKET_UNREADABLE;
	}
	return 1;
}

static __always_inline void read_icmp(struct packet *packet, u8 type, u16 id, u8 request, u8 reply)
{
	u16 as_port = __builtin_bswap16(type);

	packet->port = as_port;
	packet->flags |= PACKET_OPENS_NOTHING;
	if (type == request) {
		packet->tuple.opener.port = id;
		packet->tuple.peer.port = as_port;
		packet->flags &= ~PACKET_OPENS_NOTHING;
	} else if (type == reply) {
		packet->tuple.opener.port = __builtin_bswap16(request);
		packet->tuple.peer.port = id;
	}
}

/* Ports, and what they mean; `packet->at` is known. */
static __always_inline void read_ports(struct __sk_buff *skb, struct packet *packet)
{
	u8 protocol = packet->tuple.opener.protocol;
	u8 start[14];

	packet->tuple.peer.protocol = protocol;
	if (packet->flags & PACKET_UNREADABLE)
		return;
	switch (protocol) {
	case IPPROTO_TCP:
		if (bpf_skb_load_bytes(skb, packet->at, start, 14))
			goto unreadable;
		packet->tcp = start[13];
		if ((packet->tcp & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN)
			packet->flags |= PACKET_SYN;
		else
			packet->flags |= PACKET_OPENS_NOTHING;
		break;
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		if (bpf_skb_load_bytes(skb, packet->at, start, 4))
			goto unreadable;
		break;
	case IPPROTO_ICMP:
		if (bpf_skb_load_bytes(skb, packet->at, start, 8))
			goto unreadable;
		read_icmp(packet, start[0], *(u16 *)(start + 4), ICMP_ECHO, ICMP_ECHOREPLY);
		if (start[0] == ICMP_UNREACHABLE || start[0] == ICMP_EXCEEDED ||
		    start[0] == ICMP_PARAMETER)
			packet->flags |= PACKET_ERROR;
		return;
	case IPPROTO_ICMPV6:
		if (bpf_skb_load_bytes(skb, packet->at, start, 8))
			goto unreadable;
		read_icmp(packet, start[0], *(u16 *)(start + 4), ICMPV6_ECHO_REQUEST,
			  ICMPV6_ECHO_REPLY);
		if (start[0] < ICMPV6_ECHO_REQUEST)
			packet->flags |= PACKET_ERROR;
		return;
	default:
		return;
	}
	packet->tuple.opener.port = *(u16 *)start;
	packet->tuple.peer.port = *(u16 *)(start + 2);
	packet->port = packet->tuple.peer.port;
	return;
unreadable:
	packet->flags |= PACKET_UNREADABLE;
}

static __always_inline int is_ip(const struct __sk_buff *skb)
{
	return skb->protocol == __builtin_bswap16(ETH_P_IP) ||
	       skb->protocol == __builtin_bswap16(ETH_P_IPV6);
}

/* Whether it is an IP packet, whole as far as its fixed header, which every fragment has. */
static __always_inline int read_packet(struct __sk_buff *skb, struct packet *packet)
{
	int read = 0;

	if (skb->protocol == __builtin_bswap16(ETH_P_IP))
		read = read_ipv4(skb, packet);
	else if (skb->protocol == __builtin_bswap16(ETH_P_IPV6))
		read = read_ipv6(skb, packet);
	if (!read)
		return 0;
	read_ports(skb, packet);
	for (int i = 0; i < 3; i++) {
		packet->tuple.opener.address[i] = forgotten(packet->tuple.opener.address[i], skb->len);
		packet->tuple.peer.address[i] = forgotten(packet->tuple.peer.address[i], skb->len);
	}
	packet->flags = forgotten(packet->flags, skb->len);
	packet->tcp = forgotten(packet->tcp, skb->len);
	return 1;
}

/* Of the packet that an error of ICMP is about, which its receiver has sent: the tuple that the
 * answer to it would have, as the error goes the same way. 0: there is no telling. Only what a flow
 * can be known for: TCP, UDP and SCTP without options between, as nearly everything is. */
static __always_inline int read_inner(struct __sk_buff *skb, const struct packet *packet,
				      struct tuple *tuple)
{
	u32 at = packet->at + 8;
	u32 words[10];
	u16 ports[2];
	u8 protocol;

	if (packet->tuple.opener.protocol == IPPROTO_ICMP) {
		if (bpf_skb_load_bytes(skb, at, words, sizeof(struct iphdr)))
			return 0;
		/* The version and five words of header. */
		if (*(u8 *)words != 0x45)
			return 0;
		protocol = ((u8 *)words)[9];
		at += sizeof(struct iphdr);
		tuple->opener = (struct target){.address = {0, 0, MAPPED_PREFIX, words[4]}};
		tuple->peer = (struct target){.address = {0, 0, MAPPED_PREFIX, words[3]}};
	} else {
		if (bpf_skb_load_bytes(skb, at, words, sizeof(struct ipv6hdr)))
			return 0;
		protocol = ((u8 *)words)[6];
		at += sizeof(struct ipv6hdr);
		tuple->opener = (struct target){.address = {words[6], words[7], words[8], words[9]}};
		tuple->peer = (struct target){.address = {words[2], words[3], words[4], words[5]}};
	}
	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP && protocol != IPPROTO_SCTP)
		return 0;
	if (bpf_skb_load_bytes(skb, at, ports, sizeof(ports)))
		return 0;
	tuple->opener.port = ports[1];
	tuple->peer.port = ports[0];
	tuple->opener.protocol = tuple->peer.protocol = protocol;
	/* Whoever gets the error must be who sent what it is about. */
	return tuple->peer.address[0] == packet->tuple.peer.address[0] &&
	       tuple->peer.address[1] == packet->tuple.peer.address[1] &&
	       tuple->peer.address[2] == packet->tuple.peer.address[2] &&
	       tuple->peer.address[3] == packet->tuple.peer.address[3];
}

#endif
