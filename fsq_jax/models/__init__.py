"""Autoencoders and their parts."""

from fsq_jax.models.autoencoder import Autoencoder
from fsq_jax.models.autoencoder import AutoencoderOutput
from fsq_jax.models.builder import build_autoencoder
from fsq_jax.models.normalization import LatentStatistics
from fsq_jax.models.pretrained.architectures import ARCHITECTURES
from fsq_jax.models.pretrained.architectures import describe_architecture
from fsq_jax.models.pretrained.architectures import parse_architecture
from fsq_jax.models.pretrained.files import hash_weights
from fsq_jax.models.pretrained.loading import build_decoder
from fsq_jax.models.pretrained.loading import build_encoder
from fsq_jax.models.pretrained.loading import load_decoder
from fsq_jax.models.pretrained.loading import load_encoder
from fsq_jax.models.pretrained.mae_decoder import PRESETS as DECODER_PRESETS

__all__ = [
    'ARCHITECTURES',
    'DECODER_PRESETS',
    'Autoencoder',
    'AutoencoderOutput',
    'LatentStatistics',
    'build_autoencoder',
    'build_decoder',
    'build_encoder',
    'describe_architecture',
    'hash_weights',
    'load_decoder',
    'load_encoder',
    'parse_architecture',
]
