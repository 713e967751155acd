"""The lab: a cluster on one host out of network namespaces, veth pairs and cgroups."""
