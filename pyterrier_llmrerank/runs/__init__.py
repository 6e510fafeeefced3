"""Run and rerank files: read, written, reranked block by block, evaluated."""
