"""Faults of untrusted files: pickles, mutations, bombs, paths."""

import functools
import io
import json
import pathlib
import pickle
import shutil
import struct
import sys
import tempfile
import types
import zipfile

import numpy as np
from safetensors import numpy as safetensors_numpy

from experiments.fault_suite import fault
from fsq_jax import models
from fsq_jax import perceptual
from fsq_jax import workdir as workdirs
from fsq_jax.data import folder as folders
from fsq_jax.data import tfds_source
from fsq_jax.evaluation import frechet
from fsq_jax.models.pretrained import files as weight_files
from fsq_jax.perceptual import classifiers
from fsq_jax.train import initialization

_ORIGIN = frechet.Origin('network', 'sha256', 'images')
_GRID = (2, 2)
_WIDTH = 3


class _Trap:
  """Executes code when it is unpickled."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def _read_all(open_function, path, shapes):
  """Reads the arrays with expected shapes, as loaders do."""
  with open_function(path) as weights:
    misfits = weight_files.list_misfits(
        weights.headers, shapes, lambda key: key not in shapes
    )
    if misfits:
      raise ValueError(misfits)
    for key in shapes:
      weights.read(key)


@functools.cache
def _config():
  return fault.toy_config()


def _read_latents(path):
  config = _config()
  config.model.latent_statistics = str(path)
  statistics = types.SimpleNamespace(grid_size=_GRID, width=_WIDTH)
  return initialization.read_statistics(
      config, types.SimpleNamespace(statistics=statistics)
  )


# All loaders of arrays from a file or directory.
_LOADERS = {
    'encoder': models.load_encoder,
    'decoder': models.load_decoder,
    'lpips': lambda path: perceptual.load_lpips(path, 'alexnet'),
    'classifier': lambda path: classifiers.load_classifier(path, 'resnet50'),
    'inception': perceptual.load_inception,
    'weights': lambda path: _read_all(
        weight_files.open_weights, path, {'a': (1,)}
    ),
    'file': lambda path: _read_all(weight_files.open_file, path, {'a': (1,)}),
    'feature statistics': lambda path: frechet.read_statistics(path, _ORIGIN),
    'latent statistics': _read_latents,
}


def _malicious(folder: pathlib.Path, sprung: pathlib.Path):
  """Writes pickles under every file name of the loaders; yields paths."""
  trap = pickle.dumps(_Trap(sprung))
  objects = io.BytesIO()
  np.save(objects, np.array([_Trap(sprung)], object), allow_pickle=True)
  archive = io.BytesIO()
  with zipfile.ZipFile(archive, 'w') as file:
    # The format of torch.save.
    file.writestr('archive/data.pkl', trap)
    file.writestr('archive/version', '3')
  arrays = io.BytesIO()
  np.savez(arrays, **{
      'params/img/embedding/kernel': np.array([_Trap(sprung)] * 8, object)
  })
  contents = {
      'pickle': trap, 'npy': objects.getvalue(), 'torch': archive.getvalue(),
      'npz': arrays.getvalue(),
  }
  for kind, content in contents.items():
    for name in (
        'model.safetensors', 'weights.npz', 'weights.npy', 'weights.pth',
        'pytorch_model.bin', 'latent_statistics.safetensors',
        'model.safetensors.index.json', 'config.json',
    ):
      path = folder / f'{kind} {name}'
      path.mkdir()
      if name != 'config.json':
        shutil.copy(fault.ENCODERS / 'siglip/config.json', path)
      (path / name).write_bytes(content)
      yield path
      yield path / name


def _pickles(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  looked_up, accepted, tried = [], [], 0

  def watch(event, arguments):
    if event == 'pickle.find_class':
      looked_up.append(arguments)

  sprung = folder / 'sprung'
  paths = list(_malicious(folder, sprung))
  sys.addaudithook(watch)
  for path in paths:
    for name, load in _LOADERS.items():
      tried += 1
      if fault.refusal(load, path) is None:
        accepted.append([name, path.name])
  executed = sprung.exists() or bool(looked_up)
  # Check that the trap works when unpickled.
  pickle.loads(pickle.dumps(_Trap(sprung)))
  works = sprung.exists() and bool(looked_up)
  return fault.Outcome(
      not executed and not accepted and works,
      f'{int(executed)} executions, {tried - len(accepted)} of {tried} refused'
      f' by {len(_LOADERS)} loaders',
      {'executions': int(executed), 'tried': tried, 'accepted': accepted},
  )


def _arrays() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
      f'block{i}/kernel': rng.normal(size=(3, 4)).astype(
          [np.float32, np.float16][i % 2]
      )
      for i in range(6)
  }


def _originals() -> dict[str, tuple[bytes, str, object]]:
  """Returns small files of each kind: content, name and loader."""
  arrays = _arrays()
  shapes = {key: x.shape for key, x in arrays.items()}
  stored, packed = io.BytesIO(), io.BytesIO()
  np.savez(stored, **arrays)
  np.savez_compressed(packed, **arrays)
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory, 'features')
    statistics = frechet.FeatureStatistics.from_moments(
        9, np.zeros(4), np.eye(4)
    )
    frechet.write_statistics(path, statistics, _ORIGIN)
    features = path.read_bytes()
  metadata = initialization.encoder_metadata(fault.toy_config())
  latents = safetensors_numpy.save(
      dict.fromkeys(
          ('mean', 'variance'), np.ones((*_GRID, _WIDTH), np.float32)
      ),
      metadata,
  )

  def read(open_function):
    return lambda path: _read_all(open_function, path, shapes)

  return {
      'safetensors': (
          safetensors_numpy.save(arrays), 'x.safetensors',
          read(weight_files.open_file),
      ),
      'npz': (stored.getvalue(), 'x.npz', read(weight_files.open_weights)),
      'npz, packed': (
          packed.getvalue(), 'x.npz', read(weight_files.open_weights)
      ),
      'feature statistics': (
          features, 'f.safetensors', _LOADERS['feature statistics']
      ),
      'latent statistics': (latents, 'l.safetensors', _read_latents),
      'config.json': (
          (fault.ENCODERS / 'siglip/config.json').read_bytes(), 'config.json',
          lambda path: models.build_encoder(path.parent),
      ),
  }


def _mutate(content: bytes, rng: np.random.Generator) -> bytes:
  """Returns the bytes with a random mutation: flipped, cut, repeated."""
  content = bytearray(content)
  at = int(rng.integers(len(content)))
  kind = rng.integers(6)
  if kind <= 1:
    # Headers and directories.
    ends = (rng.integers(min(600, len(content))), -rng.integers(1, 400))
    for _ in range(rng.integers(1, 4)):
      where = int(rng.choice([at, *ends]))
      content[max(where, -len(content))] = int(rng.integers(256))
  elif kind == 2:
    content[at] ^= 1 << int(rng.integers(8))
  elif kind == 3:
    del content[at : at + int(rng.integers(1, 64))]
  elif kind == 4:
    content[at:at] = rng.bytes(int(rng.integers(1, 16)))
  else:
    size = int(rng.choice([2**63, 2**32 - 1, 2**31, 2**16, 0]))
    width = min(8, len(content) - at)
    content[at : at + width] = size.to_bytes(8, 'little')[:width]
  return bytes(content)


def _bombs() -> dict[str, tuple[bytes, str]]:
  """Returns small files that claim large sizes: content and name."""
  header = np.lib.format.header_data_from_array_1_0(np.zeros(1, np.float32))
  made = {}

  def archive(method, *parts):
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, 'w', method) as writer,
        writer.open('block0/kernel.npy', 'w', force_zip64=True) as member,
    ):
      for part, times in parts:
        for _ in range(times):
          member.write(part)
    return file.getvalue()

  deflated, zeros = zipfile.ZIP_DEFLATED, bytes(10**6)
  magic = b'\x93NUMPY\x02\x00'
  made['npz, header of 1 GB'] = archive(
      deflated, (magic + struct.pack('<I', 10**9), 1), (b' ' * 10**6, 1000)
  )
  claim = io.BytesIO()
  np.lib.format.write_array_header_1_0(
      claim, {**header, 'shape': (250_000_000,)}
  )
  made['npz, 1 GB of zeros'] = archive(
      deflated, (claim.getvalue(), 1), (zeros, 1000)
  )
  made['npz, LZMA'] = archive(
      zipfile.ZIP_LZMA, (claim.getvalue(), 1), (zeros, 1)
  )
  # A dictionary size of 4 GB.
  lzma = bytearray(archive(zipfile.ZIP_LZMA, (zeros, 1)))
  start = lzma.index(b'\x05\x00\x5d') + 3
  lzma[start : start + 4] = b'\xff' * 4
  made['npz, LZMA of 4 GB'] = bytes(lzma)
  made['safetensors, header of 99 MB'] = struct.pack('<Q', 99 * 10**6) + (
      b'{' + b' ' * 1000
  )
  made['safetensors, deep JSON'] = struct.pack('<Q', 10**5) + b'[' * 10**5
  claims = json.dumps({
      'block0/kernel': {
          'dtype': 'F32', 'shape': [2**62, 4], 'data_offsets': [0, 2**63]
      }
  }).encode()
  made['safetensors, 2^64 numbers'] = struct.pack('<Q', len(claims)) + claims
  return {
      name: (content, 'x.npz' if name.startswith('npz') else 'x.safetensors')
      for name, content in made.items()
  }


def _fuzz(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  count = 300 if quick else 10_000
  rng = np.random.default_rng(0)
  crashes, refused, growth = {}, {}, {}

  def attempt(name, path, load):
    try:
      error = fault.refusal(load, path)
    except BaseException as crash:  # Rust panics are not Exceptions.
      crashes.setdefault(name, set()).add(f'{type(crash).__name__}: {crash}')
    else:
      refused[name] = refused.get(name, 0) + (error is not None)

  originals = _originals()
  for name, (content, file_name, load) in originals.items():
    path = folder / file_name
    path.write_bytes(content)
    if (error := fault.refusal(load, path)) is not None:
      raise error
    before = fault.reset_peak()
    for _ in range(count):
      path.write_bytes(_mutate(content, rng))
      attempt(name, path, load)
    growth[name] = fault.peak_mb() - before
  for name, (content, file_name) in _bombs().items():
    path = folder / file_name
    path.write_bytes(content)
    kind = 'npz' if file_name.endswith('npz') else 'safetensors'
    before = fault.reset_peak()
    attempt(name, path, originals[kind][2])
    growth[name] = fault.peak_mb() - before
  total = count * len(originals)
  num = sum(map(len, crashes.values()))
  largest = max(growth, key=growth.get)
  return fault.Outcome(
      not crashes and growth[largest] <= 200,
      f'{num} kinds of crashes in {total:,} mutations ('
      f'{sum(refused.get(x, 0) for x in originals):,} refused) of'
      f' {len(originals)} kinds of files and {len(growth) - len(originals)}'
      f' bombs; {growth[largest]:.0f} MB at most ({largest})'
      + (f'; {crashes}'[:600] if crashes else ''),
      {
          'crashes': {k: sorted(x)[:5] for k, x in crashes.items()},
          'refused': refused, 'mb': growth,
      },
  )


def _escapes(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  outside = folder / 'outside'
  root = folder / 'root'
  for path in (outside / 'train', root / 'train'):
    path.mkdir(parents=True)
  shutil.copytree(fault.ENCODERS / 'siglip', outside / 'weights')
  names = (
      '..', '../outside', str(outside), 'a\0b', '../outside/train', '.', '',
      'train/../../outside/train', '/', './train', '~', 'train/',
  )
  allowed, tried = [], 0

  def attempt(what, function, *arguments):
    nonlocal tried
    tried += 1
    if fault.refusal(function, *arguments) is None:
      allowed.append(what)

  for name in names:
    attempt(f'split {name!r}', folders.FolderSource, str(root), name)
    if name:
      attempt(f'data.name {name!r}', tfds_source.find_prepared, name, str(root))
  # A version folder that only a path with .. reaches.
  (root / 'tiny').mkdir()
  (root / '1.0.0').mkdir()
  (root / '1.0.0/dataset_info.json').write_text('{"name": "tiny"}')
  for name in ('tiny/..', 'tiny/.', 'tiny:../1.0.0', 'a/b/c', 'tiny\n'):
    attempt(f'data.name {name!r}', tfds_source.find_prepared, name, str(root))
  index = root / 'weights'
  index.mkdir()
  shutil.copy(outside / 'weights/config.json', index)
  with open(outside / 'weights/model.safetensors', 'rb') as file:
    (outside / 'x.safetensors').write_bytes(file.read())
  for name in (
      '../../outside/x.safetensors', str(outside / 'x.safetensors'), '..', '.',
      '', 'a\0b', 'sub/x.safetensors', '../weights/model.safetensors', 3, None,
  ):
    (index / 'model.safetensors.index.json').write_text(
        json.dumps({'weight_map': {'a': name}})
    )
    attempt(f'weight_map {name!r}', models.load_encoder, index)
    attempt(f'hash {name!r}', models.hash_weights, index)
  for field in (
      'data.data_dir', 'data.name', 'data.train_split', 'data.eval_split',
      'model.encoder.checkpoint', 'model.decoder.mae.checkpoint',
      'model.latent_statistics', 'train.init_from', 'train.compilation_cache',
      'losses.perceptual.checkpoint', 'discriminator.dino.checkpoint',
      'eval.networks.rfid', 'eval.networks.lpips_alexnet',
  ):
    fields = {field.replace('.', '__'): 'a\0b'}
    attempt(f'{field} with NUL', lambda x: fault.toy_config(**x), fields)
  attempt('workdir with NUL', workdirs.create, str(folder / 'a\0b'))
  for load in _LOADERS.values():
    attempt('NUL to a loader', load, pathlib.Path(f'{folder}/a\0b'))
  return fault.Outcome(
      not allowed,
      f'{tried - len(allowed)} of {tried} refused: splits, names of data sets,'
      ' files of an index, fields with paths'
      + (f'; not: {allowed}' if allowed else ''),
      {'tried': tried, 'allowed': allowed},
  )


FAULTS = {
    'F3': fault.Fault(
        'pickles, object arrays and torch files under all names of weights',
        'nothing executed, all refused', _pickles,
    ),
    'F4': fault.Fault(
        '10,000 mutations of each kind of file, and bombs',
        '0 crashes, <= 200 MB', _fuzz,
    ),
    'F5': fault.Fault(
        '.., absolute paths, NUL, links in names that become paths',
        '100 % refused', _escapes,
    ),
}
