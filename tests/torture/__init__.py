"""The torture test of the way through the proxy: `make torture`, and a short one in `make test`."""
