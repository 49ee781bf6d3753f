"""Adversarial training: discriminators, their losses and updates."""

from fsq_jax.adversarial.builder import build_discriminator
from fsq_jax.adversarial.dino_backbone import load_discriminator_backbone

__all__ = [
    'build_discriminator',
    'load_discriminator_backbone',
]
