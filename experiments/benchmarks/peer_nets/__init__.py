"""The same four networks as other frameworks' users write them, for benchmarks.peers."""
