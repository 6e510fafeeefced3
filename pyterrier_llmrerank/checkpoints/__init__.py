"""Turn folders, hub ids and GGUF files into weights, with adapters merged in and nothing in the files executed."""
