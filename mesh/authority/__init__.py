"""The authority process: certificates for the nodes' agents; see `certs` for what they are."""
