"""Token files: data sets as tokens, with random access."""

from fsq_jax.runtime.preemption import Interrupted
from fsq_jax.tokens.detokenization import detokenize_workdir
from fsq_jax.tokens.manifest import Job
from fsq_jax.tokens.shards import Example
from fsq_jax.tokens.source import TokenSource
from fsq_jax.tokens.source import build_dataset
from fsq_jax.tokens.summary import describe
from fsq_jax.tokens.tokenization import default_folder
from fsq_jax.tokens.tokenization import tokenize_workdir

__all__ = [
    'Example', 'Interrupted', 'Job', 'TokenSource', 'build_dataset',
    'default_folder', 'describe', 'detokenize_workdir', 'tokenize_workdir',
]  # fmt: skip
