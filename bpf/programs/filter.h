/* The filter on each pod's interface on the node: a pod sends from its own addresses only; what
 * comes to one that takes nothing but mutual TLS comes from this node, from pods only if both are
 * proven; and policy is kept.
 *
 * A packet that the node's own stack made has come in by no interface: the proxy's, a probe's. Its
 * senders are trusted with all pods, and the proxy has judged what it passes on. A packet of a pod
 * of this node came in by that pod's interface, where its source was looked at. Nothing that comes
 * from elsewhere can have either. */
#ifndef WEFT_FILTER_H
#define WEFT_FILTER_H

#include "conntrack.h"
#include "report.h"
#include "reset.h"

/* Types of ICMPv6 with which a host finds its neighbours (RFC 4861 §4) and says what it listens to
 * (RFC 2710 §3, RFC 3810 §5.2). Not those of routers. */
enum { ND_ROUTER_SOLICIT = 133, ND_SOLICIT = 135, ND_ADVERT = 136 };
enum { MLD_REPORT = 131, MLD_DONE = 132, MLD2_REPORT = 143 };

/* Where the address is that a neighbour advertisement is about, and the sender's in ARP; its size. */
enum { ND_TARGET = 8, ARP_SENDER = 14, ARP_SIZE = 28 };

/* Hop-by-Hop Options of the least length, as all MLD messages have them. */
#define HOP_BY_HOP_SIZE 8

static __always_inline int is_link_local(const struct target *end)
{
	return (end->address[0] & __builtin_bswap32(0xffc00000)) == __builtin_bswap32(0xfe800000);
}

/* Addresses of which nothing is ever forwarded. */
static __always_inline int is_on_link(const struct target *end)
{
	return is_link_local(end) || (end->address[0] & __builtin_bswap32(0xff0f0000)) ==
					     __builtin_bswap32(0xff020000);
}

/* Whether a packet is one that IPv6 sends for the link itself. */
static __always_inline int keeps_link(const struct packet *packet)
{
	u32 beyond = packet->at - AFTER_ETHERNET(ipv6hdr);

	if (packet->tuple.opener.protocol != IPPROTO_ICMPV6 || packet->flags & PACKET_UNREADABLE)
		return 0;
	switch (__builtin_bswap16(packet->port)) {
	case ND_ROUTER_SOLICIT:
	case ND_SOLICIT:
	case ND_ADVERT:
		return !beyond;
	case MLD_REPORT:
	case MLD_DONE:
	case MLD2_REPORT:
		return beyond == HOP_BY_HOP_SIZE;
	}
	return 0;
}

/* The interface of the local pod that has this address; 0: none. */
static __always_inline u32 interface_of(const struct target *end)
{
	struct address key = {};
	u32 *interface;

	__builtin_memcpy(key.words, end->address, sizeof(key.words));
	interface = interfaces.lookup(&key);
	return interface ? *interface : 0;
}

/* Whether who ARP says to have an address is the pod, or nobody while it asks whether one is free
 * (RFC 826, RFC 5227 §2.1.1). On a bridge others would believe it. */
static __always_inline int is_own_arp(struct __sk_buff *skb)
{
	struct target sender = {};
	u8 *at = head(skb, ETH_HLEN + ARP_SIZE);

	/* Of IPv4 on Ethernet. */
	if (!at || *(u32 *)(at + ETH_HLEN) != __builtin_bswap32(0x00010800) ||
	    *(u16 *)(at + ETH_HLEN + 4) != __builtin_bswap16(0x0604))
		return 0;
	sender.address[2] = MAPPED_PREFIX;
	__builtin_memcpy(&sender.address[3], at + ETH_HLEN + ARP_SENDER, sizeof(u32));
	return !sender.address[3] || interface_of(&sender) == skb->ifindex;
}

/* Whether a packet tells neighbours where somebody else's address is (RFC 4861 §4.4). */
static __always_inline int misleads(struct __sk_buff *skb, const struct packet *packet)
{
	struct target told = {};

	if (packet->tuple.opener.protocol != IPPROTO_ICMPV6 ||
	    packet->port != __builtin_bswap16(ND_ADVERT) || packet->flags & PACKET_UNREADABLE)
		return 0;
	if (bpf_skb_load_bytes(skb, packet->at + ND_TARGET, told.address, sizeof(told.address)))
		return 1;
	return !is_link_local(&told) && interface_of(&told) != skb->ifindex;
}

/* Where this node's proxy takes connections, which it judges itself. */
static __always_inline int is_proxy(const struct target *end)
{
	u32 zero = 0;
	struct config *at = config.lookup(&zero);

	return at && (same_target(end, &at->http4) || same_target(end, &at->http6) ||
		      same_target(end, &at->relay4) || same_target(end, &at->relay6));
}

/* Whether a pod takes nothing but mutual TLS at one of its ports. There is none for ICMP. */
static __always_inline int is_strict(const struct party *pod, const struct target *end)
{
	struct target key = *end;
	u32 *strict;

	if (end->protocol == IPPROTO_ICMP || end->protocol == IPPROTO_ICMPV6)
		return 0;
	if (pod->flags & POD_MTLS_PORTS) {
		key.protocol = 0;
		strict = mtls_ports.lookup(&key);
		if (strict)
			return *strict;
	}
	return pod->flags & POD_STRICT;
}

/* What is to be known of a flow to judge it. `port` is what rules name. */
struct question {
	u64 now;
	struct flow_key flow;
	u32 flags; /* FLOW_FROM_… */
	u32 port;
	u32 unreadable;
	u64 until; /* out: for how long it holds; 0: for ever */
	u32 rule;  /* out: as in struct policy */
	u32 zero;
};
FUNCTION(refusal, struct question);

/* Why a flow is refused, by what is in force now for the pod at whose interface it is judged; 0: it
 * is not. */
int refusal(struct question *asked)
{
	const struct target *opener, *peer;
	struct party pod, other;
	u32 policed, any;
	int ingress, safe;

	if (!asked)
		return REASON_UNJUDGED;
	if (asked->flags & FLOW_FROM_NODE)
		return 0;
	/* Nobody has told yet who is who, and what is refused. */
	if (!asked->now)
		return REASON_UNJUDGED;
	opener = &asked->flow.tuple.opener;
	peer = &asked->flow.tuple.peer;
	ingress = asked->flow.direction == INGRESS;
	any = asked->now;
	if (!ingress && is_proxy(peer))
		return 0;
	pod = party_of(ingress ? peer->address : opener->address, asked->now, any);
	if (!pod.flags)
		return 0;
	other = party_of(ingress ? opener->address : peer->address, asked->now, any);
	/* What came from elsewhere may say that it is of any address. */
	if (ingress && !(asked->flags & FLOW_FROM_POD)) {
		other.flags &= ~POD_PROVEN;
		if (other.who.number == IDENTITY_HOST)
			other.who.number = IDENTITY_WORLD;
	}
	asked->until = are_proven(&pod, &other);
	safe = asked->until != 0;
	if (asked->unreadable) {
		policed = ingress ? POD_POLICED << POD_INGRESS_SHIFT : POD_POLICED;
		if (ingress && !safe)
			policed |= POD_STRICT | POD_MTLS_PORTS;
		return pod.flags & policed ? REASON_UNJUDGED : 0;
	}
	if (ingress && !safe && is_strict(&pod, peer))
		return REASON_MTLS_REQUIRED;
	return policy_refusal(&pod, asked->flow.direction, other.who.number, peer->protocol, asked->port,
			      safe, any, &asked->rule);
}

/* Whether a packet opens a connection, or something like it, that nothing is known of yet. */
static __always_inline int is_news(const struct packet *packet, const struct flow *flow)
{
	u8 protocol = packet->tuple.opener.protocol;

	if (protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6 ||
	    packet->flags & (PACKET_OPENS_NOTHING | PACKET_UNREADABLE))
		return 0;
	return !flow || (packet->flags & PACKET_SYN && (flow->flags & FLOW_ENDED) == FLOW_ENDED);
}

/* Why a packet is refused as part of its flow, by what is in force in a generation; 0: it is not. */
static __always_inline u32 judge_flow(struct __sk_buff *skb, const struct packet *packet,
				      u32 direction, u32 from, u64 generation)
{
	struct question asked = {.now = generation, .port = packet->port};
	struct flow_key *key = &asked.flow;
	struct flow fresh = {}, *flow;
	u64 now = bpf_ktime_get_ns();
	u32 reason, said;
	struct tuple inner;
	int answers = 0;

	fresh.generation = with_pods(generation);
	fresh.seen_ns = now;
	if (packet->flags & PACKET_ERROR && read_inner(skb, packet, &inner))
		flow = find_flow(&inner, direction, 0, now, key);
	else if (packet->flags & PACKET_UNREADABLE)
		flow = 0;
	else
		flow = find_flow(&packet->tuple, direction, packet->flags & PACKET_SYN, now, key);
	if (flow) {
		answers = key->direction != direction;
		/* Who sends it is part of what was judged. */
		fresh.flags = answers || direction == EGRESS ? flow->flags & FLOW_FROM : from;
		if (flow->generation == fresh.generation && !(packet->flags & PACKET_SYN) &&
		    (!flow->until || now < flow->until) &&
		    (flow->flags & FLOW_FROM) == fresh.flags) {
			if (!flow->refused)
				note(flow, packet, answers, now);
			return flow->refused;
		}
		asked.port = key->tuple.peer.port;
	} else {
		key->tuple = packet->tuple;
		key->direction = direction;
		fresh.flags = from;
	}
	asked.flags = fresh.flags;
	asked.unreadable = packet->flags & PACKET_UNREADABLE;
	reason = refusal_apart(&asked);
	fresh.until = asked.until;
	said = reason;
	if (!said && direction == INGRESS && is_news(packet, flow)) {
		if (!fresh.flags)
			said = REASON_PLAIN;
		/* The proxy tells of its own itself. */
		else if (fresh.flags == FLOW_FROM_NODE && !outgoing.lookup(&key->tuple))
			said = REASON_FROM_HOST;
	}
	if (said) {
		count(said);
		report_packet(&key->tuple, said, asked.rule);
	}
	if (reason == REASON_POLICY_AUDIT)
		reason = 0;
	fresh.refused = reason;
	if (flow && !(packet->flags & PACKET_SYN)) {
		flow->refused = reason;
		flow->until = fresh.until;
		flow->flags = (flow->flags & ~FLOW_FROM) | fresh.flags;
		flow->generation = fresh.generation;
		if (!reason)
			note(flow, packet, answers, now);
	} else if (flow || (!reason && !(packet->flags & (PACKET_OPENS_NOTHING | PACKET_UNREADABLE)))) {
		/* A full map forgets what was silent for longest. */
		flows.update(key, &fresh);
	}
	return reason;
}

/* Why a packet does not pass a pod's interface; 0: it does. `from`: FLOW_FROM_…, of a packet to the
 * pod. */
static __always_inline u32 judge(struct __sk_buff *skb, const struct packet *packet, u32 direction,
				 u32 from, u64 generation)
{
	u32 reason;

	if (packet->flags & PACKET_LATER && follows(packet, direction))
		return 0;
	reason = judge_flow(skb, packet, direction, from, generation);
	if (packet->flags & PACKET_FRAGMENT && !(packet->flags & PACKET_UNREADABLE) && !reason)
		note_first(packet, direction);
	return reason;
}

/* A packet from the pod; the action. */
static __always_inline int filter_from_pod(struct __sk_buff *skb)
{
	struct packet packet = {};

	if (is_reset(skb)) {
		skb->mark = 0;
		return TC_ACT_UNSPEC;
	}
	if (skb->protocol == __builtin_bswap16(ETH_P_ARP)) {
		if (is_own_arp(skb))
			goto passes;
		goto spoofed;
	}
	/* What is no IP does not go on: IP may be hidden in it, such as in VLAN tags. */
	if (!read_packet(skb, &packet) || misleads(skb, &packet))
		goto spoofed;
	if (interface_of(&packet.tuple.opener) != skb->ifindex) {
		/* Before a host has an address, or from its link-local one. */
		if (keeps_link(&packet) && (is_unspecified(&packet.tuple.opener) ||
					    is_link_local(&packet.tuple.opener)))
			goto passes;
		goto spoofed;
	}
	if (keeps_link(&packet) && is_on_link(&packet.tuple.peer))
		goto passes;
	if (judge(skb, &packet, EGRESS, 0, in_force()))
		return turn_back(skb, &packet, EGRESS);
passes:
	count(REASON_FILTER_FROM_POD);
	return TC_ACT_UNSPEC;
spoofed:
	count(REASON_SPOOFED);
	return TC_ACT_SHOT;
}

/* Whether a packet that has come in by no interface is one of the node's own stack. Where netfilter
 * puts fragments of IPv6 together, ip6_fragment may forget of those that it makes anew where they came
 * in; but they have no socket. */
static __always_inline int is_made_here(struct __sk_buff *skb, const struct packet *packet)
{
	return !(packet->flags & PACKET_FRAGMENT) || bpf_get_socket_cookie(skb);
}

/* A packet to the pod; the action. */
static __always_inline int filter_to_pod(struct __sk_buff *skb)
{
	u32 by = skb->ingress_ifindex, owner, from = 0;
	struct packet packet = {};
	u64 now = in_force();

	if (is_reset(skb))
		goto passes;
	if (!read_packet(skb, &packet)) {
		/* What is no IP has come no further than from the node. */
		if (!is_ip(skb))
			goto passes;
		goto unjudged;
	}
	owner = interface_of(&packet.tuple.opener);
	if (!by && is_made_here(skb, &packet)) {
		from = FLOW_FROM_NODE;
	} else if (by && owner == by) {
		from = FLOW_FROM_POD;
	} else if (owner) {
		count(REASON_FORGED);
		return TC_ACT_SHOT;
	}
	/* On a bridge it may be for all, or for an address that no policy is about. */
	if (from != FLOW_FROM_NODE && interface_of(&packet.tuple.peer) != skb->ifindex &&
	    !keeps_link(&packet))
		goto unjudged;
	/* Generations are the times of changes. One that came after the packet had left its pod is for
	 * both ends: it does not pass by the rules of one before it and those of the other after.
	 * RST may be the filter's own, for the pod that it comes from. */
	if (from == FLOW_FROM_POD && bpf_ktime_get_ns() - now < SECOND_NS &&
	    !(packet.tcp & TCP_RST) && judge(skb, &packet, EGRESS, 0, now))
		return turn_back(skb, &packet, INGRESS);
	if (judge(skb, &packet, INGRESS, from, now))
		return turn_back(skb, &packet, INGRESS);
passes:
	count(REASON_FILTER_TO_POD);
	return TC_ACT_UNSPEC;
unjudged:
	count(REASON_UNJUDGED);
	return TC_ACT_SHOT;
}

#endif
