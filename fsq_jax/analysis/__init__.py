"""Analysis of a trained codebook."""
