"""Settings of XLA: the backend's compiler options, the cache of compiled programs, and traces."""
