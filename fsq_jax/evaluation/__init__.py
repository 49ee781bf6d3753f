"""Evaluation of splits: metrics and codebook statistics."""
