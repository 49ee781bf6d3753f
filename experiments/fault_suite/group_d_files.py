"""Faults of image files: decompression bombs, names, corrupted records."""

import io
import os
import pathlib
import struct
import subprocess
import zlib

import numpy as np

from experiments.fault_suite import fault
from experiments.fault_suite import group_d
from fsq_jax.data import folder as folders
from fsq_jax.data import tfds_source


def _huge(kind: str) -> bytes:
  """Returns a small file whose header claims more than 10^8 pixels."""
  width, height = 60_000, 50_000

  def chunk(name, content):
    check = zlib.crc32(name + content)
    return struct.pack('>I', len(content)) + name + content + struct.pack(
        '>I', check
    )

  if kind == 'PNG':
    # Real pixels, highly compressible.
    rows = zlib.compress(bytes(50_000_000), 9)
    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', rows)
        + chunk(b'IEND', b'')
    )
  small = bytearray(group_d.encode(group_d.photo(0), kind))
  if kind == 'JPEG':
    start = small.index(b'\xff\xc0') + 5
    small[start : start + 4] = struct.pack('>HH', height, width)
  elif kind == 'GIF':
    small[6:10] = struct.pack('<HH', width, height)
    start = small.index(b',', 13) + 5
    small[start : start + 4] = struct.pack('<HH', width, height)
  elif kind == 'BMP':
    small[18:26] = struct.pack('<ii', width, height)
  elif kind == 'PPM':
    small = b'P6 %d %d 255\n' % (width, height) + bytes(99)
  elif kind == 'TIFF':
    for tag, value in ((256, width), (257, height)):
      start = small.index(struct.pack('<HHI', tag, 4, 1)) + 8
      small[start : start + 4] = struct.pack('<I', value)
  elif kind == 'WEBP':
    small = b'RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0' + (
        struct.pack('<I', width - 1)[:3] + struct.pack('<I', height - 1)[:3]
    )
  return bytes(small)


def _bombs(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  kinds = ('PNG', 'JPEG', 'GIF', 'BMP', 'PPM', 'TIFF', 'WEBP')
  (folder / 'train').mkdir()
  for kind in kinds:
    (folder / 'train' / f'{kind}.png').write_bytes(_huge(kind))
  # A sparse file, without disk usage.
  with open(folder / 'train' / 'hole.png', 'wb') as file:
    file.truncate(2**36)
  (folder / 'train' / 'small.png').write_bytes(group_d.encode(group_d.photo(0)))
  code = """if True:
    import sys
    from experiments.fault_suite import fault
    from fsq_jax import data
    from fsq_jax.data import folder
    source = folder.FolderSource(sys.argv[1], 'train', max_damaged_share=1.0)
    names = [source.describe(i) for i in range(len(source))]
    source.load(names.index(next(x for x in names if 'small' in x)))
    before = fault.reset_peak()
    for i in range(len(source)):
      try:
        source.load(i)
      except data.DamagedImageError:
        pass
    print(len(source.damaged), fault.peak_mb() - before)
  """
  done = fault.run_python(code, folder)
  if done.returncode:
    return fault.Outcome(False, done.stderr.strip().split('\n')[-1], {})
  refused, growth = done.stdout.split()
  return fault.Outcome(
      int(refused) == len(kinds) + 1 and float(growth) < 50,
      f'{refused} of {len(kinds) + 1} files refused, of which one is a hole of'
      f' 64 GiB; {float(growth):.1f} MB more',
      {'refused': int(refused), 'mb': float(growth)},
  )


def _names(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  root = folder / 'a root'
  split = root / 'train'
  names = [
      'ünïcode 名前.png', 'two words.PNG', 'n' * 251 + '.png', 'new\nline.png',
      '%s%d{}.png', "quote'\".png", '-dash.png', 'trailing .png',
  ]
  split.mkdir(parents=True)
  for i, name in enumerate(names):
    (split / name).write_bytes(group_d.encode(group_d.photo(i)))
  (split / 'empty class').mkdir()
  raw = bytes(split) + b'/\xff\xfe.png'
  pathlib.Path(raw.decode('utf-8', 'surrogateescape')).write_bytes(b'text')
  (split / 'inside.png').symlink_to(split / names[0])
  source = folders.FolderSource(str(root), 'train', max_damaged_share=1.0)
  images = loaded = 0
  for i in range(len(source)):
    images += 1
    error = fault.refusal(source.load, i)
    loaded += error is None
  handled = (images, loaded) == (len(names) + 2, len(names) + 1)
  named = {}
  for name, make in {
      'pipe': lambda path: os.mkfifo(path),
      'link out': lambda path: path.symlink_to(folder / 'secret.png'),
      'broken link': lambda path: path.symlink_to(root / 'nothing.png'),
      'link up': lambda path: path.with_suffix('').symlink_to(split),
  }.items():
    (folder / 'secret.png').write_bytes(group_d.encode(group_d.photo(0)))
    path = split / 'odd.png'
    make(path)
    code = (
        'import sys\nfrom fsq_jax.data import folder\n'
        'source = folder.FolderSource(sys.argv[1], "train")\n'
        '[source.load(i) for i in range(len(source)) if "odd" in'
        ' source.describe(i)]'
    )
    try:
      done = fault.run_python(code, root, timeout=20)
      # An error that names it, or skipped if it is not a regular file.
      named[name] = 'odd' in done.stderr or not done.returncode
    except subprocess.TimeoutExpired:
      named[name] = False
    for made in (path, path.with_suffix('')):
      made.unlink(missing_ok=True)
  return fault.Outcome(
      handled and all(named.values()),
      f'{loaded} of {len(names) + 1} names load, one that is no text is counted'
      f' as damaged; named or passed over: {sum(named.values())} of'
      f' {len(named)} ({", ".join(named)})',
      {'handled': handled, 'named': named},
  )


def _records(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  import tensorflow_datasets as tfds

  num = 64

  class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    __module__ = 'fsq_jax.tiny'  # TFDS looks for metadata in the package.
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict({'image': tfds.features.Image()}),
      )

    def _split_generators(self, download_manager):
      examples = (
          (i, {'image': io.BytesIO(group_d.encode(group_d.photo(i, (32, 32))))})
          for i in range(num)
      )
      return {'train': examples}

    def _generate_examples(self):
      raise NotImplementedError

  Tiny(
      data_dir=str(folder), file_format='array_record'
  ).download_and_prepare()
  root = folder / 'tiny' / '1.0.0'
  (shard,) = root.glob('*.array_record*')
  original = shard.read_bytes()
  images = [
      tfds_source.PreparedSource('', str(root), 'train').load(i)
      for i in range(num)
  ]
  start, end = (
      getattr(original, find)(b'IDAT') for find in ('index', 'rindex')
  )
  rng = np.random.default_rng(0)
  named = silent = harmless = other = 0
  count = 12 if quick else 120
  for _ in range(count):
    content = bytearray(original)
    content[rng.integers(start, end)] ^= 1 << rng.integers(8)
    shard.write_bytes(content)
    source = tfds_source.PreparedSource(
        '', str(root), 'train', max_damaged_share=1.0
    )
    before = named
    for i in range(num):
      try:
        silent += not np.array_equal(source.load(i), images[i])
      except ValueError as error:
        text = f'{source.describe(i)} {error}'
        named += shard.name in text and ' record ' in text
        other += not (shard.name in text and ' record ' in text)
    harmless += named == before
  return fault.Outcome(
      not silent and not other and named > 0,
      f'{count} flipped bits: {count - harmless} named by file and record,'
      f' {harmless} in no image, {silent} silent',
      {'flips': count, 'harmless': harmless, 'silent': silent},
  )


FAULTS = {
    'D3': fault.Fault(
        'headers of 3 * 10^9 pixels in 7 formats',
        'refused before decoding, < 50 MB', _bombs,
    ),
    'D4': fault.Fault(
        'Unicode, spaces, 255 bytes, no text, links, pipes, empty folders',
        'handled or named', _names,
    ),
    'D6': fault.Fault(
        'flipped bits in ArrayRecord files', '100 % named by file and record',
        _records,
    ),
}
