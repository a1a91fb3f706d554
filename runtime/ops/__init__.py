"""One file an operator: schema, reference, kernels and the condition under which each serves."""
