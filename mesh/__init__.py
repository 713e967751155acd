"""Weft's floor (`mesh.model`) and roof (agent, command line); see ARCHITECTURE.md."""
