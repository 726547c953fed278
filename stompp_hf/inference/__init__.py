"""Faster forms of a packed model: fused layers, folded batch norms, separable pooling."""
