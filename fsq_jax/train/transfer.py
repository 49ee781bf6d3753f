"""Variables of a trained model that initialize another run."""

from collections.abc import Callable, Iterable, Mapping
import functools
import pathlib
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import ml_collections

from fsq_jax.configuration import compatibility
from fsq_jax.configuration import errors
from fsq_jax.configuration import loading as config_loading
from fsq_jax.models import autoencoder
from fsq_jax.models import builder as models
from fsq_jax.models import resampling
from fsq_jax.models import variables as variables_lib
from fsq_jax.tokenizer import files as tokenizer_files

# Parts that take single arrays. A projector or a quantizer is taken as a whole:
# one of its arrays means nothing without the rest.
_DIVISIBLE = ('encoder', 'decoder')
# The fields of these parts that change some arrays and leave the meaning of the
# others; with any other difference a part is not taken.
_COMPATIBLE_FIELDS = frozenset({
    'conv.latent_width', 'image_size', 'mae.grid_size', 'mae.input_width',
    'position', 'resize',
})
# Kernel for the learned positions of models trained from scratch, as of timm's
# `resample_abs_pos_embed`. Pretrained encoders have a kernel of their family.
_POSITION_KERNEL = 'bicubic_antialias'
_PARTS = (
    'encoder', 'projector_in', 'quantizer', 'projector_out', 'decoder',
    'statistics',
)
# Most paths of arrays that a line names one by one.
_MAX_PATHS = 6


class Source(NamedTuple):
  """A trained model.

  Attributes:
    folder: of the run, or of the files of `save_pretrained`.
    step: training steps taken; None if unknown.
    config: the whole config of the run.
    decoder_only: whether encoder and projector_in are missing.
    restore: maps a mesh to the variables, placed on it.
  """

  folder: pathlib.Path
  step: int | None
  config: ml_collections.ConfigDict
  decoder_only: bool
  restore: Callable[[jax.sharding.Mesh], Mapping[str, Any]]


class Transfer:
  """The variables of the model of train.init_from that a new run takes.

  The same model takes all. From another model, encoder and decoder take every
  array with the same path and shape, and resample learned positions; the other
  parts are taken if nothing of them differs. Nothing is taken of a part with
  another architecture.

  Attributes:
    source: the model.
    differences: lines 'field: saved -> current' of the fields of the model that
      differ.
    fresh: paths of the arrays that are not taken.
    resampled: paths of learned positions to (rows, columns) before and after.
    has_same_encoder: whether its encoder is taken and computes the same.
  """

  def __init__(
      self,
      source: Source,
      config: ml_collections.ConfigDict,
      model: autoencoder.Autoencoder,
  ):
    """Compares the models; reads no array.

    Args:
      source: from `initialization.find_source`.
      config: the whole config of the new run.
      model: from `models.build_autoencoder` of the same config.

    Raises:
      ValueError: nothing of the encoder and decoder of the source can be taken.
    """
    self.source = source
    self._model = model
    differences = compatibility.find_model_differences(source.config, config)
    self.differences = config_loading.format_differences(differences)
    self.fresh: frozenset[str] = frozenset()
    self.resampled: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
    self.has_same_encoder = True
    self._paths: list[str] | None = None
    if differences or self.source.decoder_only:
      self._compare(differences, config.data.image_size)

  @property
  def is_whole(self) -> bool:
    """Whether all variables are taken, as they are."""
    return self._paths is None

  def takes(self, part: str) -> bool:
    """Whether arrays of a part, such as 'encoder', are taken."""
    return self.is_whole or any(
        _part(x) == part for x in self._paths if x not in self.fresh
    )

  def load(
      self, abstract: Mapping[str, Any], mesh: jax.sharding.Mesh
  ) -> dict[str, jax.Array]:
    """Loads the arrays that are taken.

    Args:
      abstract: shapes, dtypes and shardings of the new model's variables.
      mesh: from `partitioning.create_mesh`.

    Returns:
      Path to array, with these shardings.

    Raises:
      ValueError: the source is corrupted.
    """
    with errors.about('train.init_from'):
      variables = _flatten(self.source.restore(mesh))
    taken = {}
    for path, target in _flatten(abstract).items():
      if path in self.resampled:
        taken[path] = self._resample(path, variables[path], target)
      elif path not in self.fresh:
        taken[path] = jax.device_put(variables[path], target.sharding)
    return taken

  def lines(self) -> list[str]:
    """Returns lines of the arrays taken and not taken; [] if all are taken."""
    if self.is_whole:
      return []
    taken = [x for x in self._paths if x not in self.fresh]
    lines = []
    if self.differences:
      lines += ['The model differs (saved -> current):']
      lines += [f'  {line}' for line in self.differences]
    lines += [f'Arrays taken: {_summarize(taken, self._paths)}']
    for path, sizes in self.resampled.items():
      before, after = (f'{rows} x {columns}' for rows, columns in sizes)
      lines += [f'  {path} resampled from {before} to {after}']
    fresh = _summarize(self.fresh, self._paths) if self.fresh else 'none'
    return [*lines, f'Arrays not taken: {fresh}']

  def _compare(
      self, differences: Mapping[str, Any], image_size: tuple[int, int]
  ) -> None:
    """Finds the arrays that are not taken or are resampled."""
    source = self.source
    data = source.config.data
    size = data.image_size
    saved = models.build_autoencoder(source.config.model, size, data.channels)
    stored = _flatten(variables_lib.abstract_variables(saved, size))
    if source.decoder_only:
      stored = {
          path: x
          for path, x in stored.items()
          if _part(path) not in tokenizer_files.ENCODERS
      }
    wanted = _flatten(variables_lib.abstract_variables(self._model, image_size))
    replaced = {_replaced_part(name) for name in differences}
    fresh = set()
    for path, x in wanted.items():
      before = stored.get(path)
      if _part(path) in replaced or before is None:
        fresh.add(path)
      elif before.shape != x.shape:
        if _is_positions(path) and before.shape[2:] == x.shape[2:]:
          self.resampled[path] = before.shape[:2], x.shape[:2]
        else:
          fresh.add(path)
    incomplete = {_part(path) for path in fresh}.difference(_DIVISIBLE)
    self.has_same_encoder = not (
        any(_part(path) == 'encoder' for path in fresh)
        or any(name.startswith('model.encoder.') for name in differences)
    )
    if not self.has_same_encoder:
      incomplete.add('statistics')  # The latents are others.
    fresh |= {path for path in wanted if _part(path) in incomplete}
    self.fresh, self._paths = frozenset(fresh), list(wanted)
    if not any(map(self.takes, _DIVISIBLE)):
      raise ValueError(
          '\n  '.join([
              f'train.init_from is {source.folder}, a model of which neither'
              ' encoder nor decoder fits this config (saved -> current):',
              *self.differences,
          ])
          + '\nUse the saved values of the fields of model.encoder or'
          " model.decoder, another train.init_from, or '' for none."
      )

  def _resample(
      self, path: str, positions: jax.Array, target: jax.ShapeDtypeStruct
  ) -> jax.Array:
    module = getattr(self._model, _part(path))
    architecture = getattr(module, 'architecture', None)
    kernel = getattr(architecture, 'position_kernel', _POSITION_KERNEL)

    @functools.partial(jax.jit, out_shardings=target.sharding)
    def resize(grid: jax.Array) -> jax.Array:
      return resampling.resize_images(grid[None], target.shape[:2], kernel)[0]

    return resize(positions)


def _replaced_part(field: str) -> str | None:
  """Returns the part that a difference in a field of the model replaces."""
  section, _, name = field.partition('.')
  part, _, name = name.partition('.')
  if section != 'model':
    return None
  if part in _DIVISIBLE and name in _COMPATIBLE_FIELDS:
    return None
  return part


def _is_positions(path: str) -> bool:
  """Whether a path is of learned positions, [h, w, C]."""
  collection, _, *names = path.split('/')
  return collection == 'params' and names[:1] == ['positions']


def _part(path: str) -> str:
  """Returns the part of the autoencoder that a variable belongs to."""
  return path.split('/')[1]


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(dict(tree), sep='/')


def _summarize(paths: Iterable[str], everything: Iterable[str]) -> str:
  """Describes paths by part: 'encoder (all 14), decoder (13 of 14)'."""
  paths, everything, texts = sorted(paths), list(everything), []
  for part in _PARTS:
    names = [path for path in paths if _part(path) == part]
    total = sum(_part(path) == part for path in everything)
    if not names:
      continue
    if len(names) == total:
      texts.append(f'{part} (all {total})')
    elif len(names) <= _MAX_PATHS:
      texts.append(', '.join(names))
    else:
      texts.append(f'{part} ({len(names)} of {total})')
  return ', '.join(texts)
