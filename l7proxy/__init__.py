"""The per-node HTTP proxy: knows its NodeConfig sections and nothing of Kubernetes."""
