"""Models of others as decoders, and models of ours for other tools: Hugging Face, safetensors, StableHLO."""
