"""Initial variables of a new run: random, pretrained, or of another model."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import re
from typing import Any

from flax import traverse_util
import jax
import ml_collections
import numpy as np
import safetensors

from fsq_jax.checkpoints import saved_model
from fsq_jax.configuration import errors
from fsq_jax.configuration import loading as config_loading
from fsq_jax.configuration import rules
from fsq_jax.configuration import shipped
from fsq_jax.models import autoencoder
from fsq_jax.models.pretrained import architectures
from fsq_jax.models.pretrained import loading as pretrained
from fsq_jax.tokenizer import files as tokenizer_files
from fsq_jax.train import transfer
from fsq_jax.workdir import files as workdirs


class Initializer:
  """Finds, checks and loads the initial variables of a new run.

  train.init_from, another run or a saved tokenizer, comes first, see
  `transfer.Transfer`. Parts that take nothing from it are initialized from
  model.encoder.checkpoint, model.decoder.mae.checkpoint and
  model.latent_statistics, where given. All other variables are random.

  Attributes:
    sources: fields of the config and the files that they name, for run.json;
      {} if everything is random.
    has_encoder: whether the encoder is loaded, and is that of its source.
  """

  def __init__(
      self, config: ml_collections.ConfigDict, model: autoencoder.Autoencoder
  ):
    """Checks the files; reads only their metadata and statistics.

    Args:
      config: the whole config.
      model: from `models.build_autoencoder` of the same config.

    Raises:
      ValueError: missing, unreadable or corrupted files, or another model's.
    """
    self._config = config
    self._model = model
    self._transfer = self._statistics = None
    self.sources: dict[str, Any] = {}
    if config.train.init_from:
      # Once, since a run may save another step before `load`.
      with errors.about('train.init_from'):
        source = find_source(config.train.init_from)
      self._transfer = transfer.Transfer(source, config, model)
      self.sources['train.init_from'] = str(source.folder)
      if source.step is not None:
        self.sources['step'] = source.step
      if lines := self._transfer.lines():
        self.sources['differences'] = lines
    if reads_encoder(config) and not self._takes('encoder'):
      self._check_encoder(config.model.encoder.checkpoint)
    mae = config.model.decoder.mae
    if (
        config.model.decoder.name == 'mae'
        and mae.checkpoint
        and not self._takes('decoder')
    ):
      self._check_decoder(mae.checkpoint)
    if model.statistics is not None and not self._takes('statistics'):
      self._statistics = read_statistics(config, model)
      self.sources['model.latent_statistics'] = config.model.latent_statistics
    self.has_encoder = 'model.encoder.checkpoint' in self.sources or (
        self._transfer is not None and self._transfer.has_same_encoder
    )
    self._check_frozen(config.optim.frozen)
    if config.losses.distillation_weight and not self.has_encoder:
      raise ValueError(
          'losses.distillation_weight needs a trained encoder as the teacher,'
          f' which {config.train.init_from} does not have for this config; set'
          ' the weight to 0, a model.encoder.checkpoint, or another'
          ' train.init_from.'
      )

  def describe(self) -> list[str]:
    """Returns lines of where the variables come from."""
    lines = []
    for name, value in self.sources.items():
      if name == 'step':  # Of the source before it.
        lines[-1] += f', step {value}'
      elif name == 'differences':
        lines += value
      else:
        lines.append(f'Initialized from {name} {value}')
    return lines

  def load(
      self, abstract: Mapping[str, Any], mesh: jax.sharding.Mesh
  ) -> dict[str, Any]:
    """Loads the variables that are not random.

    Args:
      abstract: shapes, dtypes and shardings of the model's variables.
      mesh: from `partitioning.create_mesh`.

    Returns:
      A subtree of the variables, with these shardings.

    Raises:
      ValueError: missing or corrupted weights.
    """
    variables = self._load_files(abstract)
    if self._transfer is None:
      return variables
    return traverse_util.unflatten_dict(
        traverse_util.flatten_dict(variables, sep='/')
        | self._transfer.load(abstract, mesh),
        sep='/',
    )

  def _check_frozen(self, patterns: Sequence[str]) -> None:
    """Raises ValueError if parameters that are not taken are frozen."""
    loaded = {
        part
        for part, field in (
            ('encoder', 'model.encoder.checkpoint'),
            ('decoder', 'model.decoder.mae.checkpoint'),
        )
        if field in self.sources
    }
    paths = (
        path.removeprefix('params/')
        for path in (self._transfer.fresh if self._transfer else ())
        if path.startswith('params/')
    )
    random = sorted(
        path
        for path in paths
        if path.split('/')[0] not in loaded
        and any(re.fullmatch(pattern, path) for pattern in patterns)
    )
    if random:
      raise ValueError(
          f'optim.frozen freezes {", ".join(random[:5])}, which'
          f' {self.sources["train.init_from"]} does not have for this config,'
          ' so that they would stay random; do not freeze them, or set'
          ' model.encoder.checkpoint or another train.init_from.'
      )

  def _takes(self, part: str) -> bool:
    """Whether train.init_from has arrays of a part."""
    return self._transfer is not None and self._transfer.takes(part)

  def _load_files(self, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Loads the checkpoints of encoder and decoder, and the statistics."""
    config, model = self._config, self._model
    parts = {}
    if path := self.sources.get('model.encoder.checkpoint'):
      with errors.about('model.encoder.checkpoint'):
        parts['encoder'] = pretrained.load_encoder(
            path,
            model.encoder.image_size,
            model.encoder.final_affine,
            shardings=lambda _: _shardings(abstract, 'encoder'),
        ).variables
    if path := self.sources.get('model.decoder.mae.checkpoint'):
      with errors.about('model.decoder.mae.checkpoint'):
        parts['decoder'] = pretrained.load_decoder(
            path,
            config.model.decoder.mae.normalization,
            shardings=lambda _: _shardings(abstract, 'decoder'),
        ).variables
    if self._statistics is not None:
      values = {'constants': self._statistics}
      parts['statistics'] = jax.tree.map(
          jax.device_put, values, _shardings(abstract, 'statistics')
      )
    variables: dict[str, Any] = {}
    for part, collections in parts.items():
      for collection, values in collections.items():
        variables.setdefault(collection, {})[part] = values
    return variables

  def _check_encoder(self, path: str) -> None:
    with errors.about('model.encoder.checkpoint'):
      module = pretrained.build_encoder(path)
    _check_architecture(
        'model.encoder', module.architecture, self._model.encoder.architecture
    )
    self.sources['model.encoder.checkpoint'] = path

  def _check_decoder(self, path: str) -> None:
    normalization = self._config.model.decoder.mae.normalization
    with errors.about('model.decoder.mae.checkpoint'):
      module = pretrained.build_decoder(path, normalization)
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
    self.sources['model.decoder.mae.checkpoint'] = path


def find_source(name: str) -> transfer.Source:
  """Finds a trained model and reads its config, but no array.

  Args:
    name: workdir of a run, whose newest checkpoint is used; a folder of
      `save_pretrained`; 'owner/name' of one on the Hugging Face Hub; or the
      name of a tokenizer that ships with the package.

  Raises:
    ValueError: there is no such model, it is corrupted, or a generator.
  """
  is_name = name in shipped.NAMES or rules.is_hub_id(name)
  if is_name:
    folder = tokenizer_files.find(name)
  else:
    folder = workdirs.run_folder(name, 'train.init_from')
  if is_name or workdirs.is_file(folder / tokenizer_files.WEIGHTS):
    config, metadata = tokenizer_files.read_description(folder)
    return transfer.Source(
        folder, metadata.step, config, metadata.decoder_only,
        lambda mesh: tokenizer_files.read(folder, mesh).variables,
    )
  found = saved_model.find_run(folder)
  saved_model.check_same_kind(found, is_generator=False)
  return transfer.Source(
      found.folder, found.step, found.config, False,
      lambda mesh: saved_model.restore(found, mesh)[1],
  )


def reads_encoder(config: ml_collections.ConfigDict) -> bool:
  """Whether a new run loads its encoder from a checkpoint."""
  encoder = config.model.encoder
  return encoder.name == 'pretrained' and bool(encoder.checkpoint)


def encoder_metadata(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns what determines the latents, as metadata of statistics files."""
  encoder = config_loading.resolve(config).model.encoder
  if encoder.name != 'pretrained':
    return {'encoder': encoder.name}
  architecture = architectures.parse_architecture(encoder.architecture)
  return {
      'encoder': architectures.describe_architecture(architecture),
      'final_affine': str(encoder.final_affine),
      'image_size': str(
          tuple(encoder.image_size) or tuple(config.data.image_size)
      ),
      'resize': encoder.resize,
  }


def read_statistics(
    config: ml_collections.ConfigDict, model: autoencoder.Autoencoder
) -> dict[str, np.ndarray]:
  """Reads the file of model.latent_statistics.

  Args:
    config: the whole config.
    model: from `models.build_autoencoder` of the same config.

  Returns:
    'mean' and 'variance', [h, w, C] float32.

  Raises:
    ValueError: a missing or corrupted file, or statistics of other latents.
  """
  path = pathlib.Path(config.model.latent_statistics).expanduser()
  shape = (*model.statistics.grid_size, model.statistics.width)
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      metadata = file.metadata() or {}
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
      f'{name}: {metadata.get(name)} -> {wanted}'
      for name, wanted in encoder_metadata(config).items()
      if metadata.get(name) != wanted
  ]
  if differences:
    raise ValueError(
        '\n  '.join([
            f'model.latent_statistics {path} was measured on other latents than'
            " this config's (file -> config):",
            *differences,
        ])
    )
  finite = all(np.isfinite(x).all() for x in arrays.values())
  if not finite or arrays['variance'].min() < 0:
    raise ValueError(
        f'model.latent_statistics {path} holds values that are not finite, or'
        ' negative variances; write it again with --mode=latent_statistics.'
    )
  return arrays


def _check_architecture(section: str, given: Any, wanted: Any) -> None:
  # Position embeddings are resampled when they are loaded.
  given = dataclasses.replace(given, position_kernel=wanted.position_kernel)
  differences = [
      f'{field.name}: {getattr(wanted, field.name)!r} ->'
      f' {getattr(given, field.name)!r}'
      for field in dataclasses.fields(wanted)
      if getattr(wanted, field.name) != getattr(given, field.name)
  ]
  if not differences:
    return
  fix = 'change the fields of model.decoder.'
  if section == 'model.encoder':
    fix = 'set --config.model.encoder.architecture=checkpoint.'
  raise ValueError(
      '\n  '.join([
          f'{section}.checkpoint has another architecture than the config'
          ' (config -> checkpoint):',
          *differences,
      ])
      + f'\nUse another checkpoint, or {fix}'
  )


def _shardings(abstract: Mapping[str, Any], part: str) -> Any:
  """Returns the shardings of one part's variables, by collection."""
  return {
      collection: jax.tree.map(lambda x: x.sharding, parts[part])
      for collection, parts in abstract.items()
      if part in parts
  }

