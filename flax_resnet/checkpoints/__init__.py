"""Checkpoints: saved with orbax, sealed by hashes, chosen and restored."""
