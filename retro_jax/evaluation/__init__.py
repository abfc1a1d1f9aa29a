"""Bits-per-byte over whole documents, with retrieval on, off and shuffled."""
