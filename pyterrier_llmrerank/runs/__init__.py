"""Read, write, rerank and evaluate run files."""
