"""Gateway API objects to routes, load-balancer entries and status; pure functions over objects."""
