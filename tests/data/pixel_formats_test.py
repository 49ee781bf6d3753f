"""Conversions between grey, RGB and RGBA, against their formulas."""

import io

import ml_collections
import numpy as np
from PIL import Image
import pytest

from fsq_jax import data
from fsq_jax.data import decoding
from fsq_jax.data import pixel_formats
from fsq_jax.data import transforms

_RNG = np.random.default_rng(0)
_GREY = _RNG.integers(0, 256, (6, 9, 1), np.uint8)
_RGB = _RNG.integers(0, 256, (6, 9, 3), np.uint8)
_RGBA = _RNG.integers(0, 256, (6, 9, 4), np.uint8)
_RGBA[:2, :, 3] = 0
_RGBA[2:4, :, 3] = 255
_OPAQUE = np.full((6, 9, 1), 255, np.uint8)


def _luma(rgb):
  weighted = rgb.astype(np.int64) @ [19595, 38470, 7471]
  return ((weighted + 2**15) >> 16).astype(np.uint8)[..., None]


def _over_white(rgba):
  alpha = rgba[..., 3:] / 255
  colours = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha))
  return colours.astype(np.uint8)


def _clear(rgba):
  return np.where(rgba[..., 3:] == 0, 0, rgba).astype(np.uint8)


_CONVERSIONS = [
    (_GREY, 1, _GREY),
    (_GREY, 3, _GREY.repeat(3, axis=-1)),
    (_GREY, 4, np.concatenate([_GREY.repeat(3, axis=-1), _OPAQUE], axis=-1)),
    (_RGB, 1, _luma(_RGB)),
    (_RGB, 3, _RGB),
    (_RGB, 4, np.concatenate([_RGB, _OPAQUE], axis=-1)),
    (_RGBA, 1, _luma(_over_white(_RGBA))),
    (_RGBA, 3, _over_white(_RGBA)),
    (_RGBA, 4, _clear(_RGBA)),
]


def _png(image, **options):
  buffer = io.BytesIO()
  pixel_formats.to_pillow(image).save(buffer, 'PNG', **options)
  return buffer.getvalue()


@pytest.mark.parametrize(('image', 'channels', 'expected'), _CONVERSIONS)
def test_files_are_converted_by_the_documented_formulas(
    image, channels, expected
):
  decoded = decoding.decode_image(_png(image), channels)
  assert decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize(
    'image', [_RGB / 255, _RGB > 9, _RGB[..., 0], _RGB[..., :2]]
)
def test_other_dtypes_and_shapes_are_rejected(image):
  with pytest.raises(ValueError, match=r'allowed: uint8.* 1, 3, 4 channels'):
    pixel_formats.to_pillow(image)


def test_grey_of_equal_colours_is_that_colour():
  grey = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
  rgb = pixel_formats.to_pillow(grey.repeat(3, axis=-1))
  converted = pixel_formats.convert(rgb, 1)
  np.testing.assert_array_equal(pixel_formats.to_array(converted), grey)


def test_palettes_and_transparent_colours_have_alpha():
  rgb = _RGB.copy()
  rgb[2, 3] = 1, 2, 3
  key = np.zeros((6, 9), bool)
  key[2, 3] = True
  expected = np.concatenate([rgb, _OPAQUE], axis=-1)
  expected[key] = 0
  decoded = decoding.decode_image(_png(rgb, transparency=(1, 2, 3)), 4)
  np.testing.assert_array_equal(decoded, expected)
  palette = Image.fromarray(key.astype(np.uint8), 'P')
  palette.putpalette([250, 10, 20, 30, 240, 40])
  buffer = io.BytesIO()
  palette.save(buffer, 'PNG', transparency=1)
  decoded = decoding.decode_image(buffer.getvalue(), 4)
  np.testing.assert_array_equal(
      decoded, np.where(key[..., None], 0, [250, 10, 20, 255])
  )


def test_grey_of_16_bits_becomes_8_bits():
  values = np.array([[0, 128, 129, 32768, 65535]], np.uint16)
  buffer = io.BytesIO()
  Image.fromarray(values).save(buffer, 'PNG')
  decoded = decoding.decode_image(buffer.getvalue(), 1)
  assert decoded.dtype == np.uint8
  assert decoded[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_colours_of_transparent_pixels_do_not_bleed_by_resizing():
  image = np.zeros((8, 8, 4), np.uint8)
  image[:, :4] = 200, 0, 0, 255
  image[:, 4:] = 0, 250, 0, 0
  small = transforms.resize(image, (3, 3))
  assert 0 < small[0, 1, 3] < 255
  assert small[..., 1].max() == 0
  # Nor does the transparent half darken the opaque one; the kernel overshoots.
  np.testing.assert_allclose(small[:, :2, 0], 200, atol=10)
  np.testing.assert_array_equal(small, transforms.resize_shorter(image, 3))


def _config(root, source, **overrides):
  config = ml_collections.ConfigDict({
      'source': source, 'name': '', 'data_dir': str(root),
      'train_split': 'train', 'eval_split': 'train', 'image_size': (4, 6),
      'batch_size': 2, 'eval_batch_size': 2, 'resize_shorter': 6,
      'label_names': (), 'crop_scale': (0.5, 1.0), 'flip': False,
      'color_jitter': 0.0, 'max_damaged_share': 0.0, 'cache_mib': 1,
      'num_threads': 1, 'prefetch': 1,
  })  # fmt: skip
  config.update(overrides)
  return config


@pytest.mark.parametrize('channels', [1, 4])
@pytest.mark.parametrize(
    'source', ['folder', 'arrays', 'photos', 'digits', 'synthetic']
)
def test_batches_have_the_channels(tmp_path, source, channels):
  images = {1: _GREY, 4: _clear(_RGBA)}
  folder = tmp_path / 'train'
  folder.mkdir()
  for i in range(3):
    (folder / f'{i}.png').write_bytes(_png(images[channels]))
  np.save(tmp_path / 'train.npy', np.stack(3 * [images[channels]]))
  config = _config(tmp_path, source, channels=channels)
  for split in ('train', 'eval'):
    dataset = data.build_dataset(config, split=split, seed=0)
    batch = next(dataset.iterator())
    assert batch['image'].shape == (2, 4, 6, channels)
    assert batch['image'].dtype == np.uint8
    assert dataset.fingerprint['channels'] == channels
    if source in ('folder', 'arrays') and split == 'eval':
      assert dataset.protocol['channels'] == channels
      expected = transforms.centre_crop(images[channels], (4, 6))
      np.testing.assert_array_equal(batch['image'][0], expected)


def test_rgb_data_have_the_fingerprint_of_earlier_versions(tmp_path):
  config = _config(tmp_path, 'synthetic')
  without = data.build_dataset(config, split='eval', seed=0)
  config.channels = 3
  given = data.build_dataset(config, split='eval', seed=0)
  assert 'channels' not in without.fingerprint
  assert given.fingerprint == without.fingerprint
  assert given.protocol == without.protocol
  np.testing.assert_array_equal(
      next(given.iterator())['image'], next(without.iterator())['image']
  )


def test_arrays_have_the_channels_of_the_config(tmp_path):
  np.save(tmp_path / 'train.npy', np.stack(3 * [_GREY]))
  with pytest.raises(
      ValueError, match=r'images are uint8 \[N, H, W, 4\].*channels to 1 \(grey'
  ):
    data.open_source(_config(tmp_path, 'arrays', channels=4), 'train')
