"""Quantisation: what to quantise, how to apply it to a graph, and the pure algorithms behind it."""
