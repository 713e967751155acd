"""Policies to what is in force for each pod of this node, by identity; see mesh.policy.tables."""
