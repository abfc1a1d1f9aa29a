"""Text to tokens to chunks to records to batches."""
