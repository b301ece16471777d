"""Quantised checkpoints: which stored tensors make up a weight, and their values in fp32."""
