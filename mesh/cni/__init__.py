"""Weft as a chained CNI plugin: filters and records pods that another plugin has connected."""
