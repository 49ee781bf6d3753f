"""manifest.json of a folder of token files: job, files, hashes, summary."""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

from flax import traverse_util
import numpy as np

from fsq_jax.checkpoints import integrity
from fsq_jax.configuration import rules
from fsq_jax.quantizers import builder
from fsq_jax.quantizers import convert
from fsq_jax.workdir import files as workdirs

FILE = 'manifest.json'
# Folder of partial results, until the manifest is written.
UNFINISHED = '.unfinished'
_FORMAT = 'fsq_jax tokens'
# 2: one view per image. 3: several.
_VERSIONS = (2, 3)
# Layout of the files, for readers without this package.
_LAYOUTS = {
    'array_record': (
        'A record is an image, little endian: int64 label; uint32 h, w, H, W,'
        ' H and W of the original,{view} and number of bytes of the name; the'
        ' name; h * w * prod(index_shape) tokens of `dtype`, in C order. Names'
        ' are UTF-8; a file name that is not valid UTF-8 is stored as its bytes'
        ' (in Python os.fsencode, os.fsdecode).'
    ),
    'npz': (
        'tokens [sum of h * w, *index_shape] are those of one image after'
        ' another, each in C order; grid [n, 2] has their h and w, size [n, 2]'
        ' H and W, original_size [n, 2] those of the original;{view} label [n],'
        ' name [n]. Names are Unicode; of a file name that is not valid UTF-8'
        ' the bytes 0x80 ... 0xff that cannot be decoded are U+DC80 ... U+DCFF'
        " (Python's surrogateescape)."
    ),
}
_VIEW_LAYOUTS = {
    'array_record': (
        ' number of the view, top, left, height and width of its crop, 1 if'
        ' it is mirrored left to right, else 0,'
    ),
    'npz': (
        ' view [n], crop [n, 4] with top, left, height and width, flipped [n];'
    ),
}
_MEANING = (
    ' (h, w) is the grid of tokens, (H, W) the size in pixels of the image that'
    ' was fitted to the model, the original is the image before'
    ' data.resize_shorter; label -1 is none. All arrays are row-major.'
)
_VIEW_MEANING = (
    ' A crop is in pixels of the image of size (H, W); views of an image follow'
    ' each other.'
)
STORAGES = tuple(_LAYOUTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """Everything except the images that determines the token files.

  Attributes:
    storage: one of `STORAGES`.
    quantizer: spec of the quantizer: levels, convention, index order.
    codebook_size: K; tokens are 0 ... K - 1.
    index_shape: trailing axes of the tokens of one code; () for most.
    model_hash: of the model that made the tokens.
    fit: how images were fitted to the model, 'crop' or 'pad'.
    image_size: (height, width) in pixels of the crops, or of the images that
      the model was trained with.
    batch_size: largest number of images that were encoded together.
    images_per_shard: images of the source per file, readable or not; the last
      file has the rest.
    source: fingerprint of the images, with 'channels' unless they are RGB.
    label_names: class names by label; () without classes.
    views: random crops per image; 1 is the centre crop of evaluation.
    augmentation: 'seed', 'crop_scale' and 'flip' of several views, see
      `data.draw_augmentation`; None for one view.
  """

  storage: str
  quantizer: Mapping[str, Any]
  codebook_size: int
  index_shape: tuple[int, ...]
  model_hash: str
  fit: str
  image_size: tuple[int, int]
  batch_size: int
  images_per_shard: int
  source: Mapping[str, Any]
  label_names: tuple[str, ...]
  views: int = 1
  augmentation: Mapping[str, Any] | None = None

  @property
  def channels(self) -> int:
    """Channels of the images; the fingerprint of RGB images lacks them."""
    return self.source.get('channels', 3)

  @property
  def version(self) -> int:
    """Version of the format; readers of one view per image know only 2."""
    return _VERSIONS[self.views > 1]

  @property
  def dtype(self) -> np.dtype:
    """uint16 if all tokens fit, else int32; little endian."""
    return np.dtype('<u2' if self.codebook_size <= 2**16 else '<i4')

  @property
  def num_shards(self) -> int:
    """Number of files."""
    return math.ceil(self.source['num_examples'] / self.images_per_shard)

  def shard_file(self, shard: int) -> str:
    """Name of the file of a shard."""
    return f'tokens-{shard:05d}-of-{self.num_shards:05d}.{self.storage}'

  def indices(self, shard: int) -> range:
    """Returns the indices of the images of a shard, readable or not."""
    start = shard * self.images_per_shard
    stop = start + self.images_per_shard
    return range(start, min(stop, self.source['num_examples']))

  def to_json(self) -> dict[str, Any]:
    """Returns plain values: the attributes and fields derived from them."""
    has_views = self.views > 1
    layout = _LAYOUTS[self.storage].format(
        view=_VIEW_LAYOUTS[self.storage] if has_views else ''
    )
    fields = {
        'format': _FORMAT,
        'version': self.version,
        **dataclasses.asdict(self),
        'dtype': self.dtype.name,
        'bits_per_token': math.log2(self.codebook_size),
        'layout': layout + _MEANING + (_VIEW_MEANING if has_views else ''),
    }
    return json.loads(json.dumps(fields))


class Shard(NamedTuple):
  """A token file.

  Attributes:
    file: its name.
    num_images: images in it, counting each view; unreadable images are missing.
    num_bytes: size of the file.
    sha256: hash of the file.
  """

  file: str
  num_images: int
  num_bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """Content of manifest.json.

  Attributes:
    job: how the files were made.
    grid: token grid (h, w) of every image; None if grids differ.
    shards: the files, in the order of the images.
    damaged: name and reason of each image that could not be read.
    content_sha256: `data.content_hash` of the images, whose hashes are in
      image_states.HASHES_FILE; None if unknown.
    summary: usage, entropy, compression; see `summary.summarize`.
  """

  job: Job
  grid: tuple[int, int] | None
  shards: tuple[Shard, ...]
  damaged: tuple[Mapping[str, str], ...]
  content_sha256: str | None = None
  summary: Mapping[str, Any]

  @property
  def num_images(self) -> int:
    """Number of images in all files, counting each view."""
    return sum(shard.num_images for shard in self.shards)

  @property
  def shards_sha256(self) -> str:
    """sha256 of the hashes of all files, in order."""
    text = ' '.join(shard.sha256 for shard in self.shards)
    return hashlib.sha256(text.encode()).hexdigest()

  def to_json(self) -> dict[str, Any]:
    """Returns plain values."""
    return self.job.to_json() | {
        'grid': self.grid and list(self.grid),
        'num_images': self.num_images,
        'num_damaged': len(self.damaged),
        'damaged': list(self.damaged),
        'content_sha256': self.content_sha256,
        'summary': dict(self.summary),
        'shards': [shard._asdict() for shard in self.shards],
    }


def read(folder: pathlib.Path) -> Manifest:
  """Reads and checks the manifest of a folder, but no other file.

  Args:
    folder: of token files.

  Returns:
    The manifest.

  Raises:
    ValueError: it is missing, corrupted, of another format, or inconsistent.
  """
  path = folder / FILE
  if not workdirs.is_file(path):
    if workdirs.is_folder(folder / UNFINISHED):
      raise ValueError(
          f'{folder} is unfinished; run the same --mode=tokenize again to'
          ' resume it.'
      )
    raise ValueError(f'{folder} holds no token files: {FILE} is missing.')
  values = _read_json(path)
  try:
    return _parse(values)
  except ValueError as error:
    raise ValueError(f'{path} cannot be used: {error}') from error


def check_same_job(path: pathlib.Path, job: Job) -> None:
  """Checks that a folder with earlier results belongs to the same job.

  Args:
    path: JSON of a job or of a manifest.
    job: the job of this run.

  Raises:
    ValueError: they differ; a line for each difference.
  """
  saved = _read_json(path)
  saved = _flatten(_ADDED | saved if isinstance(saved, dict) else {})
  wanted = _flatten(job.to_json())
  del wanted['layout']  # It follows from storage and version.
  saved = {key: saved[key] for key in wanted if key in saved}
  if lines := integrity.compare(saved, wanted, most=len(wanted)):
    note = ''
    if wanted.get('source.content') != saved.get('source.content'):
      note = (
          '\nsource.content differs: images were added, removed, renamed or'
          ' changed, or the folder is of other images.'
      )
    raise ValueError(
        '\n  '.join([f'{path} is of other tokens (saved -> now):', *lines])
        + note
        + '\nGive another folder with --tokens, or delete this one.'
    )


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(dict(values), sep='.')


def _read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(workdirs.read_bytes(path))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is corrupted, not JSON: {error}.') from error


# Fields that earlier versions did not write.
_ADDED = {'views': 1, 'augmentation': None, 'content_sha256': None}
# Results of `summary.summarize` that are printed.
_SUMMARY = (
    'usage', 'entropy_bits', 'bits_per_image', 'entropy_bits_per_image',
    'compression_of_pixels', 'compression_of_files',
)


def _is_summary(x: Any) -> bool:
  return isinstance(x, dict) and all(
      type(x.get(name)) in (float, int)
      or (x.get(name, 0) is None and name == 'compression_of_files')
      for name in _SUMMARY
  )


def _is_damaged(x: Any) -> bool:
  return isinstance(x, dict) and all(
      isinstance(x.get(name), str) for name in ('name', 'reason')
  )


_Rule = rules.Rule
_COUNT = rules.integer(0, 2**63 - 1)
_OBJECT = _Rule('an object', lambda x: isinstance(x, dict))
_HASH = _Rule(
    '64 hexadecimal digits',
    lambda x: isinstance(x, str) and bool(re.fullmatch('[0-9a-f]{64}', x)),
)
_SIZE = rules.tuple_of('two integers >= 1', rules.COUNT, (2,))
# Rules for the JSON values, with lists converted to tuples.
_RULES: Mapping[str, rules.Rule] = {
    'format': _Rule(repr(_FORMAT), lambda x: x == _FORMAT),
    'version': _Rule(
        f'one of {_VERSIONS}, which this version of fsq_jax reads',
        lambda x: type(x) is int and x in _VERSIONS,
    ),
    'storage': rules.name(*STORAGES),
    'quantizer': _OBJECT,
    'codebook_size': rules.integer(2, 2**31),
    'index_shape': rules.tuple_of('integers >= 1', rules.COUNT),
    'dtype': rules.name('uint16', 'int32'),
    'model_hash': _HASH,
    'fit': rules.name('crop', 'pad'),
    'image_size': _SIZE,
    'batch_size': rules.COUNT,
    'images_per_shard': rules.COUNT,
    'source': _Rule(
        'an object with num_examples',
        lambda x: isinstance(x, dict) and _COUNT.fits(x.get('num_examples')),
    ),
    'label_names': rules.tuple_of(
        'strings', _Rule('', lambda x: isinstance(x, str))
    ),
    'views': rules.COUNT,
    'augmentation': rules.optional(_OBJECT),
    'content_sha256': rules.optional(_HASH),
    'grid': rules.optional(_SIZE),
    'num_images': _COUNT,
    'num_damaged': _COUNT,
    'damaged': rules.tuple_of(
        'objects with name and reason', _Rule('', _is_damaged)
    ),
    'summary': _Rule(f'an object with the numbers {_SUMMARY}', _is_summary),
    'shards': _Rule('a list', lambda x: isinstance(x, tuple)),
}
_SHARD_RULES: Mapping[str, rules.Rule] = {
    'file': _Rule('a string', lambda x: isinstance(x, str)),
    'num_images': _COUNT,
    'num_bytes': _COUNT,
    'sha256': _HASH,
}


def _parse(values: Any) -> Manifest:
  """Returns the manifest of JSON values, or says which of them is invalid."""
  if isinstance(values, dict):
    values = _ADDED | values
  fields = _check_fields(values, _RULES)
  shards = tuple(
      Shard(**_check_fields(shard, _SHARD_RULES, f'shards[{i}].'))
      for i, shard in enumerate(fields['shards'])
  )
  manifest = Manifest(
      job=Job(**{x.name: fields[x.name] for x in dataclasses.fields(Job)}),
      shards=shards,
      **{
          name: fields[name]
          for name in ('grid', 'damaged', 'content_sha256', 'summary')
      },
  )
  _check_quantizer(manifest.job)
  _check_counts(values, manifest)
  return manifest


def _check_fields(
    values: Any, fields: Mapping[str, rules.Rule], prefix: str = ''
) -> dict[str, Any]:
  """Returns the fields, lists as tuples, or raises ValueError."""
  if not isinstance(values, dict):
    raise ValueError(
        f'{prefix.rstrip(".") or "it"} is {_show(values)}; needed: an object.'
    )
  checked = {}
  for name, rule in fields.items():
    if name not in values:
      raise ValueError(f'{prefix}{name} is missing; needed: {rule.allowed}.')
    value = values[name]
    checked[name] = tuple(value) if isinstance(value, list) else value
    if not rule.fits(checked[name]):
      raise ValueError(
          f'{prefix}{name} is {_show(value)}; needed: {rule.allowed}.'
      )
  return checked


def _check_quantizer(job: Job) -> None:
  """Checks codebook size and index shape against the quantizer's spec."""
  if 'index_order' in job.quantizer:
    quantizer = convert.quantizer_from_spec(job.quantizer)
    known = quantizer.codebook_size, quantizer.index_shape
  elif job.quantizer.get('name') in builder.QUANTIZERS:
    # Specs of other quantizers need not have the size.
    size = job.quantizer.get('codebook_size', job.codebook_size)
    known = size, job.index_shape
  else:
    raise ValueError(
        f'its quantizer is {job.quantizer.get("name")!r}; known:'
        f' {sorted(builder.QUANTIZERS)}.'
    )
  if known != (job.codebook_size, job.index_shape):
    raise ValueError(
        f'(codebook_size, index_shape) are {job.codebook_size, job.index_shape}'
        f' but {known} of its quantizer.'
    )


def _check_counts(values: Mapping[str, Any], manifest: Manifest) -> None:
  """Checks the fields that follow from other fields."""
  job = manifest.job
  # Before as many file names are made as the manifest claims shards.
  if job.num_shards != len(manifest.shards):
    raise ValueError(
        f'it lists {len(manifest.shards)} shards; needed: {job.num_shards}.'
    )
  derived = manifest.to_json()
  needed = {
      name: (values[name], derived[name])
      for name in ('version', 'dtype', 'num_images', 'num_damaged')
  }
  needed |= {
      'augmentation': (
          None if job.augmentation is None else 'an object',
          'an object' if job.views > 1 else None,
      ),
      'num_images + views * num_damaged': (
          manifest.num_images + job.views * len(manifest.damaged),
          job.views * job.source['num_examples'],
      ),
      'files': (
          [shard.file for shard in manifest.shards],
          [job.shard_file(i) for i in range(job.num_shards)],
      ),
  }
  for name, (given, wanted) in needed.items():
    if given != wanted:
      raise ValueError(f'{name} is {_show(given)}; needed: {_show(wanted)}.')


def _show(x: Any) -> str:
  text = repr(x)
  return text if len(text) < 200 else f'{text[:200]}...'
