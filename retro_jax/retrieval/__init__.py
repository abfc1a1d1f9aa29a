"""Chunk embeddings, the ScaNN index, the retrieval database and precomputed neighbours."""
