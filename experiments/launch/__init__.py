"""Scripts that start experiments on machines of some kind."""
