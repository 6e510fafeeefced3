"""Training both re-rankers, on the decoder and the inputs that inference uses."""
