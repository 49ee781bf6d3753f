"""Images to batches, seeded and resumable."""

from fsq_jax.data.builder import build_dataset
from fsq_jax.data.builder import check_fingerprint
from fsq_jax.data.builder import open_source
from fsq_jax.data.builder import prepare
from fsq_jax.data.image_errors import DamagedImageError
from fsq_jax.data.image_source import ImageSource
from fsq_jax.data.image_source import content_hash
from fsq_jax.data.pipelines import Dataset
from fsq_jax.data.pipelines import repeat_endlessly
from fsq_jax.data.transforms import centre_crop
from fsq_jax.data.transforms import draw_augmentation

__all__ = [
    'DamagedImageError',
    'Dataset',
    'ImageSource',
    'build_dataset',
    'centre_crop',
    'check_fingerprint',
    'content_hash',
    'draw_augmentation',
    'open_source',
    'prepare',
    'repeat_endlessly',
]
