"""Faults of data: corrupted, unusual and mismatched images, small data sets."""

import io
import pathlib
import shutil

import ml_collections
import numpy as np
from PIL import Image

from experiments.fault_suite import fault
from fsq_jax import data
from fsq_jax.data import decoding
from fsq_jax.data import pipelines


def encode(image: np.ndarray | Image.Image, kind: str = 'PNG', **options):
  """Returns the bytes of an image file."""
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def photo(seed: int, size=(16, 16)) -> np.ndarray:
  """Returns an image with smooth colours, which JPEG preserves."""
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
  return np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC))


def _config(root: pathlib.Path, **fields) -> ml_collections.ConfigDict:
  """Returns the `data` section for a folder of images."""
  config = fault.toy_config(
      data__source='folder', data__data_dir=str(root)
  ).data
  config.update(fields)
  return config


def write(root: pathlib.Path, num: int, split: str = 'train') -> pathlib.Path:
  """Writes a split of numbered images."""
  (root / split).mkdir(parents=True, exist_ok=True)
  for i in range(num):
    path = root / split / f'{i:04}.png'
    path.write_bytes(encode(photo(i)))
  return root


def damage(index: int) -> bytes:
  """Returns a file corrupted in one of eight ways."""
  png = encode(photo(index, (64, 64)))
  jpeg = encode(photo(index, (64, 64)), 'JPEG')
  crc = bytearray(png)
  crc[-14] ^= 1  # CRC of the pixels.
  flipped = bytearray(png)
  flipped[png.index(b'IDAT') + 9] ^= 16
  return (
      png[: len(png) // 2], jpeg[: len(jpeg) // 2], b'', b'no image at all',
      bytes(crc), bytes(flipped), png[:20], bytes(len(png)),
  )[index % 8]


def _damaged(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  num = 200 if quick else 800
  found = {}
  for share, number in (('1 %', num // 100), ('half', num // 2)):
    root = write(folder / share, num)
    bad = np.random.default_rng(0).choice(num, number, replace=False)
    for order, i in enumerate(bad):
      (root / 'train' / f'{i:04}.png').write_bytes(damage(order))
    shutil.copytree(root / 'train', root / 'validation')
    allowed = 0.01 if share == '1 %' else 0.5
    for split in ('train', 'eval'):
      dataset = data.build_dataset(
          _config(root, max_damaged_share=allowed), split=split, seed=0
      )
      shown = set()
      for batch in _first(dataset, num // 8):
        masks = batch.get('mask', np.ones(len(batch['index']), bool))
        shown |= set(batch['index'][masks].tolist())
      found[share, split] = (
          dataset.damaged == number and shown == set(range(num)) - set(bad)
      )
    # One above the limit.
    (root / 'train' / f'{min(shown):04}.png').write_bytes(b'')
    dataset = data.build_dataset(
        _config(root, max_damaged_share=allowed), split='train', seed=0
    )
    error = fault.refusal(lambda: list(_first(dataset, num // 8)))  # noqa: B023
    found[share, 'stops'] = (
        error is not None
        and f'{number + 1} of {num} images' in str(error)
        and str(error).count('.png: ') == min(number + 1, 10)
    )
  return fault.Outcome(
      all(found.values()),
      f'1 % and half of {num} files, damaged in 8 ways: all counted and left'
      ' out, the next one stops with a list'
      if all(found.values()) else f'not so: {found}',
      {str(key): value for key, value in found.items()},
  )


def _first(dataset: data.Dataset, num: int):
  return (batch for batch, _ in zip(dataset, range(num), strict=False))


def _unusual(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  rgb = photo(0, (9, 13))
  alpha = np.random.default_rng(0).integers(0, 256, (9, 13, 1), np.uint8)
  grey16 = np.random.default_rng(1).integers(0, 2**16, (9, 13), np.uint16)
  cmyk = Image.fromarray(rgb).convert('CMYK')
  palette = Image.fromarray(rgb // 64 * 64).convert(
      'P', palette=Image.Palette.ADAPTIVE
  )
  exif = Image.Exif()
  exif[0x0112] = 6
  frames = [Image.fromarray(photo(i, (9, 13))) for i in (5, 6)]
  a = alpha / 255
  cases = {
      'grey': (
          encode(Image.fromarray(rgb[..., 0])),
          np.repeat(rgb[..., :1], 3, axis=2), 0,
      ),
      'palette': (encode(palette), np.asarray(palette.convert('RGB')), 0),
      'CMYK': (
          encode(cmyk, 'TIFF'),
          # (255 - ink)(255 - black) / 255.
          (255 - np.asarray(cmyk, np.float64)[..., :3])
          * (255 - np.asarray(cmyk, np.float64)[..., 3:]) / 255, 1,
      ),
      'RGBA': (
          encode(np.concatenate([rgb, alpha], axis=2)),
          rgb * a + 255 * (1 - a), 1,
      ),
      '16 bits': (
          encode(grey16),
          np.repeat(np.rint(grey16 / 257)[..., None], 3, axis=2), 0,
      ),
      'animated': (
          encode(frames[0], 'PNG', save_all=True, append_images=frames[1:]),
          np.asarray(frames[0]), 0,
      ),
      'EXIF': (
          encode(Image.fromarray(rgb), 'PNG', exif=exif),
          np.rot90(rgb, -1), 0,
      ),
      '1 x 1': (encode(rgb[:1, :1]), rgb[:1, :1], 0),
      '20000 x 3': (
          encode(np.tile(rgb[:3], (1, 1539, 1))),
          np.tile(rgb[:3], (1, 1539, 1)), 0,
      ),
  }
  errors = {}
  for name, (content, expected, tolerance) in cases.items():
    image = decoding.decode_image(content)
    difference = (
        np.abs(image - np.asarray(expected, np.float64)).max()
        if image.shape == np.shape(expected) else np.inf
    )
    crop = data.centre_crop(image, (16, 16))
    if difference > tolerance or crop.shape != (16, 16, 3):
      errors[name] = float(difference)
  return fault.Outcome(
      not errors,
      f'{len(cases) - len(errors)} of {len(cases)} kinds as NumPy has them: to'
      ' the pixel, blends of alpha and black to 1 of 255'
      if not errors else f'other pixels: {errors}',
      {'kinds': len(cases), 'errors': errors},
  )


def _few(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  root = write(folder, 7)
  few = data.build_dataset(
      _config(root, batch_size=8), split='train', seed=0
  ).iterator()
  trained = np.concatenate([next(few)['index'] for _ in range(7)])
  each_epoch = sorted(trained.tolist()) == sorted([*range(7)] * 8)
  exact = 0
  sizes = range(1, 24)
  for num in sizes:
    shutil.rmtree(folder / 'validation', ignore_errors=True)
    root = write(folder, num, 'validation')
    for batch_size in (1, 4, 8):
      dataset = data.build_dataset(
          _config(root, eval_batch_size=batch_size), split='eval', seed=0
      )
      seen = [
          i for batch in dataset for i in batch['index'][batch['mask']].tolist()
      ]
      exact += seen == list(range(num))
  return fault.Outcome(
      each_epoch and exact == 3 * len(sizes),
      f'training on fewer has each image once in {8 if each_epoch else 0} of 8'
      f' epochs; evaluation each once in {exact} of {3 * len(sizes)} splits of'
      f' 1 to {sizes[-1]} images',
      {'exact': exact, 'splits': 3 * len(sizes)},
  )


class _One(data.ImageSource):
  """An image source with one image."""

  def __init__(self, image: np.ndarray):
    super().__init__('one', 'train', 'one')
    self._image = image

  def __len__(self) -> int:
    return 1

  def load(self, index: int) -> np.ndarray:
    return self._image

  def describe(self, index: int) -> str:
    return 'the image'


def _ranges(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  image = photo(0)
  wrong = {
      '0 to 255 floats': image.astype(np.float32),
      '0 to 1 floats': image.astype(np.float32) / 255,
      '-1 to 1 floats': image.astype(np.float32) / 127.5 - 1,
      'CHW': np.ascontiguousarray(np.moveaxis(image, -1, 0)),
      'grey': image[..., :1],
      'without channels': image[..., 0],
      'a batch': image[None],
      'int32': image.astype(np.int32),
      'int8': image.astype(np.int8),
      'RGBA': np.concatenate([image, image[..., :1]], axis=-1),
  }
  right = [image, np.zeros_like(image), (image > 127).astype(np.uint8)]

  def refusal(image: np.ndarray):
    dataset = pipelines.build_train(
        _config(folder), _One(image), 0, slice(0, None, 1)
    )
    return fault.refusal(next, dataset.iterator())

  refused = [
      name for name, image in wrong.items()
      if 'images are uint8' in str(refusal(image))
  ]
  taken = all(refusal(image) is None for image in right)
  return fault.Outcome(
      len(refused) == len(wrong) and taken,
      f'{len(refused)} of {len(wrong)} refused before the first step; black'
      f' images {"taken" if taken else "refused"}',
      {'refused': refused},
  )


def _hosts(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  root = write(folder, 40)
  steps, same = 12, 0

  def read(count):
    shares = [
        data.build_dataset(
            _config(root), split='train', seed=3, process_index=i,
            process_count=count,
        )
        for i in range(count)
    ]
    return [
        {
            (index, image.tobytes())
            for batch in batches
            for index, image in zip(
                batch['index'].tolist(), batch['image'], strict=True
            )
        }
        for batches in zip(*(_first(x, steps) for x in shares), strict=True)
    ]

  counts = (2, 4, 8)
  for count in counts:
    same += sum(a == b for a, b in zip(read(1), read(count), strict=True))
  return fault.Outcome(
      same == steps * len(counts),
      f'same images and pixels in {same} of {steps * len(counts)} steps of 2,'
      ' 4 and 8 shares',
      {'same': same},
  )


FAULTS = {
    'D1': fault.Fault(
        'truncated, empty, text and flipped image files',
        '100 % counted and listed; stop at more than 1 %', _damaged,
    ),
    'D2': fault.Fault(
        'grey, palette, CMYK, RGBA, 16 bits, animated, EXIF, 1 x 1, 20000 x 3',
        'the documented conversion, pixel by pixel', _unusual,
    ),
    'D5': fault.Fault(
        'fewer images than a batch; a last batch that is not full',
        'training and evaluation have each image once an epoch', _few,
    ),
    'D7': fault.Fault(
        'another type or layout of images', '100 % refused at step 0', _ranges
    ),
    'D8': fault.Fault(
        '1 process against 2, 4 and 8 shares of the input',
        'the same images in each global step', _hosts,
    ),
}
