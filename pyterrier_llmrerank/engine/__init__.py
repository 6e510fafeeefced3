"""Pairs to scores: ids, packed batches, decoder layers, heads."""
