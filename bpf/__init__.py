"""The eBPF data path: programs, the loader that pins them, and the maps they read."""
