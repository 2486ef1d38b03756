"""Measurements of the library itself: each module is one benchmark and one command."""
