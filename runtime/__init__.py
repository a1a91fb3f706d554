"""What a deployed model needs: numerics, quantised tensors, operators, programs and artifacts."""
