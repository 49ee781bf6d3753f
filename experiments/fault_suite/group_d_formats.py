"""Faults of tar shards and Parquet files: corruption, stops and shares."""

import contextlib
import io
import json
import pathlib
import shutil
import tarfile

import ml_collections
import numpy as np
import pyarrow
from pyarrow import parquet

from experiments.fault_suite import fault
from experiments.fault_suite import group_d
from fsq_jax import data

_IMAGES_PER_FILE = 50
# Options of pyarrow.parquet.write_table: as `datasets` 5 writes images, and as
# earlier versions.
_PARQUET = {
    'parquet': {'compression': 'none', 'use_dictionary': False},
    'compressed parquet': {'row_group_size': 20},
}
FORMATS = ('webdataset', *_PARQUET)


def write(root: pathlib.Path, form: str, images: list[bytes]) -> None:
  """Writes encoded images as the split train of several files."""
  root.mkdir(parents=True)
  for first in range(0, len(images), _IMAGES_PER_FILE):
    rows = range(first, min(first + _IMAGES_PER_FILE, len(images)))
    if form == 'webdataset':
      with tarfile.open(root / f'train-{first:05}.tar', 'w') as tar:
        for i in rows:
          member = tarfile.TarInfo(f'{i:05}.png')
          member.size = len(images[i])
          tar.addfile(member, io.BytesIO(images[i]))
      continue
    structs = [{'bytes': images[i], 'path': f'{i:05}.png'} for i in rows]
    parquet.write_table(
        pyarrow.table({'image': structs, 'label': [i % 10 for i in rows]}),
        root / f'train-{first:05}.parquet', **_PARQUET[form],
    )  # fmt: skip


def _config(root: pathlib.Path, form: str, **fields):
  config = ml_collections.ConfigDict(fault.toy_config().data)
  config.update({
      'source': 'webdataset' if form == 'webdataset' else form.split()[-1],
      'data_dir': str(root), 'eval_split': 'train', **fields,
  })  # fmt: skip
  return config


def _damaged(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  num = 200 if quick else 800
  found = {}
  for form in FORMATS:
    images = [group_d.encode(group_d.photo(i)) for i in range(num)]
    bad = np.random.default_rng(0).choice(num, num // 100, replace=False)
    for order, i in enumerate(bad):
      images[i] = group_d.damage(order)
    root = folder / form
    for step in ('counted', 'stops'):
      write(root, form, images)
      for split in ('train', 'eval'):
        dataset = data.build_dataset(_config(root, form), split=split, seed=0)
        batches = (x for x, _ in zip(dataset, range(num // 8), strict=False))
        if step == 'counted':
          shown = set()
          for batch in batches:
            masks = batch.get('mask', np.ones(len(batch['index']), bool))
            shown |= set(batch['index'][masks].tolist())
          found[form, split] = (
              dataset.damaged == len(bad)
              and shown == set(range(num)) - set(bad.tolist())
          )
        else:
          error = str(fault.refusal(lambda: list(batches)))  # noqa: B023
          place = ' member ' if form == 'webdataset' else ' row '
          found[form, split, 'stops'] = (
              f'{len(bad) + 1} of {num} images' in error
              and error.count(place) == min(len(bad) + 1, 10)
          )
      images[min(shown)] = b''  # One above the limit.
      shutil.rmtree(root)
  return fault.Outcome(
      all(found.values()),
      f'1 % of {num} images in {len(FORMATS)} forms, corrupted in 8 ways: all'
      ' counted and left out, the next one stops with a list of files and'
      ' members or rows'
      if all(found.values()) else f'not so: {found}',
      {str(key): value for key, value in found.items()},
  )


def _flips(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  num = 40
  images = [group_d.encode(group_d.photo(i)) for i in range(num)]
  pixels = [group_d.photo(i) for i in range(num)]
  flips = 60 if quick else 300
  forms = ('webdataset', 'parquet')
  counts = dict.fromkeys(('refused', 'named', 'harmless'), 0)
  wrong = []
  for form in forms:
    root = folder / form
    write(root, form, images)
    (path,) = root.iterdir()
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    for flip in range(flips):
      content = bytearray(original)
      # Every other one at the end, where Parquet has its metadata.
      start = len(content) * 9 // 10 if flip % 2 else 0
      place = int(rng.integers(start, len(content)))
      content[place] ^= 1 << rng.integers(8)
      path.write_bytes(content)
      source, error = None, ''
      try:
        source = data.open_source(
            _config(root, form, max_damaged_share=1.0), 'train'
        )
      except (ValueError, OSError) as refusal:
        error = str(refusal)
      if source is None:
        counts['refused'] += 1
        if path.name not in error:
          wrong.append(f'{form} {place}: {error}')
        continue
      same = len(source) == num
      for i in range(len(source)):
        with contextlib.suppress(data.DamagedImageError):
          same &= np.array_equal(source.load(i), pixels[i])
      counts['named' if source.damaged else 'harmless'] += 1
      if not same:
        wrong.append(f'{form} {place}: silent')
  return fault.Outcome(
      not wrong and min(counts.values()) > 0,
      f'{len(forms) * flips} flipped bits: {counts["refused"]} at the start'
      f' by file, {counts["named"]} by file and member or row,'
      f' {counts["harmless"]} in no pixel, 0 silent'
      if not wrong else f'not so: {len(wrong)}, {wrong[:5]}',
      {**counts, 'wrong': wrong[:20]},
  )


def _shares(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  num, steps = 120, 40
  images = [group_d.encode(group_d.photo(i)) for i in range(num)]
  images[7] = images[70] = b'no image'
  group_d.write(folder / 'folder', 0)
  for i, image in enumerate(images):
    (folder / 'folder' / 'train' / f'{i:05}.png').write_bytes(image)

  def build(form, index=0, count=1):
    root = folder / form
    return data.build_dataset(
        _config(root, form, max_damaged_share=0.1), split='train', seed=3,
        process_index=index, process_count=count,
    ).iterator()  # fmt: skip

  def equal(left, right):
    return all(np.array_equal(left[x], right[x]) for x in ('image', 'index'))

  iterator = build('folder')
  expected = [next(iterator) for _ in range(steps)]
  stops = range(1, steps, 9 if quick else 3)
  resumed = shared = 0
  for form in FORMATS:
    write(folder / form, form, images)
    for stop in stops:
      first = build(form)
      batches = [next(first) for _ in range(stop)]
      state = json.dumps(first.get_state())
      second = build(form)
      second.set_state(json.loads(state))
      batches += [next(second) for _ in range(steps - stop)]
      resumed += all(map(equal, batches, expected))
    for count in (2, 4, 8):
      parts = [build(form, i, count) for i in range(count)]
      for batch in expected:
        shared += all(
            equal(next(part), {x: batch[x][i::count] for x in batch})
            for i, part in enumerate(parts)
        )
  num_stops = len(FORMATS) * len(stops)
  num_shared = len(FORMATS) * 3 * steps
  return fault.Outcome(
      resumed == num_stops and shared == num_shared,
      f'{steps} batches as of a folder after {resumed} of {num_stops} stops,'
      f' and in {shared} of {num_shared} steps of 2, 4 and 8 shares',
      {'resumed': resumed, 'stops': num_stops, 'shared': shared},
  )


FAULTS = {
    'D9': fault.Fault(
        'truncated, empty, text and flipped images in tar shards and Parquet'
        ' files',
        '100 % counted and listed; stop at more than 1 %', _damaged,
    ),
    'D10': fault.Fault(
        'flipped bits anywhere in tar shards and Parquet files',
        'named by file, or harmless; no silent wrong image', _flips,
    ),
    'D11': fault.Fault(
        'stops and shares of tar shards and Parquet files',
        'batches of a folder, bitwise', _shares,
    ),
}
