"""Structured pruning: which indices of which tensors go together, what they are worth, and cutting them out."""
