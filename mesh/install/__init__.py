"""Weft into a cluster and out of it again."""
