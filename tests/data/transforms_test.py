"""One image: transforms against NumPy, and decoding of every kind of file."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from PIL import ImageFile
import pytest

from fsq_jax import data as data_lib
from fsq_jax.data import decoding
from fsq_jax.data import transforms


def _noise(height: int, width: int, channels: int = 3) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, channels), np.uint8)


def _encode(image, format: str = 'PNG', **options) -> bytes:
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  buffer = io.BytesIO()
  image.save(buffer, format, **options)
  return buffer.getvalue()


def _over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
  colour, alpha = colour.astype(int), alpha.astype(int)[..., None]
  return np.rint((colour * alpha + 255 * (255 - alpha)) / 255)


# Transforms.


def _bicubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Antialiased bicubic (a = -1/2) in float64; the same kernel from scratch."""

  def weights(num_in, num_out):
    scale = num_in / num_out
    stretch = max(scale, 1.0)
    centre = (np.arange(num_out)[:, None] + 0.5) * scale
    x = np.abs(np.arange(num_in) + 0.5 - centre) / stretch
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    kernel = np.where(x < 1, near, np.where(x < 2, far, 0))
    return kernel / kernel.sum(1, keepdims=True)

  rows, columns = (
      weights(num_in, num_out)
      for num_in, num_out in zip(image.shape[:2], size, strict=True)
  )
  def to_grey_levels(values):
    return np.clip(np.floor(values + 0.5), 0, 255)

  # Pillow resizes the columns first, and rounds in between.
  image = to_grey_levels(np.einsum('xw,hwc->hxc', columns, image))
  return to_grey_levels(np.einsum('yh,hxc->yxc', rows, image))


@pytest.mark.parametrize('size', [(9, 13), (31, 20), (40, 60)])
def test_resize_is_antialiased_bicubic(size):
  image = _noise(20, 30)
  resized = transforms.resize(image, size)
  difference = np.abs(resized.astype(int) - _bicubic(image, size))
  assert difference.max() <= 1  # Pillow's weights are fixed-point
  assert difference.mean() < 0.01


def test_resize_shorter_keeps_the_aspect():
  assert transforms.resize_shorter(_noise(20, 31), 10).shape == (10, 16, 3)
  assert transforms.resize_shorter(_noise(31, 20), 10).shape == (16, 10, 3)
  image = _noise(20, 31)
  assert transforms.resize_shorter(image, 0) is image
  assert transforms.resize_shorter(image, 20) is image
  with pytest.raises(
      data_lib.DamagedImageError,
      match=r'^3 x 20000 pixels .* become 256 x 1706667 by .*shorter = 256',
  ):
    transforms.resize_shorter(_noise(3, 20_000), 256)


def test_centre_crop_is_exact():
  image = _noise(11, 20)
  np.testing.assert_array_equal(
      data_lib.centre_crop(image, (8, 7)), image[1:9, 6:13]
  )
  np.testing.assert_array_equal(
      data_lib.centre_crop(image, (22, 22)),
      transforms.resize(image[:, 4:15], (22, 22)),
  )
  assert data_lib.centre_crop(_noise(1, 1), (8, 8)).shape == (8, 8, 3)
  assert data_lib.centre_crop(_noise(20_000, 3), (8, 8)).shape == (8, 8, 3)


def test_augment_follows_its_draws():
  image = _noise(40, 50)
  for seed in range(20):
    scale, top, left, flip = np.random.default_rng(seed).random(4)
    side = round(8 * 0.5 * 8**scale)
    top, left = int(top * (41 - side)), int(left * (51 - side))
    expected = transforms.resize(
        image[top : top + side, left : left + side], (8, 8)
    )
    if flip < 0.5:
      expected = np.fliplr(expected)
    crop = transforms.augment(
        image,
        np.random.default_rng(seed),
        size=(8, 8),
        crop_scale=(0.5, 4.0),
        flip=True,
        color_jitter=0.0,
    )
    np.testing.assert_array_equal(crop, expected)


@pytest.mark.parametrize('color_jitter', [0.0, 0.5])
def test_draw_determines_the_augmentation(color_jitter):
  options = {
      'size': (16, 12), 'crop_scale': (0.5, 2.0), 'flip': True,
      'color_jitter': color_jitter,
  }  # fmt: skip
  image = _noise(50, 40)
  flips = set()
  for seed in range(20):
    drawn = data_lib.draw_augmentation(
        image, np.random.default_rng(seed), **options
    )
    top, left, height, width = drawn.crop
    assert 0 <= top <= 50 - height
    assert 0 <= left <= 40 - width
    expected = transforms.resize(
        image[top : top + height, left : left + width], (16, 12)
    )
    if drawn.is_flipped:
      expected = np.fliplr(expected)
    assert (drawn.color is None) == (color_jitter == 0)
    if drawn.color is not None:
      expected = transforms.change_color(expected, **drawn.color)
    np.testing.assert_array_equal(
        transforms.augment(image, np.random.default_rng(seed), **options),
        expected,
    )
    flips.add(drawn.is_flipped)
  assert flips == {False, True}


def test_augment_fits_the_crop_into_the_image():
  image = _noise(5, 9)
  rng = np.random.default_rng(0)
  crops = [
      transforms.augment(
          image,
          rng,
          size=(10, 10),
          crop_scale=(1.0, 3.0),
          flip=False,
          color_jitter=0.0,
      )
      for _ in range(50)
  ]
  expected = {
      transforms.resize(image[:, left : left + 5], (10, 10)).tobytes()
      for left in range(5)
  }
  assert {crop.tobytes() for crop in crops} == expected


def test_colours_turn_about_the_grey_axis():
  image = _noise(6, 7)
  third = 2 * np.pi / 3
  turned = transforms.change_color(image, hue=third, saturation=1, gain=1)
  np.testing.assert_array_equal(turned, np.roll(image, 1, axis=-1))
  grey = np.repeat(image[..., :1], 3, axis=-1)
  same = transforms.change_color(grey, hue=1.0, saturation=1.7, gain=1)
  np.testing.assert_array_equal(same, grey)


def test_saturation_and_gain_against_their_definition():
  image = _noise(6, 7)
  mean = image.mean(-1, keepdims=True)
  expected = 0.8 * (mean + 1.3 * (image - mean))
  changed = transforms.change_color(image, hue=0, saturation=1.3, gain=0.8)
  assert np.abs(changed - np.clip(expected, 0, 255)).max() <= 0.51


def test_jitter_draws_each_quantity_over_its_range():
  image = np.full((4, 4, 3), (130, 110, 100), np.uint8)
  options = {'size': (4, 4), 'crop_scale': (1.0, 1.0), 'flip': False}
  crops = [
      transforms.augment(
          image, np.random.default_rng(seed), color_jitter=0.5, **options
      )
      for seed in range(200)
  ]
  brightness = np.array([crop.mean() for crop in crops]) / image.mean()
  assert 0.74 < brightness.min() < 0.8
  assert 1.2 < brightness.max() < 1.26
  reddest = {int(crop[0, 0].argmax()) for crop in crops}
  assert reddest == {0, 1, 2}  # a quarter turn either way
  identical = transforms.augment(
      image, np.random.default_rng(0), color_jitter=0.0, **options
  )
  np.testing.assert_array_equal(identical, image)


# Decoding.


@pytest.mark.parametrize('format', ['PNG', 'BMP', 'TIFF', 'PPM', 'WEBP'])
def test_lossless_formats_decode_exactly(format):
  image = _noise(5, 7)
  options = {'lossless': True} if format == 'WEBP' else {}
  decoded = decoding.decode_image(_encode(image, format, **options))
  assert decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded, image)


@pytest.mark.parametrize('format', ['PNG', 'TIFF'])
@pytest.mark.parametrize(
    ('orientation', 'upright'),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: np.rot90(x, -1)[:, ::-1]),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x)[:, ::-1]),
        (8, lambda x: np.rot90(x)),
        (99, lambda x: x),
    ],
)
def test_exif_orientation_is_applied(format, orientation, upright):
  exif = Image.Exif()
  exif[0x0112] = orientation
  image = _noise(5, 7)
  decoded = decoding.decode_image(_encode(image, format, exif=exif))
  np.testing.assert_array_equal(decoded, upright(image))


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_unreadable_exif_means_upright():
  image = _noise(5, 7)
  for block in (b'Exif\0\0MM\0*\xff\xff\xff\xff', b'Exif\0\0junk', b'Exif\0\0'):
    decoded = decoding.decode_image(_encode(image, exif=block))
    np.testing.assert_array_equal(decoded, image)


def test_grey_is_repeated():
  grey = _noise(5, 7)[..., 0]
  np.testing.assert_array_equal(
      decoding.decode_image(_encode(grey)), np.stack([grey] * 3, -1)
  )
  binary = Image.fromarray(grey > 128)
  assert binary.mode == '1'
  np.testing.assert_array_equal(
      decoding.decode_image(_encode(binary))[..., 1], (grey > 128) * 255
  )


def test_transparency_lies_over_white():
  rgba = _noise(40, 50, 4)
  np.testing.assert_array_equal(
      decoding.decode_image(_encode(rgba)),
      _over_white(rgba[..., :3], rgba[..., 3]),
  )
  grey_alpha = _noise(40, 50, 2)
  grey = np.stack([grey_alpha[..., 0]] * 3, -1)
  np.testing.assert_array_equal(
      decoding.decode_image(_encode(Image.fromarray(grey_alpha, 'LA'))),
      _over_white(grey, grey_alpha[..., 1]),
  )


@pytest.mark.parametrize('format', ['PNG', 'GIF'])
def test_palettes_keep_colours_and_transparency(format):
  places = _noise(6, 6)[..., 0] % 3
  colours = np.array([[250, 10, 20], [30, 240, 40], [5, 60, 230]], np.uint8)
  image = Image.fromarray(places, 'P')
  image.putpalette(colours.tobytes())
  expected = colours[places]
  np.testing.assert_array_equal(
      decoding.decode_image(_encode(image, format)), expected
  )
  expected[places == 1] = 255
  np.testing.assert_array_equal(
      decoding.decode_image(_encode(image, format, transparency=1)), expected
  )


def test_a_transparent_colour_lies_over_white():
  image = _noise(6, 6)
  image[2, 3] = image[4, 5] = (1, 2, 3)
  decoded = decoding.decode_image(_encode(image, transparency=(1, 2, 3)))
  image[2, 3] = image[4, 5] = 255
  np.testing.assert_array_equal(decoded, image)


def test_cmyk_is_multiplied_out():
  cmyk = _noise(40, 50, 4)
  data = _encode(Image.fromarray(cmyk, 'CMYK'), 'TIFF')
  ink = 255 - cmyk.astype(int)
  np.testing.assert_array_equal(
      decoding.decode_image(data), np.rint(ink[..., :3] * ink[..., 3:] / 255)
  )


@pytest.mark.parametrize(
    ('format', 'dtype'),
    [('PNG', '<u2'), ('TIFF', '<u2'), ('TIFF', '>u2'), ('PPM', '<u2'),
     ('TIFF', '<i4')],
)
def test_deep_grey_is_scaled_not_clipped(format, dtype):
  values = np.array([[0, 128, 129, 257], [1000, 32768, 65534, 65535]])
  decoded = decoding.decode_image(_encode(values.astype(dtype), format))
  expected = [[0, 0, 1, 1], [4, 128, 255, 255]]
  np.testing.assert_array_equal(decoded, np.stack([expected] * 3, -1))


def test_float_grey_is_full_scale_at_one():
  values = np.array([[0, 0.25, 1]], np.float32)
  decoded = decoding.decode_image(_encode(values, 'TIFF'))
  assert decoded[0, :, 0].tolist() == [0, 64, 255]
  for wrong in (255.0, -0.1, np.nan):
    values[0, 1] = wrong
    with pytest.raises(data_lib.DamagedImageError, match=r'in \[0, 1\]'):
      decoding.decode_image(_encode(values, 'TIFF'))


@pytest.mark.parametrize('format', ['GIF', 'PNG', 'TIFF'])
def test_the_first_of_several_images_is_taken(format):
  frames = [
      Image.fromarray(np.full((4, 4, 3), value, np.uint8))
      for value in (10, 200)
  ]
  data = _encode(frames[0], format, save_all=True, append_images=frames[1:])
  assert Image.open(io.BytesIO(data)).n_frames == 2
  assert (decoding.decode_image(data) == 10).all()


def _claim(width: int, height: int) -> bytes:
  """A PNG whose header claims a size and whose pixels are missing."""

  def chunk(kind, content):
    checksum = struct.pack('>I', zlib.crc32(kind + content))
    return struct.pack('>I', len(content)) + kind + content + checksum

  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return b''.join([
      b'\x89PNG\r\n\x1a\n',
      chunk(b'IHDR', header),
      chunk(b'IDAT', zlib.compress(b'')),
      chunk(b'IEND', b''),
  ])


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('size', [(12_000, 10_000), (50_000, 50_000)])
def test_oversized_images_are_rejected_before_decoding(monkeypatch, size):
  loads = []
  monkeypatch.setattr(
      ImageFile.ImageFile, 'load', lambda self: loads.append(self)
  )
  with pytest.raises(data_lib.DamagedImageError, match='pixels'):
    decoding.decode_image(_claim(*size))
  assert not loads


def _damage(kind: str) -> bytes:
  jpeg, png = _encode(_noise(60, 60), 'JPEG'), _encode(_noise(60, 60))
  if kind == 'wrong checksum':
    # Only the checksum of the pixel chunk is wrong: the pixels would decode.
    start = png.index(b'IDAT')
    end = start + 4 + int.from_bytes(png[start - 4 : start], 'big')
    return png[:end] + bytes([png[end] ^ 1]) + png[end + 1 :]
  return {
      'no bytes': b'',
      'zero bytes': bytes(1000),
      'text': b'<html>404 not found</html>',
      'truncated JPEG': jpeg[: len(jpeg) // 2],
      'truncated PNG': png[: len(png) // 2],
      'header only': png[:33],
      'another format': _encode(_noise(6, 6), 'PCX'),
  }[kind]


@pytest.mark.parametrize(
    'kind',
    ['no bytes', 'zero bytes', 'text', 'truncated JPEG', 'truncated PNG',
     'header only', 'another format', 'wrong checksum'],
)
def test_corrupted_images_are_rejected(kind):
  with pytest.raises(data_lib.DamagedImageError):
    decoding.decode_image(_damage(kind))
