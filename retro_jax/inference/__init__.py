"""Sampling with retrieval at every chunk boundary."""
