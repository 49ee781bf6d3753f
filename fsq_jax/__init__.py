"""Image tokenizers with Finite Scalar Quantization, in JAX and Flax."""

import importlib
from typing import Any

__version__ = '0.1.0'

_SUB_PACKAGES = (
    'adversarial', 'analysis', 'checkpoints', 'configuration', 'data',
    'evaluation', 'generators', 'models', 'perceptual', 'quantizers', 'report',
    'runtime', 'tokenizer', 'tokens', 'train', 'workdir',
)  # fmt: skip
# Public names, each to its sub-package.
_NAMES = {
    'BSQ': 'quantizers',
    'FSQ': 'quantizers',
    'GroupedFSQ': 'quantizers',
    'LFQ': 'quantizers',
    'ResidualFSQ': 'quantizers',
    'SimVQ': 'quantizers',
    'Tokenizer': 'tokenizer',
    'VectorQuantizer': 'quantizers',
    'recommended_levels': 'quantizers',
    'train_and_evaluate': 'train',
}


def __getattr__(name: str) -> Any:
  """Imports a sub-package, or the one that has the name, on first use."""
  if name in _SUB_PACKAGES:
    return importlib.import_module(f'fsq_jax.{name}')
  if name in _NAMES:
    module = importlib.import_module(f'fsq_jax.{_NAMES[name]}')
    return getattr(module, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted({*globals(), *_SUB_PACKAGES, *_NAMES})
