"""Quantizing dense checkpoints: codebooks, scales, one matrix, one whole checkpoint."""
