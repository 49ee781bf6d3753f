"""Training: the loop, its step, state, losses and optimizer."""

from fsq_jax.train.autoencoder import train_and_evaluate
from fsq_jax.train.loop import DivergedError
from fsq_jax.train.loop import Preempted
from fsq_jax.train.loop import RunError

__all__ = [
    'DivergedError',
    'Preempted',
    'RunError',
    'train_and_evaluate',
]
