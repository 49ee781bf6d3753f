"""Checkpoints: saved, verified, restored."""

from fsq_jax.checkpoints.checkpointer import Checkpointer
from fsq_jax.checkpoints.checkpointer import CorruptedError
from fsq_jax.checkpoints.checkpointer import ReadError
from fsq_jax.checkpoints.checkpointer import Restored
from fsq_jax.checkpoints.checkpointer import SaveError

__all__ = [
    'Checkpointer',
    'CorruptedError',
    'ReadError',
    'Restored',
    'SaveError',
]
