"""The controller: what a cluster has once, not on every node. Statuses, addresses, signatures."""
