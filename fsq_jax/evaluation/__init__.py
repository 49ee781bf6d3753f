"""Evaluation: metrics, codebook statistics, whole splits."""
