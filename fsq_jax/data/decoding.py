"""Encoded image files to uint8 RGB arrays, with every conversion written down.

Formats: JPEG, PNG, BMP, WebP, GIF, TIFF and PPM/PGM/PBM. Conversions:
  * EXIF orientation is applied; an unreadable EXIF block means upright.
  * Of an animation or a multi-page file the first image is taken.
  * Transparency (alpha channel, palette or colour key) is laid over white.
  * Grey is repeated over the three channels. CMYK, YCbCr and LAB go through
    Pillow's plain conversion; ICC profiles are not applied.
  * 16-bit grey v becomes round(v / 257), so 65535 is 255; it is not clipped.
    32-bit integers are read as 16-bit values, floats as grey in [0, 1];
    a value outside either range makes the file unreadable.
  * 16-bit colour keeps the upper 8 bits (Pillow's reading).
"""

import io

import numpy as np
from PIL import Image
from PIL import UnidentifiedImageError

MAX_PIXELS = 10**8
# More than any format needs for them, at four channels of 16 bits.
MAX_BYTES = 2**30

# Pillow also knows formats that start other programs (EPS); none of those.
_FORMATS = ('JPEG', 'PNG', 'BMP', 'WEBP', 'GIF', 'TIFF', 'PPM')

_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DamagedImageError(ValueError):
  """The bytes are not an image that can be read; the message says why."""


def decode_image(data: bytes) -> np.ndarray:
  """Decodes one image file.

  Args:
    data: the whole file.

  Returns:
    [h, w, 3] uint8 RGB, perhaps read-only.

  Raises:
    DamagedImageError: the file cannot be read, or its header claims more than
      MAX_PIXELS pixels (then nothing of it is decoded).
  """
  try:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
      check_num_pixels(*image.size)
      if image.format == 'PNG':
        # Pillow checks the CRC of pixel data only when asked to.
        with Image.open(io.BytesIO(data), formats=('PNG',)) as unread:
          unread.verify()
      image.load()
      rgb = _to_rgb(image)
      orientation = _read_orientation(image)
    if orientation in _TRANSPOSE:
      rgb = rgb.transpose(_TRANSPOSE[orientation])
    return np.asarray(rgb)
  except (DamagedImageError, MemoryError):
    raise
  except UnidentifiedImageError as error:
    raise DamagedImageError(f'not an image of {_FORMATS}') from error
  except Exception as error:  # Pillow's decoders raise nearly everything.
    raise DamagedImageError(f'{type(error).__name__}: {error}') from error


def check_num_pixels(width: int, height: int) -> None:
  """Raises DamagedImageError for more than MAX_PIXELS pixels."""
  if width * height > MAX_PIXELS:
    raise DamagedImageError(
        f'{width} x {height} pixels are more than the {MAX_PIXELS} allowed'
    )


def check_num_bytes(size: int) -> None:
  """Raises DamagedImageError for a file of more than MAX_BYTES bytes."""
  if size > MAX_BYTES:
    raise DamagedImageError(
        f'{size} bytes are more than the {MAX_BYTES} allowed'
    )


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts a loaded image of any Pillow mode to mode RGB."""
  if image.mode.startswith('I;16'):
    return _grey_to_rgb(np.asarray(image).astype(np.float64) / 65535)
  if image.mode == 'I':
    return _grey_to_rgb(np.asarray(image) / 65535)
  if image.mode == 'F':
    return _grey_to_rgb(np.asarray(image, np.float64))
  has_alpha = image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa')
  if has_alpha or 'transparency' in image.info:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(white, image).convert('RGB')
  return image.convert('RGB')


def _grey_to_rgb(grey: np.ndarray) -> Image.Image:
  """Converts [h, w] floats in [0, 1] to mode RGB."""
  low, high = grey.min(), grey.max()
  if not (low >= 0 and high <= 1):  # also true of NaN
    raise DamagedImageError(
        f'grey values from {low:g} to {high:g} of full range; only 0 to 1 has '
        'a meaning'
    )
  return Image.fromarray(np.rint(grey * 255).astype(np.uint8)).convert('RGB')


def _read_orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(_EXIF_ORIENTATION, 1)
  except Exception:  # the pixels are good whatever the EXIF block holds
    return 1
