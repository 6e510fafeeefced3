"""Files to weights: folders, hub ids and GGUF files, adapters merged, nothing executed."""
