"""Readers of weight files from anyone: no code is run, and sizes are limited."""
