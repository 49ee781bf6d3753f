"""Token files: data sets as tokens, written once and read in any order."""

from fsq_jax.tokens.manifest import Job
from fsq_jax.tokens.manifest import Manifest
from fsq_jax.tokens.shards import Example
from fsq_jax.tokens.source import TokenDataset
from fsq_jax.tokens.source import TokenSource
from fsq_jax.tokens.source import build_dataset

__all__ = [
    'Example', 'Job', 'Manifest', 'TokenDataset', 'TokenSource',
    'build_dataset',
]  # fmt: skip
