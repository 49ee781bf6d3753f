"""manifest.json of a folder of token files: all that decoding them needs."""

from collections.abc import Callable, Mapping
import dataclasses
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from fsq_jax.quantizers import builder
from fsq_jax.quantizers import convert

FILE = 'manifest.json'
# Of what a killed run has done, until the manifest is there.
UNFINISHED = '.unfinished'
_FORMAT = 'fsq_jax tokens'
# 2: one view of each image. 3: several.
_VERSIONS = (2, 3)
# How files are laid out, for programs without this package.
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
  """What decides, with the images, which bytes are in token files.

  Attributes:
    storage: of `STORAGES`.
    quantizer: spec of the quantizer: levels, convention, order of the index.
    codebook_size: K; tokens are 0 ... K - 1.
    index_shape: trailing axes of the tokens of one code; () for most.
    model_hash: of the model that made the tokens.
    fit: how images were fitted to it, 'crop' or 'pad'.
    image_size: (height, width) in pixels that images are cropped to, or that
      the model was trained with.
    batch_size: images that were encoded together, at most.
    images_per_shard: of the source, readable or not; the last has the rest.
    source: fingerprint of the images.
    label_names: of the classes, by label; () where they have none.
    views: random crops of each image; 1 is no random one but the evaluation's.
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
  def version(self) -> int:
    """Of the format: programs that know one view alone read version 2."""
    return _VERSIONS[self.views > 1]

  @property
  def dtype(self) -> np.dtype:
    """uint16 where all tokens fit in, else int32; little endian."""
    return np.dtype('<u2' if self.codebook_size <= 2**16 else '<i4')

  @property
  def num_shards(self) -> int:
    """Number of files, from that of images in the source."""
    return math.ceil(self.source['num_examples'] / self.images_per_shard)

  def shard_file(self, shard: int) -> str:
    """Name of the file of a shard."""
    return f'tokens-{shard:05d}-of-{self.num_shards:05d}.{self.storage}'

  def to_json(self) -> dict[str, Any]:
    """Returns plain values, with what follows from the attributes."""
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
  """One file.

  Attributes:
    file: its name.
    num_images: that it holds, each view counted; those that could not be read
      are missing.
    num_bytes: of the file.
    sha256: of the file.
  """

  file: str
  num_images: int
  num_bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What manifest.json holds.

  Attributes:
    job: what the files were made of, and how.
    grid: (h, w) of the tokens of every image; None where they differ.
    shards: the files, in the order of the images.
    damaged: name and reason of images that could not be read.
    content_sha256: `data.content_hash` of the images, of which
      image_states.HASHES_FILE has all hashes; None where it is not known.
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
    """Number of images in all files, each view counted."""
    return sum(shard.num_images for shard in self.shards)

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
  """Reads and checks the manifest of a folder; looks at no other file.

  Args:
    folder: of token files.

  Returns:
    The manifest.

  Raises:
    ValueError: there is none, or it is damaged, of another format, or says
      what cannot be; the message says what.
  """
  path = folder / FILE
  if not path.is_file():
    if (folder / UNFINISHED).is_dir():
      raise ValueError(
          f'{folder} is unfinished; run the same --mode=tokenize again, which'
          ' goes on where it stopped.'
      )
    raise ValueError(f'{folder} holds no token files: {FILE} is missing.')
  try:
    values = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is damaged, no JSON: {error}.') from error
  try:
    return _parse(values)
  except ValueError as error:
    raise ValueError(f'{path} cannot be used: {error}') from error


def check_same_job(path: pathlib.Path, job: Job) -> None:
  """Refuses to go on in a folder that is of another job.

  Args:
    path: JSON of a job or of a manifest.
    job: what is to be done.

  Raises:
    ValueError: they differ; a line for each difference.
  """
  try:
    saved = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is damaged, no JSON: {error}.') from error
  saved = _flatten(_ADDED | saved if isinstance(saved, dict) else {})
  wanted = _flatten(job.to_json())
  differences = [
      f'  {key}: {saved.get(key)!r} -> {value!r}'
      for key, value in wanted.items()
      # The layout follows from storage and version.
      if key != 'layout' and saved.get(key) != value
  ]
  if differences:
    note = ''
    if wanted.get('source.content') != saved.get('source.content'):
      note = (
          '\nsource.content differs: images were added, removed, renamed or'
          ' changed, or are others.'
      )
    raise ValueError(
        f'{path} is of other tokens (there -> now):\n'
        + '\n'.join(differences)
        + note
        + '\nGive another folder with --tokens, or delete that one.'
    )


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the values of nested objects under dotted names."""
  flat = {}
  for key, value in values.items():
    nested = _flatten(value) if isinstance(value, Mapping) else {'': value}
    flat |= {f'{key}.{name}'.rstrip('.'): x for name, x in nested.items()}
  return flat


def _is_count(x: Any) -> bool:
  return type(x) is int and 0 <= x < 2**63


def _are_counts(x: Any) -> bool:
  return isinstance(x, list) and all(map(_is_count, x))


def _is_hash(x: Any) -> bool:
  return isinstance(x, str) and bool(re.fullmatch('[0-9a-f]{64}', x))


def _are_damaged(x: Any) -> bool:
  return isinstance(x, list) and all(
      isinstance(image, dict)
      and isinstance(image.get('name'), str)
      and isinstance(image.get('reason'), str)
      for image in x
  )


def _is_summary(x: Any) -> bool:
  return isinstance(x, dict) and all(
      type(x.get(name)) in (float, int)
      or (x.get(name, 0) is None and name == 'compression_of_files')
      for name in _SUMMARY
  )


def _is_size(x: Any) -> bool:
  return _are_counts(x) and len(x) == 2 and min(x) > 0


def _are_texts(x: Any) -> bool:
  return isinstance(x, list) and all(isinstance(text, str) for text in x)


# Fields that earlier programs did not write.
_ADDED = {'views': 1, 'augmentation': None, 'content_sha256': None}
# Of `summary.summarize`, those that are shown.
_SUMMARY = (
    'usage', 'entropy_bits', 'bits_per_image', 'entropy_bits_per_image',
    'compression_of_pixels', 'compression_of_files',
)
_OBJECT = ('an object', lambda x: isinstance(x, dict))
_COUNT = ('an integer >= 0', _is_count)
_POSITIVE = ('1 ... 2^31', lambda x: _is_count(x) and 1 <= x <= 2**31)
_HASH = ('64 hexadecimal digits', _is_hash)
_Check = tuple[str, Callable[[Any], bool]]
_FIELDS: Mapping[str, _Check] = {
    'format': (repr(_FORMAT), lambda x: x == _FORMAT),
    'version': (
        f'one of {_VERSIONS}, which this program reads',
        lambda x: type(x) is int and x in _VERSIONS,
    ),
    'storage': (f'one of {STORAGES}', lambda x: x in STORAGES),
    'quantizer': _OBJECT,
    'codebook_size': (
        '2 ... 2^31', lambda x: _is_count(x) and 2 <= x <= 2**31
    ),
    'index_shape': ('integers >= 1', lambda x: _are_counts(x) and all(x)),
    'dtype': ("'uint16' or 'int32'", lambda x: x in ('uint16', 'int32')),
    'model_hash': _HASH,
    'fit': ("'crop' or 'pad'", lambda x: x in ('crop', 'pad')),
    'image_size': ('two integers >= 1', _is_size),
    'batch_size': _POSITIVE,
    'images_per_shard': _POSITIVE,
    'source': (
        'an object with num_examples',
        lambda x: isinstance(x, dict) and _is_count(x.get('num_examples')),
    ),
    'label_names': ('texts', _are_texts),
    'views': _POSITIVE,
    'augmentation': ('null or an object', lambda x: isinstance(x, dict | None)),
    'content_sha256': (
        'null or 64 hexadecimal digits', lambda x: x is None or _is_hash(x)
    ),
    'grid': (
        'null or two integers >= 1', lambda x: x is None or _is_size(x)
    ),
    'num_images': _COUNT,
    'num_damaged': _COUNT,
    'damaged': ('objects with name and reason', _are_damaged),
    'summary': (f'an object with the numbers {_SUMMARY}', _is_summary),
    'shards': ('a list', lambda x: isinstance(x, list)),
}
_SHARD_FIELDS: Mapping[str, _Check] = {
    'file': ('a text', lambda x: isinstance(x, str)),
    'num_images': _COUNT,
    'num_bytes': _COUNT,
    'sha256': _HASH,
}


def _show(x: Any) -> str:
  text = repr(x)
  return text if len(text) < 200 else f'{text[:200]}...'


def _check_fields(
    values: Any, fields: Mapping[str, _Check], prefix: str = ''
) -> None:
  if not isinstance(values, dict):
    raise ValueError(
        f'{prefix.rstrip(".") or "it"} is {_show(values)}; needed: an object.'
    )
  for name, (allowed, is_allowed) in fields.items():
    if name not in values:
      raise ValueError(f'{prefix}{name} is missing; needed: {allowed}.')
    if not is_allowed(values[name]):
      raise ValueError(
          f'{prefix}{name} is {_show(values[name])}; needed: {allowed}.'
      )


def _parse(values: Any) -> Manifest:
  if isinstance(values, dict):
    values = _ADDED | values
  _check_fields(values, _FIELDS)
  for i, shard in enumerate(values['shards']):
    _check_fields(shard, _SHARD_FIELDS, f'shards[{i}].')
  job = Job(**{
      field.name: (
          tuple(values[field.name])
          if isinstance(values[field.name], list)
          else values[field.name]
      )
      for field in dataclasses.fields(Job)
  })
  manifest = Manifest(
      job=job,
      grid=values['grid'] and tuple(values['grid']),
      shards=tuple(
          Shard(**{name: shard[name] for name in Shard._fields})
          for shard in values['shards']
      ),
      damaged=tuple(values['damaged']),
      content_sha256=values['content_sha256'],
      summary=values['summary'],
  )
  _check_dialect(job)
  _check_counts(values, manifest)
  return manifest


def _check_dialect(job: Job) -> None:
  """Refuses a codebook size or an index shape that is not the quantizer's."""
  if 'index_order' in job.quantizer:
    quantizer = convert.quantizer_from_spec(job.quantizer)
    known = quantizer.codebook_size, quantizer.index_shape
  elif job.quantizer.get('name') in builder.QUANTIZERS:
    known = job.quantizer.get('codebook_size'), ()
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
  """Refuses numbers that do not follow from each other."""
  job = manifest.job
  num_damaged = len(manifest.damaged)
  given = {
      'version': values['version'],
      'augmentation': None if job.augmentation is None else 'an object',
      'dtype': values['dtype'],
      'num_images': values['num_images'],
      'num_damaged': values['num_damaged'],
      'num_images + views * num_damaged': (
          manifest.num_images + job.views * num_damaged
      ),
      'files': [shard.file for shard in manifest.shards],
  }
  # Before as many names are made as it says that there are.
  if job.num_shards != len(manifest.shards):
    raise ValueError(
        f'it lists {len(manifest.shards)} shards; needed: {job.num_shards}.'
    )
  needed = {
      'version': job.version,
      'augmentation': 'an object' if job.views > 1 else None,
      'dtype': job.dtype.name,
      'num_images': manifest.num_images,
      'num_damaged': num_damaged,
      'num_images + views * num_damaged': (
          job.views * job.source['num_examples']
      ),
      'files': [job.shard_file(i) for i in range(job.num_shards)],
  }
  for name, value in given.items():
    if value != needed[name]:
      raise ValueError(
          f'{name} is {_show(value)}; needed: {_show(needed[name])}.'
      )
