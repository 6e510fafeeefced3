"""Score pairs: encode them to ids, run them through the decoder in packed batches, and read the heads."""
