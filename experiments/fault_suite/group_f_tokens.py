"""Faults of tokens from elsewhere: arrays, specs and files."""

from collections.abc import Sequence
import hashlib
import json
import pathlib
import shutil

import numpy as np

from experiments.fault_suite import fault
from fsq_jax import quantizers
from fsq_jax import tokens
from fsq_jax.quantizers import convert
from fsq_jax.tokens import manifest
from fsq_jax.tokens import shards
from fsq_jax.tokens import writer as writers

_FSQ = quantizers.FSQ((8, 5, 5))
_PAPER = quantizers.FSQ((8, 5, 5), convention='paper')
_GROUPED = quantizers.GroupedFSQ((8, 5), num_groups=2)
_MODEL = 'ab' * 32
# Fields of a manifest that decoding depends on.
_FIELDS = (
    'format', 'version', 'storage', 'quantizer', 'codebook_size', 'index_shape',
    'dtype', 'model_hash', 'fit', 'image_size', 'batch_size',
    'images_per_shard', 'source', 'grid', 'num_images', 'num_damaged',
    'damaged', 'shards',
)  # fmt: skip
_WRONG = (None, -1, 2.5, 10**18, 'x', [], [3], {}, {'x': 1}, True)


def _job(storage: str, quantizer: quantizers.Quantizer = _FSQ) -> tokens.Job:
  return tokens.Job(
      storage=storage,
      quantizer=quantizer.spec(),
      codebook_size=quantizer.codebook_size,
      index_shape=tuple(quantizer.index_shape),
      model_hash=_MODEL,
      fit='crop',
      image_size=(16, 16),
      batch_size=8,
      images_per_shard=8,
      source={'source': 'synthetic', 'num_examples': 24},
      label_names=(),
  )


def _examples(job: tokens.Job, rng: np.random.Generator):
  shape = (8, 4, 4, *job.index_shape)
  return [
      tokens.Example(x, str(i), -1, (16, 16), (16, 16))
      for i, x in enumerate(
          rng.integers(0, job.codebook_size, shape, dtype=np.int32)
      )
  ]


def _write(folder: pathlib.Path, storage: str, rng) -> None:
  writer = writers.TokenWriter(folder, _job(storage))
  for shard in range(3):
    writer.write(
        shard, _examples(_job(storage), rng), damaged=[], source_bytes=None
    )
  writer.finish()


def _harm_bytes(folder: pathlib.Path, paths: Sequence[pathlib.Path], rng):
  """Flips, cuts, lengthens, deletes or exchanges files of tokens."""
  path, other = rng.choice(paths, 2, replace=False)
  content = path.read_bytes()
  kind = rng.integers(5)
  if kind == 0:
    at = rng.integers(len(content))
    flipped = bytes([content[at] ^ 1 << rng.integers(8)])
    path.write_bytes(content[:at] + flipped + content[at + 1 :])
  elif kind == 1:
    path.write_bytes(content[: rng.integers(len(content))])
  elif kind == 2:
    path.write_bytes(content + b'\0')
  elif kind == 3:
    path.unlink()
  else:
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _harm_manifest(folder: pathlib.Path, paths: Sequence[pathlib.Path], rng):
  """Leaves out a field of the manifest, or gives it a value of another kind."""
  path = folder / manifest.FILE
  values = json.loads(path.read_text())
  name = rng.choice(_FIELDS)
  if rng.integers(4):
    wrong = [
        x for x in _WRONG
        # The common grid may be unknown.
        if x != values[name] and not (name == 'grid' and x is None)
    ]  # fmt: skip
    values[name] = wrong[rng.integers(len(wrong))]
  else:
    del values[name]
  path.write_text(json.dumps(values))


def _harm_content(folder: pathlib.Path, paths: Sequence[pathlib.Path], rng):
  """Puts tokens of another kind in a file's place, with the right hash."""
  path = folder / manifest.FILE
  values = json.loads(path.read_text())
  job = manifest.read(folder).job
  kind = rng.integers(5)
  if kind == 1:
    job = _job(job.storage, _GROUPED)
  elif kind == 2:
    job = _job(job.storage, quantizers.LFQ(20))
  examples = _examples(job, rng)
  at = rng.integers(8)
  if kind == 0:
    examples[at].tokens[tuple(rng.integers(4, size=2))] = rng.choice(
        [200, 300, 2**16 - 1]
    )
  elif kind == 3:
    del examples[at]
  elif kind == 4:
    examples[at] = examples[at]._replace(tokens=examples[at].tokens[:-1])
  shard = rng.integers(3)
  shards.write(paths[shard], examples, job)
  content = paths[shard].read_bytes()
  values['shards'][shard] |= {
      'num_bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()
  }
  path.write_text(json.dumps(values))


def _harm_model(folder: pathlib.Path, paths: Sequence[pathlib.Path], rng):
  """Makes the tokens those of another dialect or model, rightly described."""
  path = folder / manifest.FILE
  values = json.loads(path.read_text())
  if rng.integers(2):
    values['quantizer'] = _PAPER.spec()
  else:
    values['model_hash'] = 'cd' * 32
  path.write_text(json.dumps(values))


def _use(folder: pathlib.Path) -> None:
  """Does what detokenizing does before it decodes."""
  source = tokens.TokenSource(folder)
  source.check_decodable(_FSQ.spec(), _MODEL)
  for example in source:
    convert.convert_indices(example.tokens, _FSQ.spec(), _PAPER.spec())


def _fuzz_files(folder: pathlib.Path, num: int) -> list[str]:
  """Corrupts token files; returns the cases without an error."""
  rng = np.random.default_rng(0)
  for storage in manifest.STORAGES:
    _write(folder / storage, storage, rng)
    _use(folder / storage)
  kinds = _harm_bytes, _harm_manifest, _harm_content, _harm_model
  passed = []
  for i in range(num):
    storage = manifest.STORAGES[i % 2]
    harmed = folder / 'harmed'
    shutil.copytree(folder / storage, harmed)
    harm = kinds[i // 2 % len(kinds)]
    harm(harmed, sorted(harmed.glob('tokens-*')), rng)
    if fault.refusal(_use, harmed) is None:
      passed.append(f'{storage} {harm.__name__} {i}')
    shutil.rmtree(harmed)
  return passed


def _fuzz_arrays(cases: int) -> int:
  """Corrupts token arrays or specs; returns how many raised an error."""
  rng = np.random.default_rng(0)
  good = rng.integers(0, 200, (4, 8))
  refused = 0
  for i in range(cases):
    indices, source, target = good.copy(), _FSQ.spec(), _PAPER.spec()
    kind = i % 8
    where = rng.integers(4), rng.integers(8)
    if kind == 0:
      indices[where] = rng.choice([200, -2, 2**31, 2**40, -(2**62)])
    elif kind == 1:
      indices = indices.astype(rng.choice(['float32', 'float64', 'complex64']))
    elif kind == 2:
      source = _GROUPED.spec()
      target = {**source, 'index_order': 'x'}
    elif kind == 3:
      source = {**source, rng.choice(['levels', 'code', 'eps']): 'x'}
    elif kind == 4:
      del source[rng.choice(sorted(source))]
    elif kind == 5:
      target = quantizers.FSQ((8, 5, 4)).spec()
    elif kind == 6:
      indices, source = indices[..., :3, None], _GROUPED.spec()
      target = source
    else:
      source = {'name': 'vq', 'codebook_size': 200}
    refused += (
        fault.refusal(convert.convert_indices, indices, source, target)
        is not None
    )
  return refused


def _tokens(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  cases = 300 if quick else 3000
  refused = _fuzz_arrays(cases)
  num_files = 80 if quick else 2000
  passed = _fuzz_files(folder, num_files)
  unnoticed = 0
  for wrong in (-1, 200, 2**31 - 1, -(2**31)):
    codes = _FSQ.indices_to_codes(np.array([wrong]))
    unnoticed += not np.isnan(np.asarray(codes)).all()
  return fault.Outcome(
      refused == cases and not passed and not unnoticed,
      f'{refused} of {cases} arrays of tokens and specs and'
      f' {num_files - len(passed)} of {num_files} folders of token files'
      f' (array_record and npz) refused, {unnoticed} of 4 tokens out of range'
      ' decoded' + (f'; not: {passed[:5]}' if passed else ''),
      {'refused': refused, 'cases': cases, 'files': num_files,
       'passed': passed},
  )


FAULTS = {
    'F6': fault.Fault(
        'tokens and token files of wrong range, shape, type, dialect, model or'
        ' count, damaged or exchanged',
        '100 % refused', _tokens,
    ),
}
