"""The per-node HTTP proxy; knows its configuration (`mesh.model.nodeconfig`) and nothing of Kubernetes."""
