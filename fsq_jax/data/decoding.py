"""Decodes image files to uint8 arrays; lists every conversion.

Formats: JPEG (also MPO), PNG (also APNG), BMP, WebP, GIF, TIFF, PPM, PGM, PBM,
grey PFM, JPEG 2000, AVIF and ICO, as far as the installed Pillow reads them.
The first bytes of a file decide which it is, not its name. Conversions:
  * EXIF orientation is applied; an unreadable EXIF block means upright.
  * Of an animation or a multi-page file the first image is taken; of an icon
    the largest.
  * The result has the channels that are asked for, whatever the file has, by
    `pixel_formats.convert`: for RGB, transparency is composed over white and
    grey is repeated.
  * Transparency is an alpha channel, a palette or a colour key, which is
    compared at the full depth of the file.
  * CMYK, YCbCr and LAB go through Pillow's plain conversion to RGB; ICC
    profiles are not applied. CMYK of JPEG is taken as inverted, as Adobe writes
    it.
  * n-bit samples v become round(v * 255 / (2^n - 1)), so 16-bit grey is
    round(v / 257) and 65535 is 255; it is not clipped. MinIsWhite is inverted.
  * 16-bit colour, and in PNG 16-bit alpha, keep the upper 8 bits (Pillow's
    reading). In TIFF, alpha of other than 8 bits is applied at full depth.
  * 32-bit integers are read as 16-bit values, signed integers as unsigned ones,
    floats as grey in [0, 1]; a value outside the range is an error, and so is
    more than one channel.
  * A 16-bit palette of a TIFF file keeps the upper 8 bits, or all where no
    entry is above 255.
"""

import functools
import io
import zlib

import numpy as np
from PIL import Image
from PIL import UnidentifiedImageError
from PIL import features

from fsq_jax.data import image_errors
from fsq_jax.data import pixel_formats
from fsq_jax.data import tiff

# Bytes that `identify` needs.
PREFIX_BYTES = 64
# First bytes, by Pillow's name of the format. Pillow's formats that run other
# programs (EPS) or have no signature (TGA) are not read.
_SIGNATURES = {
    'JPEG': (b'\xff\xd8\xff',),
    'PNG': (b'\x89PNG\r\n\x1a\n',),
    'BMP': (b'BM',),
    'GIF': (b'GIF87a', b'GIF89a'),
    'TIFF': (
        b'II*\0', b'MM\0*', b'II\0*', b'MM*\0', b'II+\0', b'MM\0+',
    ),
    'PPM': tuple(
        kind + space
        for kind in (b'P1', b'P2', b'P3', b'P4', b'P5', b'P6', b'Pf')
        for space in (b' ', b'\t', b'\n', b'\r', b'#')
    ),
    'JPEG2000': (
        b'\xff\x4f\xff\x51', b'\0\0\0\x0cjP  \r\n\x87\n',
    ),
    'ICO': (b'\0\0\1\0',),
}
# Image formats that are not supported, for messages.
_UNREAD_SIGNATURES = {
    'JPEG XL': (b'\xff\x0a', b'\0\0\0\x0cJXL \r\n\x87\n'),
    'PAM': (b'P7\n',),
    'colour PFM': (b'PF\n', b'PF\r', b'PF '),
    'Photoshop': (b'8BPS',),
    'EPS': (b'%!PS', b'\xc5\xd0\xd3\xc6'),
    'OpenEXR': (b'\x76\x2f\x31\x01',),
    'Radiance HDR': (b'#?RADIANCE', b'#?RGBE'),
    'QOI': (b'qoif',),
    'DDS': (b'DDS ',),
    'cursor': (b'\0\0\2\0',),
}
# Formats that Pillow may have been built without, and its names of features.
_OPTIONAL = {'WEBP': 'webp', 'AVIF': 'avif', 'JPEG2000': 'jpg_2000'}
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


def identify(prefix: bytes) -> str | None:
  """Returns the image format of a file by its first PREFIX_BYTES bytes.

  Returns:
    Pillow's name of a format of `readable_formats`, another name of an image
    format that is not supported, or None for an unknown format.
  """
  for signatures in (_SIGNATURES, _UNREAD_SIGNATURES):
    for name, starts in signatures.items():
      if prefix.startswith(starts):
        return name
  if prefix.startswith(b'RIFF') and prefix[8:12] == b'WEBP':
    return 'WEBP'
  if prefix[4:8] == b'ftyp':
    brands = prefix[8:12] + prefix[16 : int.from_bytes(prefix[:4], 'big')]
    brands = {brands[i : i + 4] for i in range(0, len(brands), 4)}
    if brands & {b'avif', b'avis'}:
      return 'AVIF'
    if brands & {b'heic', b'heix', b'heim', b'heis', b'hevc', b'mif1', b'msf1'}:
      return 'HEIC'
  return None


@functools.cache
def readable_formats() -> frozenset[str]:
  """Returns Pillow's names of the formats that are read here."""
  missing = {
      name
      for name, feature in _OPTIONAL.items()
      if feature not in {**features.modules, **features.codecs}
      or not features.check(feature)
  }
  return frozenset({*_SIGNATURES, *_OPTIONAL} - missing)


def decode_image(data: bytes, channels: int = 3) -> np.ndarray:
  """Decodes one image file.

  Args:
    data: the whole file.
    channels: 1 (grey), 3 (RGB) or 4 (RGBA).

  Returns:
    [h, w, channels] uint8, perhaps read-only.

  Raises:
    DamagedImageError: as by `decode_to_pillow`.
  """
  return pixel_formats.to_array(decode_to_pillow(data, channels))


def decode_to_pillow(data: bytes, channels: int = 3) -> Image.Image:
  """Decodes one image file; conversions to NumPy copy and hold the GIL.

  Args:
    data: the whole file.
    channels: 1 (grey), 3 (RGB) or 4 (RGBA).

  Returns:
    An image of mode pixel_formats.MODES[channels].

  Raises:
    DamagedImageError: the file cannot be read, or its header claims more than
      MAX_PIXELS pixels (then nothing of it is decoded).
  """
  try:
    with _open(data) as image:
      image_errors.check_num_pixels(*image.size)
      if image.format == 'PNG':
        _check_png(data)
      image.load()
      is_key = _find_key_pixels(image, data)
      colours = _to_colours(image)
      orientation = _read_orientation(image)
    if is_key is not None:
      colours.putalpha(Image.fromarray(~is_key))
    colours = pixel_formats.convert(colours, channels)
    if orientation in _TRANSPOSE:
      colours = colours.transpose(_TRANSPOSE[orientation])
    return colours
  except (image_errors.DamagedImageError, MemoryError):
    raise
  except Exception as error:  # Pillow's decoders raise nearly everything.
    raise image_errors.DamagedImageError(
        f'{type(error).__name__}: {error}'
    ) from error


def _open(data: bytes) -> Image.Image:
  """Opens a file in the format given by its first bytes."""
  name = identify(data[:PREFIX_BYTES])
  if name is None:
    what = 'an empty file' if not data else f'a file that starts {data[:8]!r}'
    raise image_errors.DamagedImageError(
        f'{what} is not an image of a known format; known: '
        f'{", ".join(sorted(readable_formats()))}'
    )
  if name not in readable_formats():
    raise image_errors.DamagedImageError(
        f'{name} images are not supported; convert the file to PNG'
    )
  if name == 'TIFF':
    return tiff.open_image(data)
  try:
    return Image.open(io.BytesIO(data), formats=(name,))
  except UnidentifiedImageError as error:
    reason = _find_reason(name, data)
    raise image_errors.DamagedImageError(
        f'Pillow cannot open this {name} file: {reason}'
    ) from error


def _check_png(data: bytes) -> None:
  """Checks the CRC of all chunks of a PNG file.

  Pillow skips the chunks of pixels, and its `verify` needs a second image,
  which takes a quarter of the time of a small file.
  """
  view = memoryview(data)
  start = 8
  while (kind := data[start + 4 : start + 8]) != b'IEND':
    end = start + 8 + int.from_bytes(data[start : start + 4])
    crc = zlib.crc32(view[start + 4 : end])
    if data[end : end + 4] != crc.to_bytes(4):
      raise image_errors.DamagedImageError(
          f'PNG chunk {kind!r} at byte {start} has a wrong checksum or is cut'
          ' off'
          if kind
          else 'the end of the PNG file is missing'
      )
    start = end + 4


def _find_reason(name: str, data: bytes) -> str:
  """Returns the error message of a format's reader, hidden by Image.open."""
  try:
    Image.OPEN[name][0](io.BytesIO(data), '')
  except Exception as error:
    return str(error) or type(error).__name__
  return 'unknown reason'


def _find_key_pixels(image: Image.Image, data: bytes) -> np.ndarray | None:
  """Finds the pixels of a PNG file that have the transparent colour (tRNS).

  Pillow compares the colour with samples that it has scaled to 8 bits, so the
  comparison is made here and the colour is removed from `image.info`.

  Args:
    image: as decoded.
    data: the whole file.

  Returns:
    [h, w] bool; None where there is no such colour.
  """
  if image.format != 'PNG' or image.mode not in ('1', 'L', 'I;16', 'RGB'):
    return None
  key = image.info.pop('transparency', None)
  if key is None:
    return None
  bits = data[24]  # of IHDR, which is the first chunk
  samples = np.asarray(image).astype(np.int32)
  if image.mode == '1':
    return samples == key // 255
  if image.mode == 'RGB' and bits == 16:
    with Image.open(io.BytesIO(data), formats=('PNG',)) as lower:
      # Pillow's reader of little-endian samples keeps the second byte.
      lower.tile = [(*tile[:3], 'RGB;16L') for tile in lower.tile]
      samples = (samples << 8) + np.asarray(lower)
  scale = 1 if bits >= 8 else 255 // (2**bits - 1)
  is_key = samples == scale * (np.array(key) & (2**bits - 1))
  return is_key.all(axis=-1) if image.mode == 'RGB' else is_key


def _to_colours(image: Image.Image) -> Image.Image:
  """Converts any Pillow mode to RGB, or with transparency to RGBA."""
  if image.mode.startswith('I;16'):
    return _grey_to_rgb(np.asarray(image).astype(np.float64) / 65535)
  if image.mode == 'I':
    return _grey_to_rgb(np.asarray(image) / 65535)
  if image.mode == 'F':
    return _grey_to_rgb(np.asarray(image, np.float64))
  if image.mode == 'La':
    image = image.convert('LA')
  has_alpha = image.mode in ('LA', 'PA', 'RGBA', 'RGBa')
  if has_alpha or 'transparency' in image.info:
    return image.convert('RGBA')
  return image if image.mode == 'RGB' else image.convert('RGB')


def _grey_to_rgb(grey: np.ndarray) -> Image.Image:
  """Converts [h, w] floats in [0, 1] to mode RGB."""
  low, high = grey.min(), grey.max()
  if not (low >= 0 and high <= 1):  # also true of NaN
    raise image_errors.DamagedImageError(
        f'grey values from {low:g} to {high:g} of full range; they must be in '
        '[0, 1]'
    )
  return Image.fromarray(np.rint(grey * 255).astype(np.uint8)).convert('RGB')


def _read_orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(_EXIF_ORIENTATION, 1)
  except Exception:  # the pixels are good whatever the EXIF block holds
    return 1
