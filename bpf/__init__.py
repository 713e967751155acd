"""The eBPF data path. Empty until steering is built; its load-balancer entries are derived now."""
