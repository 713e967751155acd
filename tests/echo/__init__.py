"""Echo backends of the project's own: they answer with what they saw of a request."""
