"""Trained tokenizers: encode images to tokens and decode them."""

from fsq_jax.tokenizer.tokenizer import Tokenizer
from fsq_jax.tokenizer.tokenizer import load_tokenizer

__all__ = [
    'Tokenizer',
    'load_tokenizer',
]
