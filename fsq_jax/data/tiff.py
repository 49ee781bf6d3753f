"""TIFF files in layouts that Pillow reads wrong or not at all.

Pillow decodes JPEG, fax, YCbCr and LAB files and the plain layouts (contiguous
unsigned samples of 8 bits, colour of 16 bits, grey and palettes below 8). For
all others (10, 12, 14 bits, planes, signed and float samples, MinIsWhite with
16 bits or alpha, ...) Pillow only decompresses, and this module reads the
samples from the bytes. Other layouts raise an error that names the layout.
"""

from collections.abc import Iterator
import dataclasses
import functools
import io
import struct

import numpy as np
from PIL import Image
from PIL import UnidentifiedImageError

from fsq_jax.data import image_errors

_ORIENTATION = 0x0112
_USED_TAGS = {
    254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320,
    322, 323, 324, 325, 338, 339, 530,
}
# Integer types of tags, as formats of `struct`.
_TAG_TYPES = {1: 'B', 3: 'H', 4: 'I', 6: 'b', 8: 'h', 9: 'i', 16: 'Q'}
# Compressions of bytes, independent of the samples.
_BYTE_COMPRESSIONS = {
    1: 'no', 5: 'LZW', 8: 'deflate', 32946: 'deflate', 32773: 'PackBits',
    34925: 'LZMA', 50000: 'Zstandard',
}
_OTHER_COMPRESSIONS = {
    2: 'CCITT RLE', 3: 'CCITT fax 3', 4: 'CCITT fax 4', 6: 'old JPEG',
    7: 'JPEG', 34712: 'JPEG 2000', 50001: 'WebP', 50002: 'JPEG XL',
}
_PHOTOMETRICS = {
    0: 'MinIsWhite', 1: 'MinIsBlack', 2: 'RGB', 3: 'palette',
    4: 'transparency mask', 5: 'CMYK', 6: 'YCbCr', 8: 'CIELAB', 9: 'ICCLAB',
    10: 'ITULAB', 32803: 'colour filter array', 32844: 'LogL',
    32845: 'LogLuv', 34892: 'linear raw',
}
_WHITE, _BLACK, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_NUM_COLORS = {
    _WHITE: 1, _BLACK: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3, _LAB: 3
}
# SampleFormat: kind of NumPy dtype; 4 is 'undefined', read as unsigned.
_KINDS = {1: 'u', 2: 'i', 3: 'f', 4: 'u'}
_KIND_NAMES = {'u': 'unsigned', 'i': 'signed', 'f': 'float'}
_ASSOCIATED, _UNASSOCIATED = 1, 2
# Decompressed at once, unless a strip or tile is larger.
_BAND_BYTES = 2**25
# Pillow raises an error for images with more pixels than this.
_MAX_BAND_BYTES = 2 * (Image.MAX_IMAGE_PIXELS or 2**30)


def open_image(data: bytes) -> Image.Image:
  """Opens the first image of a TIFF file.

  Args:
    data: the whole file.

  Returns:
    The image; its pixels may not be decoded yet. Grey of 32 bits, signed or
    float samples has mode 'F', with 1 as full scale.

  Raises:
    DamagedImageError: the layout is not supported; the message names it.
  """
  layout = _read_layout(data)
  image_errors.check_num_pixels(layout.width, layout.height)
  if layout.is_thumbnail:
    raise image_errors.DamagedImageError(
        f'{layout}: the first image is a thumbnail (NewSubfileType 1), as in '
        'raw photographs'
    )
  if layout.is_for_pillow:
    try:
      return Image.open(io.BytesIO(data), formats=('TIFF',))
    except UnidentifiedImageError:  # a layout that it does not know
      pass
  layout.check_supported()
  return layout.read(data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
  """Layout of the samples of an image, with the names of TIFF tags."""

  width: int
  height: int
  bits: tuple[int, ...]  # by sample
  kinds: tuple[str, ...]  # by sample
  photometric: int
  compression: int
  predictor: int
  fill_order: int
  planar: bool
  extra: tuple[int, ...]
  subsampling: tuple[int, ...]
  color_map: tuple[int, ...]
  orientation: int
  is_thumbnail: bool
  byte_order: str
  segment_size: tuple[int, int]  # of strips or tiles: (height, width)
  tiled: bool
  offsets: tuple[int, ...]
  byte_counts: tuple[int, ...]

  def __str__(self) -> str:
    compression = {**_BYTE_COMPRESSIONS, **_OTHER_COMPRESSIONS}.get(
        self.compression, f'unknown ({self.compression})'
    )
    photometric = _PHOTOMETRICS.get(
        self.photometric, f'unknown ({self.photometric})'
    )
    bits = self.bits if len(set(self.bits)) > 1 else self.bits[0]
    kinds = '/'.join(_KIND_NAMES[kind] for kind in sorted(set(self.kinds)))
    return (
        f'TIFF with {photometric} photometric, {len(self.bits)} {kinds} '
        f"{'planar ' if self.planar else ''}samples of {bits} bits, "
        f'{compression} compression'
        + (f', ExtraSamples {self.extra}' if self.extra else '')
        + (f', Predictor {self.predictor}' if self.predictor != 1 else '')
    )

  @property
  def num_colors(self) -> int:
    return _NUM_COLORS.get(self.photometric, 1)

  @property
  def is_for_pillow(self) -> bool:
    """Whether Pillow decodes it correctly."""
    if set(self.kinds) != {'u'} or (self.planar and len(self.bits) > 1):
      return False
    if self.compression not in _BYTE_COMPRESSIONS:
      return True
    # Pillow's reader of uncompressed files is wrong for both.
    if self.planar or self.fill_order == 2:
      return False
    if self.photometric == _LAB:
      return True
    if self.photometric == _YCBCR:
      # Pillow ignores the subsampling of colours in uncompressed files.
      return self.compression != 1 or self.subsampling == (1, 1)
    if self.has_narrow_color_map:
      return False
    bits = set(self.bits)
    return (
        bits == {8}
        or (bits == {16} and self.num_colors > 1 and not self.alpha)
        or (len(self.bits) == 1 and bits <= {1, 2, 4})
    )

  @property
  def has_narrow_color_map(self) -> bool:
    """Whether palette entries have 8 bits, as some old programs wrote them."""
    return self.photometric == _PALETTE and max(self.color_map, default=0) < 256

  @property
  def alpha(self) -> int:
    """Kind of the alpha channel, which follows the colours; 0 for none."""
    # Without ExtraSamples, a fourth sample of RGB is alpha, as for Pillow.
    if (self.photometric, len(self.bits), self.extra) == (_RGB, 4, ()):
      return _UNASSOCIATED
    kind = self.extra[0] if self.extra else 0
    return kind if kind in (_ASSOCIATED, _UNASSOCIATED) else 0

  def check_supported(self) -> None:
    """Raises a DamagedImageError for what `read` does not read."""
    bits, kinds = set(self.bits), set(self.kinds)
    num_samples = len(self.bits)
    is_grey = num_samples == 1 and self.photometric in (_WHITE, _BLACK)
    is_unsigned = kinds == {'u'} and 1 <= min(bits) <= max(bits) <= 16
    unsupported = {
        'the compression': self.compression not in _BYTE_COMPRESSIONS,
        'the photometric interpretation': self.photometric not in (
            _WHITE, _BLACK, _RGB, _PALETTE, _CMYK
        ),
        'samples of several kinds': len(bits) > 1 or len(kinds) > 1,
        'signed, float or 32-bit samples in several channels': (
            not is_unsigned and not is_grey
        ),
        'the number of bits': not (
            is_unsigned
            or (kinds == {'f'} and bits <= {16, 32, 64})
            or (kinds <= {'u', 'i'} and bits <= {8, 16, 32})
        ),
        'the number of samples': (
            num_samples != self.num_colors + len(self.extra)
            and (self.photometric, num_samples, self.extra) != (_RGB, 4, ())
        ),
        'the predictor': self.predictor != 1 and not (
            (self.predictor == 2 and kinds != {'f'} and bits <= {8, 16, 32})
            or (self.predictor == 3 and kinds == {'f'})
        ),
        'the alpha channel': self.photometric == _CMYK and self.alpha != 0,
        'the size of the palette': self.photometric == _PALETTE and (
            len(self.color_map) != 3 << self.bits[0]
        ),
    }  # fmt: skip
    for reason, holds in unsupported.items():
      if holds:
        raise image_errors.DamagedImageError(
            f'{self} is not supported: {reason}'
        )

  def read(self, data: bytes) -> Image.Image:
    """Reads the samples and converts them; see `open_image`."""
    samples = self._read_samples(data)
    if self.kinds[0] != 'u' or self.bits[0] > 16:
      # 32-bit samples have the range of 16 bits, as they are used in practice.
      full = 1 if self.kinds[0] == 'f' else 2 ** min(self.bits[0], 16) - 1
      grey = samples[..., 0].astype(np.float64) / full
      grey = 1 - grey if self.photometric == _WHITE else grey
      image = Image.fromarray(grey.astype(np.float32))
    else:
      image = self._to_image(samples)
    image.getexif()[_ORIENTATION] = self.orientation
    return image

  def _to_image(self, samples: np.ndarray) -> Image.Image:
    """Converts [h, w, samples] unsigned integers of at most 16 bits."""
    channels = 3 if self.photometric == _PALETTE else self.num_colors
    pixels = np.empty((self.height, self.width, channels), np.uint8)
    # Some rows at a time, since alpha needs floats.
    step = max(1, 2**20 // self.width)
    for top in range(0, self.height, step):
      pixels[top : top + step] = self._to_bytes(samples[top : top + step])
    if channels == 1:
      return Image.fromarray(pixels[..., 0])
    return Image.fromarray(pixels, 'CMYK' if channels == 4 else 'RGB')

  def _to_bytes(self, samples: np.ndarray) -> np.ndarray:
    """Converts samples to 8-bit colours, composed over white."""
    full = 2 ** self.bits[0] - 1
    colors = samples[..., : self.num_colors]
    if self.photometric == _PALETTE:
      shift = 0 if self.has_narrow_color_map else 8
      palette = np.array(self.color_map).reshape(3, -1).T >> shift
      colors, full_color = palette[colors[..., 0]], 255
    else:
      full_color = full
    if self.photometric == _WHITE:
      colors = full - colors
    if self.alpha:
      alpha = samples[..., self.num_colors, None] / full
      colors = colors / full_color
      if self.alpha == _UNASSOCIATED:
        colors = colors * alpha
      return np.rint(255 * np.minimum(colors + 1 - alpha, 1))
    if full_color == 65535 and self.num_colors > 1:
      return colors >> 8
    return _make_table(full_color)[colors]

  def _read_samples(self, data: bytes) -> np.ndarray:
    """Returns the samples [h, w, samples] in their stored dtype."""
    num_samples = len(self.bits)
    num_planes = num_samples if self.planar else 1
    planes = np.array_split(range(num_samples), num_planes)
    samples = np.empty((self.height, self.width, num_samples), self._dtype)
    for plane, channels in enumerate(planes):
      for top, rows in self._read_bands(data, plane, len(channels)):
        part = samples[top : top + len(rows), :, channels[0] : channels[-1] + 1]
        part[:] = rows[: len(part), : self.width]
    return samples

  @property
  def _dtype(self) -> np.dtype:
    size = 2 if self.bits[0] % 8 else self.bits[0] // 8
    return np.dtype(f'{self.kinds[0]}{size}')

  def _read_bands(
      self, data: bytes, plane: int, num_samples: int
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (top, [rows, columns, samples]) of a plane, padding included."""
    height, width = self.segment_size
    across, down = -(-self.width // width), -(-self.height // height)
    row_bytes = -(-width * num_samples * self.bits[0] // 8)
    segment_bytes = height * row_bytes
    if segment_bytes * across > _MAX_BAND_BYTES:
      raise image_errors.DamagedImageError(
          f'{self}: strips or tiles of {segment_bytes} bytes are not read'
      )
    if len(self.offsets) < (plane + 1) * across * down:
      raise image_errors.DamagedImageError(
          f'{self}: {len(self.offsets)} strips or tiles are too few'
      )
    step = max(1, _BAND_BYTES // (segment_bytes * across))
    for first in range(0, down, step):
      num_down = min(step, down - first)
      start = (plane * down + first) * across
      numbers = range(start, start + num_down * across)
      segments = [
          data[self.offsets[i] :][: self.byte_counts[i]]
          if i < len(self.byte_counts) else data[self.offsets[i] :]
          for i in numbers
      ]  # fmt: skip
      num_rows = num_down * height
      if not self.tiled:  # the last strip ends with the image
        num_rows = min(num_rows, self.height - first * height)
      band = self._decompress(segments, num_rows, row_bytes, across)
      rows = band.reshape(num_rows * across, row_bytes)
      rows = self._unpack(rows, width, num_samples)
      yield (
          first * height,
          rows.reshape(num_rows, across * width, num_samples),
      )

  def _decompress(
      self, segments: list[bytes], height: int, row_bytes: int, across: int
  ) -> np.ndarray:
    """Returns [height, across * row_bytes] bytes of strips or tiles.

    Pillow decodes them as a new TIFF file, a grey image whose pixels are the
    bytes, which it supports in every compression.
    """
    rows = self.segment_size[0]
    offsets = 8 + np.cumsum([0, *map(len, segments)])
    counts = list(map(len, segments))
    tags = {
        256: [across * row_bytes], 257: [height], 258: [8],
        259: [self.compression], 262: [_BLACK], 266: [self.fill_order],
        277: [1],
    }  # fmt: skip
    if self.tiled:
      tags |= {322: [row_bytes], 323: [rows], 324: offsets[:-1], 325: counts}
    else:
      tags |= {273: offsets[:-1], 278: [rows], 279: counts}
    entries, arrays = [], []
    end = int(offsets[-1])
    position = end + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
      array = np.asarray(values, '<u4').tobytes()
      value = array if len(array) == 4 else struct.pack('<I', position)
      if len(array) > 4:
        arrays.append(array)
        position += len(array)
      entries.append(struct.pack('<HHI', tag, 4, len(array) // 4) + value)
    file = b''.join([
        b'II*\0', struct.pack('<I', end), *segments,
        struct.pack('<H', len(tags)), *entries, bytes(4), *arrays,
    ])  # fmt: skip
    with Image.open(io.BytesIO(file), formats=('TIFF',)) as image:
      return np.asarray(image)

  def _unpack(
      self, rows: np.ndarray, width: int, num_samples: int
  ) -> np.ndarray:
    """Converts [n, bytes] rows to [n, width, samples]."""
    count, bits = width * num_samples, self.bits[0]
    if self.predictor == 3:
      # Differences of bytes; the upper bytes of a row come before the lower.
      rows = rows.reshape(len(rows), -1, num_samples)
      rows = np.cumsum(rows, axis=1, dtype=np.uint8)
      rows = rows.reshape(len(rows), bits // 8, count).swapaxes(1, 2)
      stored = self._dtype.newbyteorder('>')
      values = np.ascontiguousarray(rows).view(stored)
    elif bits % 8:
      values = np.stack([_unpack_bits(row, bits, count) for row in rows])
    else:
      stored = self._dtype.newbyteorder(self.byte_order)
      values = np.ascontiguousarray(rows).view(stored)
    values = values.reshape(len(rows), width, num_samples)
    if self.predictor == 2:
      values = np.cumsum(values, axis=1, dtype=self._dtype)
    return values


@functools.cache
def _make_table(full: int) -> np.ndarray:
  """Returns the 8-bit value of each sample from 0 to `full`."""
  return np.rint(np.arange(full + 1) * 255 / full).astype(np.uint8)


def _unpack_bits(row: np.ndarray, bits: int, count: int) -> np.ndarray:
  """Unpacks big-endian bits into [count] uint16."""
  packed = np.unpackbits(row, count=count * bits).reshape(count, bits)
  padded = np.zeros((count, 16), np.uint8)
  padded[:, 16 - bits :] = packed
  return np.packbits(padded, axis=1).view('>u2')[:, 0]


def _read_tags(data: bytes) -> dict[int, tuple[int, ...]]:
  """Returns the values of the integer tags of the first image."""
  order = _byte_order(data)
  # BigTIFF has 43 where others have 42; everything in it takes 8 bytes.
  if 43 in data[2:4]:
    (start,) = struct.unpack_from(f'{order}Q', data, 8)
    (num_tags,) = struct.unpack_from(f'{order}Q', data, start)
    start, entry, pointer = start + 8, f'{order}HHQ', f'{order}Q'
  else:
    (start,) = struct.unpack_from(f'{order}I', data, 4)
    (num_tags,) = struct.unpack_from(f'{order}H', data, start)
    start, entry, pointer = start + 2, f'{order}HHI', f'{order}I'
  inline = struct.calcsize(pointer)
  value_at = struct.calcsize(entry)
  tags = {}
  for i in range(min(num_tags, 2**16)):
    position = start + i * (value_at + inline)
    tag, kind, count = struct.unpack_from(entry, data, position)
    if tag not in _USED_TAGS or kind not in _TAG_TYPES:
      continue
    position += value_at
    if struct.calcsize(_TAG_TYPES[kind]) * count > inline:
      (position,) = struct.unpack_from(pointer, data, position)
    values = struct.unpack_from(
        f'{order}{count}{_TAG_TYPES[kind]}', data, position
    )
    if values:
      tags[tag] = values
  return tags


def _byte_order(data: bytes) -> str:
  return '<' if data.startswith(b'II') else '>'


def _read_layout(data: bytes) -> _Layout:
  """Reads the tags of the first image, with TIFF's defaults."""
  try:
    tags = _read_tags(data)
  except (struct.error, OverflowError) as error:
    raise image_errors.DamagedImageError(
        'TIFF whose tags lie beyond the end of the file'
    ) from error

  def get_one(tag: int, default: int) -> int:
    return tags.get(tag, (default,))[0]

  width, height = get_one(256, 0), get_one(257, 0)
  if width < 1 or height < 1:
    raise image_errors.DamagedImageError(f'TIFF of {width} x {height} pixels')
  photometric, compression = get_one(262, 0), get_one(259, 1)
  is_jpeg = compression in (6, 7) and photometric in (_RGB, _YCBCR)
  num_samples = get_one(277, 3 if is_jpeg else 1)
  if not 1 <= num_samples <= 16:
    raise image_errors.DamagedImageError(
        f'TIFF with {num_samples} samples per pixel; 1 to 16 are read'
    )
  per_sample = functools.partial(_per_sample, num_samples=num_samples)
  formats = per_sample('SampleFormat', tags.get(339, (1,)))
  unknown = sorted(set(formats) - _KINDS.keys())
  if unknown:
    raise image_errors.DamagedImageError(
        f'TIFF with SampleFormat {unknown}; known are {sorted(_KINDS)}'
    )
  tiled = 273 not in tags and 324 in tags
  rows = min(max(get_one(278, height), 1), height)
  return _Layout(
      width=width,
      height=height,
      bits=per_sample('BitsPerSample', tags.get(258, (1,))),
      kinds=tuple(_KINDS[number] for number in formats),
      photometric=photometric,
      compression=compression,
      predictor=get_one(317, 1),
      fill_order=get_one(266, 1),
      planar=get_one(284, 1) == 2,
      extra=tags.get(338, ()),
      subsampling=tags.get(530, ()),
      color_map=tags.get(320, ()),
      orientation=get_one(_ORIENTATION, 1),
      is_thumbnail=bool(get_one(254, 0) & 1),
      byte_order=_byte_order(data),
      segment_size=(
          (max(get_one(323, 1), 1), max(get_one(322, 1), 1))
          if tiled else (rows, width)
      ),
      tiled=tiled,
      offsets=tags.get(324 if tiled else 273, ()),
      byte_counts=tags.get(325 if tiled else 279, ()),
  )


def _per_sample(name: str, values: tuple, num_samples: int) -> tuple[int, ...]:
  """Returns one value per sample; if all are equal, one is enough."""
  if len(set(values)) == 1:
    values = values[:1] * num_samples
  if len(values) < num_samples:
    raise image_errors.DamagedImageError(
        f'TIFF with {num_samples} samples per pixel, but {name} {values}'
    )
  return values[:num_samples]
