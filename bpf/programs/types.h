/* The structs in the maps. bpf/layout.py has the same in Python; its checks are compiled in. */
#ifndef WEFT_TYPES_H
#define WEFT_TYPES_H

/* Address and port in network order, IPv4 as ::ffff:a.b.c.d; protocol is an IP protocol number. */
struct target {
	u32 address[4];
	u16 port;
	u8 protocol;
	u8 zero;
};

/* As in struct target. */
struct address {
	u32 words[4];
};

/* The Maglev table of a frontend is slots[offset .. offset + size); no backends: size 0. Each slot is the
 * number of a backend and, in the upper half, which slot of the table has another one: followed from
 * any, these lead through all backends of the frontend and back. */
struct frontend {
	u32 offset;
	u32 size;
	u32 affinity_s; /* 0: none */
	u32 flags;	/* FRONTEND_… */
	u32 backends;	/* so many different ones */
};

struct backend {
	struct target target;
	u32 flags; /* BACKEND_… */
};

/* `backend` belongs to `frontend`; only kept for frontends with affinity. */
struct member {
	struct target frontend;
	struct target backend;
};

/* A client is a network namespace: that of a pod. */
struct affinity_key {
	u64 client;
	struct target frontend;
	u32 zero;
};

struct affinity {
	u64 used_ns; /* CLOCK_MONOTONIC */
	struct backend backend;
};

struct origin_key {
	u64 cookie;
	struct target peer;
	u32 zero;
};

/* What a socket asked for, and what was chosen for it; port 0: the proxy is to choose. */
struct origin {
	struct target asked;
	struct target backend;
	u32 flags; /* FRONTEND_… */
};

/* With a connected socket: the peer that it was given, and for what. */
struct connected {
	struct target peer;
	struct origin origin;
};

/* With a datagram socket that is not connected: the last peers that it was given. */
struct asked {
	struct connected last[ASKED_LATELY];
	u32 next; /* modulo ASKED_LATELY: the one that goes first */
	u32 zero;
};

/* Where this node's proxy listens for workloads; port 0: nowhere. `home`: the network namespace whose
 * sockets are none of ours though they may be in the workloads' cgroup; 0: there is none. */
struct config {
	struct target http4;
	struct target http6;
	struct target relay4;
	struct target relay6;
	u32 flags; /* CONFIG_… */
	u32 zero;
	u64 home;
};

/* A TCP connection as its opener sees it. */
struct tuple {
	struct target opener;
	struct target peer;
};

/* A workload's connection to the proxy: by tuple until the proxy's socket is there, then with that
 * socket. Of a connection that the proxy opened: only `peer`, `cookie` and `state`. */
struct proxied {
	u64 peer;   /* the workload's socket to redirect to; 0: not known */
	u64 cookie; /* the socket that opened the connection */
	u64 netns;
	struct target asked;
	struct target backend;
	u32 state; /* WANTED, then ENROLLED or neither */
	u32 zero;
};

/* A connection that the proxy opened. */
struct outgoing {
	u64 cookie; /* the proxy's socket */
	u32 state;
	u32 zero;
};

/* With a workload's enrolled socket. */
struct workload {
	u64 cookie;
	u32 base; /* its TCP sequence number when the connection was established */
	u32 is_backend;
};

/* Where a client's requests by a rule of a route may go: to a backend's socket, so many of PAIR_SHARES
 * of them. What is left of these is for endpoints that the proxy reaches. */
struct way {
	u64 backend; /* its socket's cookie */
	u64 series;  /* as in struct passed_key */
	u32 rule;    /* 0: there is none */
	u32 share;
	u32 response_max;
	u32 zero;
};

/* What a proxy offers to a client's socket: requests that these tables and lists of policy rules let
 * pass (judge.h) go straight to a backend's socket, by the rule that they come to. `offer` is the time of it
 * (CLOCK_MONOTONIC) and stands at both ends, so that who reads it while another takes its place notices. */
struct pair {
	u64 offer;
	u64 client; /* its socket's cookie: the memory may have become another's before it was read */
	u64 generation;
	u32 egress;
	u32 ingress;
	u32 received; /* bytes that the proxy has received from the client's socket, and is done with */
	u32 handed;   /* as in struct exchange: those that the proxy is done with */
	u32 until;    /* of `forwarded` in struct exchange: no more than so many */
	u32 zero;
	u64 expires_ns; /* CLOCK_MONOTONIC */
	u64 made_ns;	/* likewise: the configuration by which it is offered */
	struct way ways[PAIR_WAYS];
	u64 offer_again;
};

/* Of a backend's socket that is part of a pair. */
struct paired {
	u64 client;   /* its socket's cookie */
	u32 received; /* as in struct pair, from the backend's socket */
	u32 answered; /* requests, past the proxy, since then */
};

/* What goes past the proxy between a client's socket and its pairs' backends. Requests that were
 * forwarded are answered, or their responses were handed to the proxy; or one is outstanding. What is
 * not a number of requests is of the last one. */
struct exchange {
	u64 started_ns; /* CLOCK_MONOTONIC */
	u64 backend;	/* its socket's cookie */
	u64 series;
	u32 egress; /* the numbers of the policy rules that have let it pass */
	u32 ingress;
	u32 forwarded;
	u32 answered;
	u32 handed;
	u32 parted;    /* requests that came in more than one message */
	u32 sent;      /* bytes that the client's socket had sent by TCP before it */
	u32 unsent;    /* bytes of it that are still to come: past the proxy while no others do */
	u32 left;      /* and of the response */
	u32 messages;  /* of the request so far, then of the response */
	u32 bodiless;  /* it is HEAD */
	u32 status;    /* of the response */
	u32 bytes_in;  /* of bodies */
	u32 bytes_out;
	u32 response_max;
	u32 port;  /* of the client's socket, in the machine's order */
	u32 shown; /* bytes in `head` */
	u32 missed; /* requests that could have passed, and there was no way */
	char head[PASSING_HEAD];
};

/* What passed by the proxy is counted under this. `series` stands for the route, both ends and their
 * policies (l7proxy/series.py). */
struct passed_key {
	u64 series;
	u32 egress;
	u32 ingress;
	u32 status; /* x99: any of its class that is not registered */
	u32 zero;
};

struct passed {
	u64 requests;
	u64 bytes_in; /* of bodies */
	u64 bytes_out;
	u64 elapsed_ns;		  /* sum */
	u64 faster[PAIR_BUCKETS]; /* by the bounds of a histogram; slower ones are in none */
};

/* One that has passed, for access log and flow records. */
struct passing {
	u64 started_ns; /* CLOCK_MONOTONIC */
	u64 elapsed_ns;
	u64 series;
	u32 egress;
	u32 ingress;
	u32 status;
	u32 bytes_in;
	u32 bytes_out;
	u32 port;
	u32 shown;
	u32 zero;
	char head[PASSING_HEAD]; /* how the request began */
};

/* The tables of bpf/response.py. (bcc makes code for each element of an array of numbers.) */
struct responses {
	char raw[RESPONSE_STATES * 256 * 2];
};

/* A range of addresses, as key of a trie: the first `bits` of 128 are compared. */
struct prefix {
	u32 bits;
	struct address address;
};

/* Who an address is from a generation on, and before it. */
struct identity {
	u64 since;
	u32 number; /* 0: nobody says */
	u32 flags;  /* IDENTITY_… */
	u32 old_number;
	u32 old_flags;
};

struct who {
	u32 number;
	u32 flags;
};

/* The addresses of a network namespace; all zero: none of this family. */
struct addresses {
	struct address v4;
	struct address v6;
};

/* What is in force for a local pod from a generation on, and before it. */
struct pod {
	u64 since;
	u64 proven_until; /* CLOCK_MONOTONIC; where POD_PROVEN */
	u32 policy;	  /* its set in `policies` */
	u32 flags;  /* POD_… */
	u32 old_policy;
	u32 old_flags;
};

/* Who one end of a connection is, and what is in force for it if it is a local pod. */
struct party {
	u64 proven_until; /* where POD_PROVEN, which it then is */
	struct who who;
	u32 policy;
	u32 flags; /* POD_…; 0: there are no rules, or it is no local pod */
};

/* Key of a trie: everything up to `direction` is always compared, of the rest a part. */
struct policy_key {
	u32 bits;
	u32 set;
	u32 identity; /* 0: anybody's */
	u8 direction;
	u8 protocol;
	u16 port; /* network order; of ICMP the type */
};

/* What the rules of a set say together. */
struct policy {
	u32 flags; /* POLICY_… */
	u32 rule;  /* a number that user space knows */
};

/* A flow where it is judged: by the egress rules of the pod that opened it, or by the ingress rules
 * of the one it was opened to. An ICMP echo has its identifier as the opener's port, and the type of
 * its requests as the peer's. */
struct flow_key {
	struct tuple tuple;
	u32 direction;
};

struct flow {
	u64 seen_ns;	/* CLOCK_MONOTONIC */
	u64 generation; /* of what it was judged by */
	u64 until;	/* CLOCK_MONOTONIC: it is judged anew; 0: it needs not */
	u32 flags;	/* FLOW_… */
	u32 refused;	/* the reason; 0: it is allowed */
};

/* A packet that comes in fragments, where they are judged. */
struct fragment {
	struct address source;
	struct address destination;
	u32 id;
	u32 direction;
};

/* How much was told in one second. */
struct told {
	u64 second;
	u64 events;
};

/* Where a table for judging requests stands. */
struct automaton_place {
	u32 arena;
	u32 word; /* even */
};

/* What happened to a connection or datagram, for flow records. */
struct event {
	u64 time_ns; /* CLOCK_MONOTONIC */
	u64 netns;   /* 0 where it is not known */
	struct target source; /* zero where it is not known */
	struct target asked;
	struct target peer;
	u32 reason;
	u32 rule; /* as in struct policy; 0: none */
	u32 zero;
};

#endif
