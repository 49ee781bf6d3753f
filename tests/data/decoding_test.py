"""Decoding of TIFF, PNG and other files of every layout, against NumPy.

The writers below are short on purpose: they know nothing of Pillow.
"""

import io
import itertools
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image
import pytest
import skimage.data
import tifffile

from fsq_jax import data as data_lib
from fsq_jax.data import decoding
from fsq_jax.data import image_errors

_IMAGES = pathlib.Path(__file__).parents[1] / 'testdata' / 'images'
_WHITE, _BLACK, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_COMPRESSIONS = {'none': 1, 'LZW': 5, 'deflate': 8, 'PackBits': 32773}


def _pack(values, bits: int):
  """Converts [n, k] integers to [n, bytes], highest bit first."""
  shifts = np.arange(bits - 1, -1, -1)
  each_bit = (values[..., None].astype(np.int64) >> shifts) & 1
  return np.packbits(each_bit.reshape(len(values), -1).astype(np.uint8), axis=1)


def _compress(data: bytes, compression: str) -> bytes:
  if compression == 'deflate':
    return zlib.compress(data)
  if compression == 'PackBits':  # literal runs
    runs = [data[i : i + 128] for i in range(0, len(data), 128)]
    return b''.join(bytes([len(run) - 1]) + run for run in runs)
  if compression == 'LZW':  # literals, cleared before codes need 10 bits
    codes = []
    for i in range(0, len(data), 250):
      codes += [256, *data[i : i + 250]]
    return _pack(np.array([[*codes, 257]]), 9).tobytes()
  return data


def _difference(values, predictor: int, bits: int):
  """Applies a predictor to [rows, columns, samples]."""
  if predictor == 2:
    values = np.diff(values.astype(np.int64), axis=1, prepend=0) % 2**bits
  return values


def _write_tiff(
    samples, *, bits, photometric, order='<', planar=False, tile=None,
    big=False, compression='none', extra=(), fill_order=1, predictor=1,
    rows=None, color_map=None, tags=None,
):  # fmt: skip
  """Writes [h, w, samples] integers or floats as a TIFF file."""
  height, width, num_samples = samples.shape

  def encode(block):
    block = _difference(block, predictor, bits)
    if block.dtype.kind == 'f':
      data = block.astype(f'{order}f{bits // 8}')
      if predictor == 3:
        parts = data.astype(data.dtype.newbyteorder('>')).view(np.uint8)
        parts = parts.reshape(len(block), -1, bits // 8).swapaxes(1, 2)
        parts = parts.reshape(len(block), -1, num_samples)
        data = np.diff(parts, axis=1, prepend=np.uint8(0))
    elif bits % 8:
      data = _pack(block.reshape(len(block), -1), bits)
    else:
      data = (block.astype(np.int64) % 2**bits).astype(f'{order}u{bits // 8}')
    data = _compress(data.tobytes(), compression)
    if fill_order == 2:
      reverse = bytes(int(f'{i:08b}'[::-1], 2) for i in range(256))
      data = data.translate(reverse)
    return data

  planes = np.split(samples, num_samples, axis=-1) if planar else [samples]
  if tile:
    pads = ((0, -height % tile[0]), (0, -width % tile[1]), (0, 0))
    planes = [np.pad(plane, pads) for plane in planes]
    segments = [
        encode(plane[top : top + tile[0], left : left + tile[1]])
        for plane in planes
        for top in range(0, height, tile[0])
        for left in range(0, width, tile[1])
    ]
  else:
    rows = rows or height
    segments = [
        encode(plane[top : top + rows])
        for plane in planes
        for top in range(0, height, rows)
    ]
  start = 16 if big else 8
  offsets = (start + np.cumsum([0, *map(len, segments)])).tolist()
  end = offsets.pop()
  counts = [len(segment) for segment in segments]
  kind = {'u': 1, 'i': 2, 'f': 3}[samples.dtype.kind]
  entries = {
      256: [width], 257: [height], 258: [bits] * num_samples,
      259: [_COMPRESSIONS[compression]], 262: [photometric],
      266: [fill_order], 277: [num_samples], 284: [1 + planar],
      317: [predictor], 339: [kind] * num_samples,
  }  # fmt: skip
  if tile:
    entries |= {322: [tile[1]], 323: [tile[0]], 324: offsets, 325: counts}
  else:
    entries |= {273: offsets, 278: [rows], 279: counts}
  if extra:
    entries[338] = list(extra)
  if color_map is not None:
    entries[320] = list(color_map)
  entries |= tags or {}
  return _assemble_tiff(entries, b''.join(segments), end, order, big)


def _assemble_tiff(entries, pixels, end, order, big):
  """Puts header, pixels and tags of type LONG together."""
  word, entry = ('Q', 20) if big else ('I', 12)
  size = struct.calcsize(word)
  position = end + (16 if big else 6) + entry * len(entries)
  directory, arrays = b'', b''
  for tag, values in sorted(entries.items()):
    array = struct.pack(f'{order}{len(values)}I', *values)
    directory += struct.pack(f'{order}HH{word}', tag, 4, len(values))
    if len(array) > size:
      directory += struct.pack(f'{order}{word}', position + len(arrays))
      arrays += array
    else:
      directory += array.ljust(size, b'\0')
  header = b'II' if order == '<' else b'MM'
  if big:
    header += struct.pack(f'{order}HHHQ', 43, 8, 0, end)
  else:
    header += struct.pack(f'{order}HI', 42, end)
  count = struct.pack(f'{order}{"Q" if big else "H"}', len(entries))
  return header + pixels + count + directory + bytes(size) + arrays


def _white_over(colors, alpha):
  return colors * alpha + 255 * (1 - alpha)


def _expect(samples, *, bits, photometric, extra, color_map):
  """The conversions that decoding.py documents, in floats."""
  full = 2**bits - 1
  num_colors = 3 if photometric == _RGB else 1
  alpha = samples[..., num_colors:][..., :1] / full
  colors = samples[..., :num_colors] * 255 / full
  if photometric == _WHITE:
    colors = 255 - colors
  elif photometric == _PALETTE:
    colors = np.reshape(color_map, (3, -1)).T[samples[..., 0]] / 257
  if extra == (1,):
    colors = colors + 255 * (1 - alpha)
  elif extra == (2,):
    colors = _white_over(colors, alpha)
  elif bits == 16 and photometric == _RGB:
    colors = samples[..., :3] >> 8
  return np.broadcast_to(colors, (*samples.shape[:2], 3))


def _save(image, format, **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def _check(data: bytes, expected, tolerance: float = 0.51):
  decoded = decoding.decode_image(data)
  assert decoded.shape == expected.shape
  assert decoded.dtype == np.uint8
  assert np.abs(decoded - expected.astype(np.float64)).max() <= tolerance


def _check_lossy(data: bytes, expected):
  decoded = decoding.decode_image(data)
  assert decoded.shape == expected.shape
  assert np.abs(decoded - expected.astype(np.float64)).mean() < 6


# TIFF.


def _sample(rng, bits, num_samples, extra=()):
  samples = rng.integers(0, 2**bits, (11, 37, num_samples), dtype=np.uint64)
  if extra == (1,):  # colours are multiplied by alpha
    samples[..., :-1] = np.minimum(samples[..., :-1], samples[..., -1:])
  return samples


_LAYOUTS = [
    {'compression': compression, **layout}
    for layout in (
        {}, {'rows': 4}, {'tile': (16, 16)}, {'rows': 4, 'fill_order': 2}
    )
    for compression in _COMPRESSIONS
] + [{'big': True}, {'big': True, 'tile': (16, 32)}]


_OTHER_BITS = (1, 2, 4, 6, 10, 14, 16)


@pytest.mark.parametrize(
    ('photometric', 'num_samples', 'extra'),
    [(_WHITE, 1, ()), (_BLACK, 1, ()), (_RGB, 3, ()), (_PALETTE, 1, ()),
     (_WHITE, 2, (2,)), (_BLACK, 2, (2,)), (_BLACK, 2, (1,)),
     (_BLACK, 2, (0,)), (_RGB, 4, (2,)), (_RGB, 4, (1,)), (_RGB, 4, (0,)),
     (_PALETTE, 2, (2,))],
)  # fmt: skip
@pytest.mark.parametrize(
    'bits',
    [8, 12, *(pytest.param(x, marks=pytest.mark.slow) for x in _OTHER_BITS)],
)
def test_tiff_of_unsigned_samples(photometric, num_samples, extra, bits):
  rng = np.random.default_rng(bits)
  samples = _sample(rng, bits, num_samples, extra)
  color_map = None
  if photometric == _PALETTE:
    color_map = rng.integers(0, 256, 3 << bits) * 257
  kind = {'bits': bits, 'photometric': photometric, 'extra': extra}
  expected = _expect(samples, color_map=color_map, **kind)
  # Pillow composes 8-bit colours in whole numbers.
  tolerance = 1.01 if bits == 8 else 0.51
  # Samples that are not of whole bytes are unpacked alike, and large palettes
  # take long to write.
  layouts = _LAYOUTS if bits in (1, 8, 12, 16) else _LAYOUTS[bits % 3 :: 3]
  if photometric == _PALETTE and bits > 8:
    layouts = _LAYOUTS[bits % 5 :: 5]
  for layout, order, planar in itertools.product(
      layouts, '<>', (False, True)
  ):
    data = _write_tiff(
        samples, color_map=color_map, order=order, planar=planar, **kind,
        **layout,
    )  # fmt: skip
    _check(data, expected, tolerance)


@pytest.mark.parametrize('bits', [8, 16, 32])
@pytest.mark.parametrize('kind', 'ui')
def test_tiff_of_integers_with_and_without_predictor(kind, bits):
  rng = np.random.default_rng(0)
  top = 2 ** min(bits, 16) if kind == 'u' else 2 ** min(bits - 1, 16)
  samples = rng.integers(0, top, (11, 37, 1)).astype(f'{kind}8')
  expected = np.repeat(samples * 255 / (2 ** min(bits, 16) - 1), 3, axis=-1)
  for order, tile, predictor in itertools.product(
      '<>', (None, (16, 16)), (1, 2)
  ):
    data = _write_tiff(
        samples, bits=bits, photometric=_BLACK, order=order, tile=tile,
        compression='LZW', predictor=predictor,
    )  # fmt: skip
    _check(data, expected)


@pytest.mark.parametrize('bits', [8, 16, 32])
def test_negative_samples_are_refused(bits):
  samples = np.full((3, 4, 1), -1)
  data = _write_tiff(samples, bits=bits, photometric=_BLACK)
  with pytest.raises(data_lib.DamagedImageError, match=r'in \[0, 1\]'):
    decoding.decode_image(data)


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('planar', [False, True])
def test_tiff_of_colour_with_predictor(bits, planar):
  samples = _sample(np.random.default_rng(0), bits, 3)
  kind = {'bits': bits, 'photometric': _RGB}
  expected = _expect(samples, extra=(), color_map=None, **kind)
  for order, tile in itertools.product('<>', (None, (16, 16))):
    data = _write_tiff(
        samples, order=order, tile=tile, planar=planar, predictor=2,
        compression='deflate', **kind,
    )  # fmt: skip
    _check(data, expected)


@pytest.mark.parametrize('bits', [16, 32, 64])
@pytest.mark.parametrize('photometric', [_WHITE, _BLACK])
def test_tiff_of_floats(bits, photometric):
  samples = np.random.default_rng(0).random((11, 37, 1)).astype(f'f{bits // 8}')
  expected = np.repeat(samples.astype(np.float64) * 255, 3, axis=-1)
  expected = 255 - expected if photometric == _WHITE else expected
  for order, tile, predictor in itertools.product(
      '<>', (None, (16, 16)), (1, 3)
  ):
    data = _write_tiff(
        samples, bits=bits, photometric=photometric, order=order, tile=tile,
        compression='deflate', predictor=predictor,
    )  # fmt: skip
    _check(data, expected, 0.52)


@pytest.mark.parametrize('planar', [False, True])
@pytest.mark.parametrize('bits', [8, 16])
def test_tiff_of_cmyk(planar, bits):
  samples = _sample(np.random.default_rng(0), bits, 4)
  ink = 255 - (samples >> (bits - 8)).astype(np.float64)
  for order, compression in itertools.product('<>', ('none', 'deflate')):
    data = _write_tiff(
        samples, bits=bits, photometric=_CMYK, order=order, planar=planar,
        compression=compression,
    )  # fmt: skip
    _check(data, ink[..., :3] * ink[..., 3:] / 255, 1.01)


def test_tiff_palette_of_8_bits():
  samples = _sample(np.random.default_rng(0), 4, 1)
  colors = np.random.default_rng(1).integers(0, 256, (16, 3))
  data = _write_tiff(
      samples, bits=4, photometric=_PALETTE, color_map=colors.T.ravel()
  )
  _check(data, colors[samples[..., 0]])


def test_tiff_orientation_where_the_samples_are_read_here():
  samples = _sample(np.random.default_rng(0), 10, 1)
  data = _write_tiff(samples, bits=10, photometric=_BLACK, tags={274: [6]})
  expected = np.rot90(samples[..., 0] * 255 / 1023, -1)
  _check(data, np.stack([expected] * 3, -1))


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('planar', [False, True])
def test_the_tiff_writer_against_tifffile(order, planar):
  for bits, big, tile, compression in itertools.product(
      (8, 16), (False, True), (None, (16, 16)), ('none', 'deflate')
  ):
    samples = _sample(np.random.default_rng(0), bits, 3)
    data = _write_tiff(
        samples, bits=bits, photometric=_RGB, order=order, planar=planar,
        big=big, tile=tile, compression=compression,
    )  # fmt: skip
    read = tifffile.imread(io.BytesIO(data))
    read = np.moveaxis(read, 0, -1) if planar else read
    np.testing.assert_array_equal(read, samples)


def _tiff(num_samples=1, bits=10, photometric=_BLACK, **options):
  samples = _sample(np.random.default_rng(0), min(bits, 16), num_samples)
  return _write_tiff(samples, bits=bits, photometric=photometric, **options)


def _float_tiff(num_samples, photometric):
  samples = np.zeros((3, 4, num_samples), np.float32)
  return _write_tiff(samples, bits=32, photometric=photometric)


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (_tiff(tags={259: [50002]}), '1 unsigned samples of 10 bits, JPEG XL '
         'compression is not supported: the compression'),
        (_tiff(tags={259: [4711]}), r'unknown \(4711\) compression'),
        (_tiff(tags={258: [24]}), '24 bits.*the number of bits'),
        (_tiff(tags={258: [0]}), '0 bits.*the number of bits'),
        (_tiff(tags={262: [34892]}), 'linear raw photometric'),
        (_tiff(tags={317: [2]}), 'Predictor 2 is not supported: the predic'),
        (_tiff(tags={339: [2]}), 'signed samples of 10 bits'),
        (_tiff(tags={339: [6]}), r'SampleFormat \[6\]'),
        (_tiff(2), 'the number of samples'),
        (_tiff(3, photometric=_RGB, tags={258: [5, 6, 5]}), 'several kinds'),
        (_tiff(3, photometric=_RGB, tags={258: [5, 6]}), 'BitsPerSample'),
        (_tiff(5, photometric=_CMYK, extra=(2,)), 'the alpha channel'),
        (_tiff(bits=4, photometric=_PALETTE, color_map=range(9)), 'palette'),
        (_tiff(tags={277: [60_000]}), '60000 samples'),
        (_tiff(tags={254: [1]}), 'thumbnail'),
        (_tiff(tags={256: [0]}), '0 x 11 pixels'),
        (_tiff(tags={256: [2 * 10**9]}), '2000000000 x 11 pixels are more'),
        (_tiff(tags={278: [1]}), '1 strips or tiles are too few'),
        (_tiff(compression='LZW')[:-9], 'tags lie beyond the end of the file'),
        (_tiff(tags={273: [10**9]}), 'truncated'),
        (_tiff(3, 8, _YCBCR), 'YCbCr photometric.*photometric interpretation'),
        (_tiff(3, 8, _LAB, planar=True), 'planar.*photometric interpretation'),
        (_float_tiff(3, _RGB), 'float.*in several channels'),
        (_float_tiff(2, _BLACK), 'float.*in several channels'),
    ],
)
def test_tiff_that_is_not_read_is_refused_by_name(data, reason):
  with pytest.raises(data_lib.DamagedImageError, match=reason):
    decoding.decode_image(data)


def test_tiff_of_jpeg_and_fax_stays_with_pillow():
  photograph = Image.fromarray(skimage.data.astronaut()[::4, ::4])
  for mode in ('RGB', 'L', 'CMYK'):
    image = photograph.convert(mode)
    data = _save(image, 'TIFF', compression='jpeg', quality=95)
    _check_lossy(data, np.asarray(image.convert('RGB')))
  binary = photograph.convert('1')
  for compression in ('group3', 'group4'):
    data = _save(binary, 'TIFF', compression=compression)
    _check(data, np.asarray(binary.convert('RGB')))


# PNG.


def _write_png(samples, *, bits, color, palette=None, key=None, interlaced=0):
  """Writes [h, w, channels] integers with the filter `Sub`."""

  def chunk(kind, content):
    checksum = struct.pack('>I', zlib.crc32(kind + content))
    return struct.pack('>I', len(content)) + kind + content + checksum

  def encode(part):
    packed = _pack(part.reshape(len(part), -1), bits).astype(np.int64)
    step = max(1, bits * samples.shape[-1] // 8)
    packed[:, step:] -= packed[:, :-step].copy()
    return np.pad(packed % 256, ((0, 0), (1, 0)), constant_values=1)

  starts = (
      [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2),
       (0, 1, 2, 2), (1, 0, 2, 1)]
      if interlaced else [(0, 0, 1, 1)]
  )  # fmt: skip
  rows = b''.join(
      encode(samples[top::down, left::right]).astype(np.uint8).tobytes()
      for top, left, down, right in starts
  )
  height, width, _ = samples.shape
  header = struct.pack(
      '>IIBBBBB', width, height, bits, color, 0, 0, interlaced
  )
  return b''.join([
      b'\x89PNG\r\n\x1a\n',
      chunk(b'IHDR', header),
      b'' if palette is None else chunk(b'PLTE', palette),
      b'' if key is None else chunk(b'tRNS', key),
      chunk(b'IDAT', zlib.compress(rows)),
      chunk(b'IEND', b''),
  ])


_GREY, _COLOR, _INDEX, _GREY_ALPHA, _COLOR_ALPHA = 0, 2, 3, 4, 6


@pytest.mark.parametrize('interlaced', [0, 1])
@pytest.mark.parametrize(
    ('color', 'bits'),
    [(_GREY, 1), (_GREY, 2), (_GREY, 4), (_GREY, 8), (_GREY, 16), (_COLOR, 8),
     (_COLOR, 16)],
)  # fmt: skip
def test_png_colour_key(color, bits, interlaced):
  rng = np.random.default_rng(bits)
  samples = rng.integers(0, 2**bits, (19, 23, 3 if color else 1))
  samples[3, 4] = samples[7, 9] = samples[0, 0]
  if bits == 16:  # colours that differ only in the lower byte are not the key
    samples[1, 1] = samples[0, 0] ^ 1
  colors = samples * 255 / (2**bits - 1)
  if color and bits == 16:
    colors = samples >> 8
  kind = {'bits': bits, 'color': color, 'interlaced': interlaced}
  _check(_write_png(samples, **kind), np.broadcast_to(colors, (19, 23, 3)))
  # Only the lower bits of a key count.
  for beyond in (0, 2**bits) if 1 < bits < 16 else (0,):
    key = (samples[0, 0] + beyond).tolist()
    data = _write_png(samples, key=struct.pack(f'>{len(key)}H', *key), **kind)
    is_key = (samples == samples[0, 0]).all(-1, keepdims=True)
    assert is_key.sum() >= 3
    expected = np.where(is_key, 255, colors)
    _check(data, np.broadcast_to(expected, (19, 23, 3)))


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_png_palette_with_partial_alpha(bits):
  rng = np.random.default_rng(bits)
  samples = rng.integers(0, 2**bits, (19, 23, 1))
  palette = rng.integers(0, 256, (2**bits, 3), dtype=np.uint8)
  alpha = rng.integers(0, 256, 2**bits, dtype=np.uint8)
  data = _write_png(
      samples, bits=bits, color=_INDEX, palette=palette.tobytes(),
      key=alpha[:-1].tobytes(),
  )  # fmt: skip
  alpha[-1] = 255  # the default of what tRNS leaves out
  index = samples[..., 0]
  _check(data, _white_over(palette[index], alpha[index][..., None] / 255), 1.01)


@pytest.mark.parametrize('color', [_GREY_ALPHA, _COLOR_ALPHA])
@pytest.mark.parametrize('bits', [8, 16])
def test_png_alpha(color, bits):
  samples = np.random.default_rng(0).integers(
      0, 2**bits, (19, 23, 4 if color == _COLOR_ALPHA else 2)
  )
  kept = samples >> (bits - 8)
  expected = _white_over(kept[..., :-1], kept[..., -1:] / 255)
  expected = np.broadcast_to(expected, (19, 23, 3))
  _check(_write_png(samples, bits=bits, color=color), expected, 1.01)


# Files that came out wrong once.


def _grey(values):
  return np.stack([values] * 3, axis=-1)


def test_files_that_pillow_decodes_wrongly():
  camera = skimage.data.camera()[::4, ::4]
  astronaut = skimage.data.astronaut()[::4, ::4]
  ramp = np.add.outer(np.arange(32), np.arange(32)) % 16
  expected = {
      'g12_minisblack.tif': _grey(camera),
      'g16_miniswhite.tif': _grey(camera),
      'rgb16_planar.tif': astronaut,
      'g16_key.png': _grey(np.where(camera == camera[60, 60], 255, camera)),
      'grey4_key.png': _grey(np.where(ramp == 5, 255, 17 * ramp)),
  }
  assert sorted(path.name for path in _IMAGES.iterdir()) == sorted(expected)
  for name, pixels in expected.items():
    _check((_IMAGES / name).read_bytes(), pixels, 1)


# Other formats.


@pytest.mark.parametrize('maxval', [1, 3, 100, 255, 1023, 4095, 65535])
@pytest.mark.parametrize('magic', ['P2', 'P3', 'P5', 'P6'])
def test_ppm_of_any_maximum(magic, maxval):
  channels = 3 if magic in ('P3', 'P6') else 1
  values = np.random.default_rng(0).integers(0, maxval + 1, (5, 7, channels))
  data = f'{magic}\n# comment\n7 5\n{maxval}\n'.encode()
  if magic in ('P5', 'P6'):
    data += values.astype('>u2' if maxval > 255 else 'u1').tobytes()
  else:
    data += ' '.join(map(str, values.ravel())).encode()
  expected = np.broadcast_to(values * 255 / maxval, (5, 7, 3))
  _check(data, expected, 0.51)


def test_pfm_is_a_float_image():
  values = np.random.default_rng(0).random((5, 7)).astype('<f4')
  data = b'Pf\n7 5\n-1.0\n' + values[::-1].tobytes()
  _check(data, _grey(values * 255.0))


def _needs(name):
  return pytest.mark.skipif(
      name not in decoding.readable_formats(),
      reason=f'this Pillow does not read {name}',
  )


@_needs('JPEG2000')
@pytest.mark.parametrize('codestream', [False, True])
def test_jpeg_2000(codestream):
  pixels = skimage.data.astronaut()[::8, ::8]
  alpha = np.random.default_rng(0).integers(0, 256, (64, 64, 1), np.uint8)
  options = {'no_jp2': codestream}
  _check(_save(Image.fromarray(pixels), 'JPEG2000', **options), pixels)
  rgba = Image.fromarray(np.concatenate([pixels, alpha], axis=-1))
  expected = _white_over(pixels, alpha / 255)
  _check(_save(rgba, 'JPEG2000', **options), expected, 1.01)
  deep = pixels[..., 0].astype(np.uint16) * 257
  data = _save(Image.fromarray(deep), 'JPEG2000', **options)
  _check(data, _grey(pixels[..., 0]))
  # The same file with 12 bits in its header: samples keep their distance from
  # the middle of the range.
  values = np.random.default_rng(0).integers(0, 4096, (64, 64))
  deep = (values - 2048 + 32768).astype(np.uint16)
  data = bytearray(_save(Image.fromarray(deep), 'JPEG2000', no_jp2=True))
  size_marker = data.index(b'\xff\x51')
  assert data[size_marker + 40] == 15  # bits - 1
  data[size_marker + 40] = 11
  _check(bytes(data), _grey(values * 255 / 4095), 1)


@_needs('AVIF')
def test_avif():
  pixels = skimage.data.astronaut()[::8, ::8]
  options = {'quality': 100, 'subsampling': '4:4:4'}
  _check(_save(Image.fromarray(pixels), 'AVIF', **options), pixels, 4)
  exif = Image.Exif()
  exif[0x0112] = 6
  data = _save(Image.fromarray(pixels), 'AVIF', exif=exif, **options)
  _check(data, np.rot90(pixels, -1), 4)
  with pytest.raises(data_lib.DamagedImageError, match='AVIF'):
    decoding.decode_image(data[: len(data) // 2])


def test_icons_multi_picture_files_and_animations():
  pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  first = Image.fromarray(pixels)
  second = Image.fromarray(255 - pixels)
  sizes = {'sizes': [(16, 16), (32, 32)]}
  _check(_save(first, 'ICO', **sizes), pixels)
  _check(_save(first, 'ICO', bitmap_format='bmp', **sizes), pixels)
  both = {'save_all': True, 'append_images': [second]}
  animation = _save(first, 'PNG', **both)
  assert Image.open(io.BytesIO(animation)).n_frames == 2
  _check(animation, pixels)
  smooth = skimage.data.astronaut()[::4, ::4]
  data = _save(Image.fromarray(smooth), 'MPO', quality=95, **both)
  assert Image.open(io.BytesIO(data)).format == 'MPO'
  _check_lossy(data, smooth)


def test_cmyk_of_jpeg_is_inverted():
  image = Image.fromarray(skimage.data.astronaut()[::4, ::4])
  data = _save(image.convert('CMYK'), 'JPEG', quality=95)
  expected = np.asarray(image.convert('CMYK').convert('RGB'))
  _check_lossy(data, expected)


_HEIC = b'\0\0\0\x18ftypheic\0\0\0\0mif1heic'


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (b'', 'an empty file is not an image of a known format'),
        (b'<html>', "starts b'<html>' is not an image of a known .* JPEG,"),
        (_HEIC, 'HEIC images are not supported; convert the file to PNG'),
        (b'\0\0\0\x0cJXL \r\n\x87\n', 'JPEG XL images are not supported'),
        (b'P7\nWIDTH 1\n', 'PAM images are not supported'),
        (b'%!PS-Adobe', 'EPS images are not supported'),
        (
            b'\xff\xd8\xff\xc0\0\x0b\x0c\0\x08\0\x08\1\1\x11\0',
            'Pillow cannot open this JPEG file: .*12-bit',
        ),
    ],
)
def test_error_names_the_file_format(data, reason):
  with pytest.raises(data_lib.DamagedImageError, match=reason):
    decoding.decode_image(data)


def test_every_changed_byte_of_a_png_file_counts_as_for_pillow():
  buffer = io.BytesIO()
  Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(
      buffer, 'PNG', dpi=(72, 72)
  )
  whole = buffer.getvalue()
  files = [whole[:i] + bytes([x ^ 1]) + whole[i + 1 :]
           for i, x in enumerate(whole)]  # fmt: skip
  files += [whole[:i] for i in range(len(whole))] + [whole, whole + b'more']

  def is_intact(data):
    try:
      with Image.open(io.BytesIO(data), formats=('PNG',)) as image:
        image.load()
      with Image.open(io.BytesIO(data), formats=('PNG',)) as image:
        image.verify()
    except Exception:  # Of many types.
      return False
    return True

  def is_decoded(data):
    try:
      decoding.decode_image(data)
    except image_errors.DamagedImageError:
      return False
    return True

  intact = [is_intact(data) for data in files]
  assert [is_decoded(data) for data in files] == intact
  # The last two, and the files whose last chunk has another checksum.
  assert 2 <= sum(intact) < 20
