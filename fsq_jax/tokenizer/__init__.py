"""Trained tokenizers: images to tokens and back."""

from fsq_jax.tokenizer.tokenizer import Tokenizer
from fsq_jax.tokenizer.tokenizer import load_tokenizer

__all__ = [
    'Tokenizer',
    'load_tokenizer',
]
