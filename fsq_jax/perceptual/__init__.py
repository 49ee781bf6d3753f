"""Frozen networks that compare images: LPIPS, classifiers, Inception."""

from fsq_jax.perceptual.inception import load_inception
from fsq_jax.perceptual.lpips import load_lpips

__all__ = [
    'load_inception',
    'load_lpips',
]
