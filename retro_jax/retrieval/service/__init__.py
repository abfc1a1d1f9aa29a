"""The retrieval service: a database's neighbours over gRPC, from one process or from shard servers behind a front."""
