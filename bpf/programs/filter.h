/* The filter on each pod's interface on the node: a pod sends from its own addresses only, and both
 * ends of every packet are known by their identities. Everything else is allowed. */
#ifndef WEFT_FILTER_H
#define WEFT_FILTER_H

#include <linux/errno.h>
#include <linux/icmpv6.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include "address.h"
#include "count.h"

/* Types of ICMPv6 with which a host finds its neighbours (RFC 4861 §4) and says what it listens to
 * (RFC 2710 §3, RFC 3810 §5.2). Not those of routers. */
enum { ND_ROUTER_SOLICIT = 133, ND_SOLICIT = 135, ND_ADVERT = 136 };
enum { MLD_REPORT = 131, MLD_DONE = 132, MLD2_REPORT = 143 };

/* Hop-by-Hop Options of the least length, as all MLD messages have them. */
#define HOP_BY_HOP_SIZE 8

struct ends {
	struct address source;
	struct address destination;
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

static __always_inline int is_mapped(const struct address *address)
{
	return !address->words[0] && !address->words[1] && address->words[2] == MAPPED_PREFIX;
}

/* Whether it is an IP packet, whole as far as its fixed header, which every fragment has. IPv6 has
 * no packets with IPv4-mapped addresses: those here are IPv4's. */
static __always_inline int read_ends(struct __sk_buff *skb, struct ends *ends)
{
	if (skb->protocol == __builtin_bswap16(ETH_P_IP)) {
		struct iphdr *ip = head(skb, ETH_HLEN + sizeof(*ip));

		if (!ip)
			return 0;
		ip = (void *)ip + ETH_HLEN;
		ends->source = (struct address){{0, 0, MAPPED_PREFIX, ip->saddr}};
		ends->destination = (struct address){{0, 0, MAPPED_PREFIX, ip->daddr}};
		return 1;
	}
	if (skb->protocol == __builtin_bswap16(ETH_P_IPV6)) {
		struct ipv6hdr *ip = head(skb, ETH_HLEN + sizeof(*ip));

		if (!ip)
			return 0;
		ip = (void *)ip + ETH_HLEN;
		__builtin_memcpy(&ends->source, &ip->saddr, sizeof(ends->source));
		__builtin_memcpy(&ends->destination, &ip->daddr, sizeof(ends->destination));
		return !is_mapped(&ends->source) && !is_mapped(&ends->destination);
	}
	return 0;
}

static __always_inline int is_unspecified(const struct address *address)
{
	return !address->words[0] && !address->words[1] && !address->words[2] && !address->words[3];
}

static __always_inline int is_link_local(const struct address *address)
{
	return (address->words[0] & __builtin_bswap32(0xffc00000)) ==
	       __builtin_bswap32(0xfe800000);
}

/* Whether a packet is one that IPv6 sends for the link itself, before a host has an address, or
 * from its link-local one: none of them is ever forwarded. */
static __always_inline int keeps_link(struct __sk_buff *skb, const struct address *source)
{
	u8 *start, type;
	u32 at = ETH_HLEN + sizeof(struct ipv6hdr);

	if (!is_unspecified(source) && !is_link_local(source))
		return 0;
	start = head(skb, ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct icmp6hdr));
	if (!start)
		return 0;
	switch (start[ETH_HLEN + __builtin_offsetof(struct ipv6hdr, nexthdr)]) {
	case IPPROTO_ICMPV6:
		type = start[at];
		return type == ND_ROUTER_SOLICIT || type == ND_SOLICIT || type == ND_ADVERT;
	case IPPROTO_HOPOPTS:
		if (start[at] != IPPROTO_ICMPV6 || start[at + 1])
			return 0;
		start = head(skb, ETH_HLEN + sizeof(struct ipv6hdr) + HOP_BY_HOP_SIZE +
					  sizeof(struct icmp6hdr));
		if (!start)
			return 0;
		type = start[at + HOP_BY_HOP_SIZE];
		return type == MLD_REPORT || type == MLD_DONE || type == MLD2_REPORT;
	}
	return 0;
}

/* Whether the address is one of those of the pod behind this interface. */
static __always_inline int is_of_pod(const struct __sk_buff *skb, const struct address *address)
{
	struct address key = *address;
	u32 *interface = interfaces.lookup(&key);

	return interface && *interface == skb->ifindex;
}

/* What policy has to say of a packet: 0 or negative errno. There is none yet. */
static __always_inline int judge(const struct ends *ends)
{
	struct address source = ends->source, destination = ends->destination;
	struct identity *from = identities.lookup(&source);
	struct identity *to = identities.lookup(&destination);

	(void)from;
	(void)to;
	return 0;
}

/* A packet from the pod: 0 or negative errno. */
static __always_inline int filter_from_pod(struct __sk_buff *skb)
{
	struct ends ends = {};

	/* ARP says who has an address on this link of two ends, nothing that reaches beyond it. */
	if (skb->protocol == __builtin_bswap16(ETH_P_ARP)) {
		count(REASON_FILTER_FROM_POD);
		return 0;
	}
	/* Neither does what is no IP go on: IP may be hidden in it, such as in VLAN tags. */
	if (!read_ends(skb, &ends) ||
	    (!is_of_pod(skb, &ends.source) && !keeps_link(skb, &ends.source))) {
		count(REASON_SPOOFED);
		return -EPERM;
	}
	count(REASON_FILTER_FROM_POD);
	return judge(&ends);
}

/* A packet to the pod: 0 or negative errno. */
static __always_inline int filter_to_pod(struct __sk_buff *skb)
{
	struct ends ends = {};

	count(REASON_FILTER_TO_POD);
	return read_ends(skb, &ends) ? judge(&ends) : 0;
}

#endif
