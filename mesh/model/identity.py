"""Numbers of identities: who an address is to policy. The one table for proxy, policy and kernel.

    0           nobody that is known: not yet, or not any more
    1 to 8      reserved (below), numbered as Cilium's
    256 …       pods, by their labels: 24 bits, and above those what tells apart sets of labels that
                share them (gateway.workloads)
    2**31 …     ranges of addresses that policies name (CidrSection); numbers are the node's own

Knows numbers only.
"""

from __future__ import annotations

import enum

UNKNOWN = 0
# Of pods, in their 24 bits.
FIRST_WORKLOAD = 256
WORKLOAD_BITS = 24
# Of ranges of addresses.
FIRST_CIDR = 1 << 31


class Reserved(enum.IntEnum):
    """Who is no pod (Cilium's pkg/identity/numericidentity.go has the same numbers)."""

    HOST = 1  # this node's own addresses
    WORLD = 2  # what is none of the others: no section says so, it is where nothing else matches
    UNMANAGED = 3
    HEALTH = 4
    INIT = 5
    REMOTE_NODE = 6  # own addresses of the cluster's other nodes
    KUBE_APISERVER = 7
    INGRESS = 8  # a Gateway's proxy, on any node
