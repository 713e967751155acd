"""The eBPF data path. Empty until steering is built; load-balancer entries are computed for it already."""
