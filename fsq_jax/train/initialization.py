"""What a new run starts from: random, pretrained, and other runs' variables."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import safetensors

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.checkpoints import saved_model
from fsq_jax.train import state as train_state


class Start:
  """What a new run starts from, found and checked.

  With train.init_from that is all of another run; else what there is of
  model.encoder.checkpoint, model.decoder.mae.checkpoint and
  model.latent_statistics. The rest is initialised.

  Attributes:
    facts: fields of the config and what they name, for run.json; {} if all is
      initialised.
  """

  def __init__(
      self, config: ml_collections.ConfigDict, model: models.Autoencoder
  ):
    """Refuses files that do not fit; reads little of them.

    Args:
      config: the whole config.
      model: from `models.build_autoencoder` of the same config.

    Raises:
      ValueError: files that are missing or unreadable, or of another model.
    """
    self._config = config
    self._model = model
    self._run = None
    self.facts: dict[str, Any] = {}
    if config.train.init_from:
      # Once: that run may save another step meanwhile.
      self._run = _find_run(config)
      self.facts['train.init_from'] = str(self._run.folder)
      self.facts['step'] = self._run.step
      return
    if reads_encoder(config):
      self._check_encoder(config.model.encoder.checkpoint)
    mae = config.model.decoder.mae
    if config.model.decoder.name == 'mae' and mae.checkpoint:
      self._check_decoder(mae.checkpoint)
    if model.statistics is not None:
      _read_statistics(config, model)
      self.facts['model.latent_statistics'] = config.model.latent_statistics

  def load(
      self, builder: train_state.StateBuilder, mesh: jax.sharding.Mesh
  ) -> dict[str, Any]:
    """Reads the variables that are not to be initialised.

    Args:
      builder: of the same config.
      mesh: from `partitioning.create_mesh`.

    Returns:
      A part of `builder.abstract_variables`, for `builder.create`, spread over
      devices as said there.

    Raises:
      ValueError: weights that are missing or damaged.
    """
    if self._run is not None:
      _, variables = saved_model.restore(self._run, mesh)
      return _place(variables, builder.abstract_variables)
    config, model = self._config, self._model
    parts = {}
    if path := self.facts.get('model.encoder.checkpoint'):
      with naming('model.encoder.checkpoint'):
        parts['encoder'] = models.load_encoder(
            path,
            model.encoder.image_size,
            model.encoder.final_affine,
            shardings=lambda _: _shardings(builder, 'encoder'),
        ).variables
    if path := self.facts.get('model.decoder.mae.checkpoint'):
      with naming('model.decoder.mae.checkpoint'):
        parts['decoder'] = models.load_decoder(
            path,
            config.model.decoder.mae.normalization,
            shardings=lambda _: _shardings(builder, 'decoder'),
        ).variables
    if model.statistics is not None:
      values = {'constants': _read_statistics(config, model)}
      parts['statistics'] = jax.tree.map(
          jax.device_put, values, _shardings(builder, 'statistics')
      )
    variables: dict[str, Any] = {}
    for part, collections in parts.items():
      for collection, values in collections.items():
        variables.setdefault(collection, {})[part] = values
    return variables

  def _check_encoder(self, path: str) -> None:
    with naming('model.encoder.checkpoint'):
      module = models.build_encoder(path)
    _check_architecture(
        'model.encoder', module.architecture, self._model.encoder.architecture
    )
    self.facts['model.encoder.checkpoint'] = path

  def _check_decoder(self, path: str) -> None:
    normalization = self._config.model.decoder.mae.normalization
    with naming('model.decoder.mae.checkpoint'):
      module = models.build_decoder(path, normalization)
    decoder = self._model.decoder
    _check_architecture(
        'model.decoder.mae', module.architecture, decoder.architecture
    )
    for field in ('input_width', 'grid_size'):
      given, wanted = getattr(module, field), getattr(decoder, field)
      if given != wanted:
        raise ValueError(
            f'model.decoder.mae.checkpoint has {field} {given}, the decoder of'
            f' this config {wanted}; set model.decoder.mae.{field}.'
        )
    self.facts['model.decoder.mae.checkpoint'] = path


def reads_encoder(config: ml_collections.ConfigDict) -> bool:
  """Whether a new run reads the weights of its encoder from a checkpoint."""
  encoder = config.model.encoder
  return encoder.name == 'pretrained' and bool(encoder.checkpoint)


def encoder_facts(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns what latents depend on, as files of their statistics say it."""
  encoder = configuration.resolve(config).model.encoder
  if encoder.name != 'pretrained':
    return {'encoder': encoder.name}
  architecture = models.parse_architecture(encoder.architecture)
  return {
      'encoder': models.describe_architecture(architecture),
      'final_affine': str(encoder.final_affine),
      'image_size': str(
          tuple(encoder.image_size) or tuple(config.data.image_size)
      ),
      'resize': encoder.resize,
  }


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
  """Puts the field that names a file before what is wrong with the file."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{field}: {error}') from error


def _find_run(config: ml_collections.ConfigDict) -> saved_model.Checkpoint:
  """Finds the run of train.init_from, which must be of the same model."""
  with naming('train.init_from'):
    found = saved_model.find_run(config.train.init_from)
  if differences := configuration.diff_models(found.config, config):
    raise ValueError(
        '\n  '.join([
            f'train.init_from is {found.folder}, a run of another model'
            ' (saved -> current):',
            *differences,
        ])
    )
  return found


def _check_architecture(section: str, given: Any, wanted: Any) -> None:
  # Positions are resampled before they get into the model.
  given = dataclasses.replace(given, position_kernel=wanted.position_kernel)
  differences = [
      f'{field.name}: {getattr(wanted, field.name)!r} ->'
      f' {getattr(given, field.name)!r}'
      for field in dataclasses.fields(wanted)
      if getattr(wanted, field.name) != getattr(given, field.name)
  ]
  if not differences:
    return
  fix = 'change the fields of model.decoder to it.'
  if section == 'model.encoder':
    fix = (
        '--config.model.encoder.architecture=checkpoint takes what the'
        ' checkpoint has.'
    )
  raise ValueError(
      '\n  '.join([
          f'{section}.checkpoint is of another architecture than the config'
          ' (config -> checkpoint):',
          *differences,
      ])
      + f'\nUse another checkpoint; or {fix}'
  )


def _read_statistics(
    config: ml_collections.ConfigDict, model: models.Autoencoder
) -> dict[str, Any]:
  """Reads the file of `latent_statistics.write`."""
  path = pathlib.Path(config.model.latent_statistics).expanduser()
  shape = (*model.statistics.grid_size, model.statistics.width)
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      facts = file.metadata() or {}
      names = list(file.keys())
      arrays = {name: file.get_tensor(name) for name in names}
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(
        f'model.latent_statistics {path} cannot be read ({error}); write it'
        ' with --mode=latent_statistics.'
    ) from error
  found = {name: (x.shape, str(x.dtype)) for name, x in arrays.items()}
  if found != dict.fromkeys(('mean', 'variance'), (shape, 'float32')):
    raise ValueError(
        f'model.latent_statistics {path} holds {found}; the latents of this'
        f' config need mean and variance, float32 of shape {shape}. Write them'
        ' with --mode=latent_statistics.'
    )
  differences = [
      f'{name}: {facts.get(name)} -> {wanted}'
      for name, wanted in encoder_facts(config).items()
      if facts.get(name) != wanted
  ]
  if differences:
    raise ValueError(
        '\n  '.join([
            f'model.latent_statistics {path} is of other latents than this'
            ' config makes (file -> config):',
            *differences,
        ])
    )
  finite = all(np.isfinite(x).all() for x in arrays.values())
  if not finite or arrays['variance'].min() < 0:
    raise ValueError(
        f'model.latent_statistics {path} holds values that are not finite, or'
        ' negative variances; write it anew with --mode=latent_statistics.'
    )
  return arrays


def _shardings(builder: train_state.StateBuilder, part: str) -> Any:
  """Shardings of the variables of one part, by collection."""
  return {
      collection: jax.tree.map(lambda x: x.sharding, parts[part])
      for collection, parts in builder.abstract_variables.items()
      if part in parts
  }


def _place(variables: Mapping[str, Any], abstract: Mapping[str, Any]) -> Any:
  """Spreads arrays over devices as their abstract counterparts say."""
  return jax.tree.map(
      lambda x, a: jax.device_put(x, a.sharding), variables, dict(abstract)
  )
