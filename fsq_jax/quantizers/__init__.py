"""Quantizers: latents to codes and indices."""

from fsq_jax.quantizers import convert
from fsq_jax.quantizers.base import Quantizer
from fsq_jax.quantizers.base import QuantizerOutput
from fsq_jax.quantizers.builder import build_quantizer
from fsq_jax.quantizers.conventions import recommended_levels
from fsq_jax.quantizers.digits import DigitQuantizer
from fsq_jax.quantizers.fsq import FSQ
from fsq_jax.quantizers.grouped import GroupedFSQ
from fsq_jax.quantizers.lfq import BSQ
from fsq_jax.quantizers.lfq import LFQ
from fsq_jax.quantizers.none import NoQuantizer
from fsq_jax.quantizers.residual import ResidualFSQ
from fsq_jax.quantizers.simvq import SimVQ
from fsq_jax.quantizers.specs import check_same_spec
from fsq_jax.quantizers.vq import VectorQuantizer

__all__ = [
    'BSQ',
    'FSQ',
    'LFQ',
    'DigitQuantizer',
    'GroupedFSQ',
    'NoQuantizer',
    'Quantizer',
    'QuantizerOutput',
    'ResidualFSQ',
    'SimVQ',
    'VectorQuantizer',
    'build_quantizer',
    'check_same_spec',
    'convert',
    'recommended_levels',
]
