"""Image tokenizers with Finite Scalar Quantization, in JAX and Flax."""

__version__ = '0.1.0'
