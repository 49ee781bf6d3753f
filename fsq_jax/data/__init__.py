"""Images to batches, seeded and resumable."""

from fsq_jax.data.builder import build_dataset
from fsq_jax.data.builder import check_fingerprint
from fsq_jax.data.builder import open_source
from fsq_jax.data.builder import prepare
from fsq_jax.data.image_errors import DamagedImageError
from fsq_jax.data.image_source import NO_DIGEST
from fsq_jax.data.image_source import EncodedSource
from fsq_jax.data.image_source import ImageSource
from fsq_jax.data.image_source import check_damaged_share
from fsq_jax.data.image_source import content_hash
from fsq_jax.data.pipelines import Dataset
from fsq_jax.data.pipelines import fingerprint
from fsq_jax.data.pipelines import repeat_endlessly
from fsq_jax.data.transforms import apply_augmentation
from fsq_jax.data.transforms import centre_crop
from fsq_jax.data.transforms import draw_augmentation
from fsq_jax.data.transforms import is_smaller

__all__ = [
    'NO_DIGEST',
    'DamagedImageError',
    'Dataset',
    'EncodedSource',
    'ImageSource',
    'apply_augmentation',
    'build_dataset',
    'centre_crop',
    'check_damaged_share',
    'check_fingerprint',
    'content_hash',
    'draw_augmentation',
    'fingerprint',
    'is_smaller',
    'open_source',
    'prepare',
    'repeat_endlessly',
]
