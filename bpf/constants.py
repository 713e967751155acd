"""Numbers that Python and C share: flags, and sizes of the maps.

Every one that is an int is a #define of its name in the programs (bpf/layout.py).
"""

from mesh.model.identity import FIRST_CIDR as FIRST_CIDR
from mesh.model.identity import FIRST_WORKLOAD as FIRST_WORKLOAD
from mesh.model.identity import Reserved
from mesh.model.statuses import REGISTERED

# A frontend's connections go to this node's proxy; and it may answer them by redirect.
FRONTEND_HTTP, FRONTEND_SOCKMAP = 1, 2
# A backend is reached through the relay of this node's proxy.
BACKEND_REMOTE = 1
# The proxy sends to workloads of this node by redirect.
# Also: nothing goes plainly to a pod of another node that takes mutual TLS.
CONFIG_SOCKMAP, CONFIG_MTLS = 1, 2
# An address whose sockets are never enrolled; of a meshed pod of another node; of a pod that is not
# in the mesh; of one of another node that takes mutual TLS, at some port at least.
IDENTITY_PLAIN, IDENTITY_FAR, IDENTITY_APART, IDENTITY_MTLS = 1, 2, 4, 8
# Of a connection between proxy and workload: to be enrolled if both ends can be; enrolled.
STATE_WANTED, STATE_ENROLLED = 1, 2

# Of a pod, for egress: it has policies; what no rule allows is refused; refusals are only told. For
# ingress the same, shifted; everything is refused. Then: its ports are STRICT; not all of them are
# as the pod is; the node holds a valid SVID of it.
POD_POLICED, POD_DEFAULT_DENY, POD_AUDIT, POD_INGRESS_SHIFT = 1, 2, 4, 4
POD_CLOSED = (POD_POLICED | POD_DEFAULT_DENY) * (1 | 1 << POD_INGRESS_SHIFT)
POD_STRICT, POD_MTLS_PORTS, POD_PROVEN = 1 << 8, 1 << 9, 1 << 10
# Whose rules judge: those of who opens a flow, those of whom it is opened to.
EGRESS, INGRESS = 0, 1
# Of what rules say: it is allowed; if it goes by mutual TLS or between two pods of this node with
# SVIDs; it is refused; it would be, were the rule not in audit mode.
POLICY_ALLOW, POLICY_SAFE, POLICY_DENY, POLICY_AUDIT_DENY = 1, 2, 4, 8
# Of a flow to a pod: the node itself has opened it, another pod of this node. Of all flows: the
# peer has answered; its opener has said that it ends, its peer, both (or one has broken it off).
FLOW_FROM_NODE, FLOW_FROM_POD, FLOW_FROM = 1, 2, 3
FLOW_ANSWERED, FLOW_ENDED_BY_OPENER, FLOW_ENDED_BY_PEER, FLOW_ENDED = 4, 8, 16, 24
# What stands for who is no pod, in `identities`.
IDENTITY_HOST, IDENTITY_WORLD, IDENTITY_INIT = Reserved.HOST, Reserved.WORLD, Reserved.INIT
# The mark of packets that the filter has made itself, between its two ends.
RESET_MARK = 0x57454654

# Sizes of the maps, in entries. A slot takes 8 bytes, a backend 24, the others about 120.
FRONTENDS = 1 << 15
SLOTS = 1 << 20
BACKENDS = 1 << 16
ORIGINS = 1 << 16
# What each datagram socket that is not connected has asked for lately, 64 bytes each: a power of 2.
ASKED_LATELY = 8
AFFINITIES = 1 << 16
MEMBERS = 1 << 16
# Connections to the proxy that it has yet to accept; connections that it has opened; backends that
# cannot be enrolled; enrolled sockets.
CONNECTING = 1 << 14
OUTGOING_MAX = 1 << 16
PLAIN = 1 << 12
# For how long, in seconds.
PLAIN_S = 600
SOCKETS_MAX = 1 << 16
# Of this node; of the cluster.
PODS = 1 << 10
IDENTITIES = 1 << 16
MTLS_PORTS = 1 << 12
# Rules of all pods: some 150 bytes for each that is there.
POLICIES = 1 << 18
# What pods have opened, and what was opened to them: 18 MB, at once. The least recently used go.
FLOWS = 1 << 17
# How long a silent flow is remembered, in seconds: one of TCP while it lives (as kube-proxy has
# nf_conntrack do), all others.
FLOW_TCP_S, FLOW_S = 86_400, 120
# Fragmented packets on their way; how long the rest of one may take (Linux puts none together that
# is older), in seconds.
FRAGMENTS = 1 << 12
FRAGMENT_S = 30
# Packets that are told of in one second, on each CPU: that were refused, that came plainly; the
# node's own, which are as many as it likes to probe.
TOLD_MAX, TOLD_FROM_HOST_MAX = 500, 50
# Pairs, and what goes past the proxy by them. A request that does is no longer than this, nor a
# response, except of LARGE_PAIRS of a worker, whose responses have been longer; both ends have read
# all before: so that responses hold no more than 512 MiB, and as much for each worker.
PAIRS_MAX = 1 << 13
# A client's connection may have so many ways from a rule to a backend; the requests of a rule are
# shared out in so many parts.
PAIR_WAYS, PAIRED_MAX = 32, 1 << 15
PAIR_SHARES = 1 << 31
EXCHANGES_MAX = SOCKETS_MAX
RESPONSE_MAX, REQUEST_MAX = 64 * 1024, 64 * 1024
LARGE_RESPONSE_MAX, LARGE_PAIRS = 2 << 20, 1 << 8
# A message takes 1 KiB besides its bytes, charged to nobody: after so many of a request or response
# the rest goes through the proxy.
MESSAGES_MAX = 1 << 10
# What is counted under is by route, ends, policy rules and status: 200 bytes for each CPU.
PASSED_MAX = 1 << 16
# Of each class of statuses those that are registered, by their last two digits; others are counted
# as the class's last one.
STATUSES_2XX, STATUSES_3XX, STATUSES_4XX, STATUSES_5XX = (
    sum(1 << one % 100 for one in REGISTERED if one // 100 == of) for of in (2, 3, 4, 5)
)
# Of 4 KiB; a power of two: requests that have passed, until somebody looks, each with so many bytes
# of how it began.
PASSING_PAGES, PASSING_HEAD = 32, 160
# Of its head; a power of two.
RESPONSE_HEAD_MAX = 2048
# Of 4 KiB; a power of two.
EVENT_PAGES = 128
# Tables that requests are judged by, and the arenas they stand in: twice what the largest table
# takes and a header (bpf/programs/automaton.h), in bytes; 4 MB for each that is in use.
AUTOMATA = 1 << 12
AUTOMATON_ARENAS, AUTOMATON_ARENA = 1 << 8, (4 << 20) + 512

# As those of the proxy's histogram, in ns.
PAIR_BOUNDS = tuple(
    int(ms * 1_000_000)
    for ms in (1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000)
)
PAIR_BUCKETS = len(PAIR_BOUNDS)

# Of the tables of bpf/response.py; a power of two. In a cell above the next state: the byte is a
# digit of Content-Length; the head goes on with it. The first state, and that of a whole head.
RESPONSE_STATES = 512
RESPONSE_DIGIT, RESPONSE_ALIVE = 14, 15
RESPONSE_START, RESPONSE_DONE = 1, 2
