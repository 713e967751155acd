"""The node's control plane: wires source, derivation, workers and status together."""
