"""`make bench`: Weft beside its peers (`bench.peers`), and changes of routes (`bench.routes`)."""
