"""A tokenizer as a folder: weights, config, dialect, card, and hashes of all.

model.safetensors holds the variables under their paths, config.json what they
are of, quantizer.json what the tokens mean, README.md is a card for people.
"""

from collections.abc import Callable, Mapping
import json
import os
import pathlib
import tempfile
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy

import fsq_jax
from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import integrity
from fsq_jax.models import variables
from fsq_jax.quantizers import convert
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import model_card

WEIGHTS = 'model.safetensors'
CONFIG = 'config.json'
CARD = 'README.md'
_FORMAT = 'fsq_jax tokenizer, version 1'
# What encodes and nothing else.
_ENCODERS = ('encoder', 'projector_in')


class Stored(NamedTuple):
  """What is known of a model's weights.

  Attributes:
    hashes: of each variable of the whole model, by path: `hash_arrays`.
    model_hash: sha256 of the hashes, of the spec and of the image size.
    step: training steps taken, or None.
    evaluation: content of the run's evaluation.json for that step, or None.
    decoder_only: whether what encodes is missing.
  """

  hashes: Mapping[str, str]
  model_hash: str
  step: int | None
  evaluation: Mapping[str, Any] | None
  decoder_only: bool


def build_model(
    config: ml_collections.ConfigDict, dtype: str | None = None
) -> models.Autoencoder:
  """Builds the autoencoder of a run's config.

  Args:
    config: the whole config.
    dtype: that it computes in; None is the config's.

  Raises:
    ValueError: a model that has no tokens, or a dtype that is none.
  """
  model_config = config.model.copy_and_resolve_references()
  if dtype is not None:
    if dtype not in ('float32', 'bfloat16'):
      raise ValueError(
          f"dtype is {dtype!r}; known: 'float32', 'bfloat16' and None."
      )
    model_config.dtype = dtype
  model = models.build_autoencoder(model_config, config.data.image_size)
  if not model.quantizer.codebook_size:
    raise ValueError(
        f'The quantizer {config.model.quantizer.name!r} has no tokens; a'
        ' tokenizer is a model with another one.'
    )
  return model


def describe(
    config: ml_collections.ConfigDict,
    variables: Mapping[str, Any],
    *,
    spec: Mapping[str, Any],
    step: int | None,
    evaluation: Mapping[str, Any] | None,
) -> Stored:
  """Hashes the variables of a whole model."""
  hashes = integrity.hash_arrays(dict(variables))
  return Stored(
      hashes=hashes,
      model_hash=_hash_model(config, hashes, spec),
      step=step,
      evaluation=evaluation,
      decoder_only=False,
  )


def write(
    folder: str | os.PathLike[str],
    config: ml_collections.ConfigDict,
    variables: Mapping[str, Any],
    *,
    stored: Stored,
    decoder_only: bool,
) -> pathlib.Path:
  """Writes a folder; see `tokenizer.Tokenizer.save_pretrained`."""
  if pathlib.Path(folder).is_dir() and any(pathlib.Path(folder).iterdir()):
    raise ValueError(f'{folder} is not empty; give a new folder.')
  folder = workdirs.create(folder)
  decoder_only = decoder_only or stored.decoder_only
  flat = traverse_util.flatten_dict(dict(variables), sep='/')
  arrays = {
      path: np.asarray(x)
      for path, x in flat.items()
      if not (decoder_only and _encodes(path))
  }
  stored = stored._replace(evaluation=_without_places(stored.evaluation))
  model = build_model(config)
  spec = model.quantizer.spec()
  workdirs.write_bytes(folder / WEIGHTS, safetensors.numpy.save(arrays))
  workdirs.write_json(folder / workdirs.QUANTIZER, spec)
  facts = {
      **stored._asdict(),
      'decoder_only': decoder_only,
      'spec': spec,
      'codebook_size': model.quantizer.codebook_size,
      'tokens_shape': (
          *model.encoder.grid_size, *model.quantizer.index_shape
      ),
      'num_parameters': sum(
          x.size for path, x in arrays.items() if path.startswith('params/')
      ),
  }
  workdirs.write_bytes(
      folder / CARD, model_card.write(config, facts).encode()
  )
  saved_config = _without_folders(config)
  # Last: without it the others are no tokenizer.
  workdirs.write_json(
      folder / CONFIG,
      {
          'format': _FORMAT,
          'fsq_jax': fsq_jax.__version__,
          **stored._asdict(),
          'decoder_only': decoder_only,
          'config_hash': integrity.hash_json(saved_config),
          'config': saved_config,
      },
  )
  return folder


def find(name: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a folder, downloaded from the Hugging Face Hub if it is not here.

  Args:
    name: of a folder, or 'owner/name' of a repository.

  Raises:
    ValueError: there is no such folder.
  """
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    return folder.absolute()
  if len(folder.parts) != 2 or folder.is_absolute() or folder.exists():
    raise ValueError(
        f'There is no folder {folder}; give one that save_pretrained has'
        " written, or 'owner/name' of a repository of the Hugging Face Hub."
    )
  hub = _import_hub()
  patterns = [WEIGHTS, CONFIG, workdirs.QUANTIZER, CARD]
  try:
    return pathlib.Path(
        hub.snapshot_download(str(name), allow_patterns=patterns)
    )
  # Of the hub's own kinds and of the network's, which have no common base.
  except Exception as error:
    raise ValueError(
        f'{name} is no folder here and cannot be had from the Hugging Face'
        f' Hub: {error}'
    ) from error


def upload(name: str, save: Callable[[str], pathlib.Path]) -> str:
  """Uploads a folder to a repository of the Hugging Face Hub.

  Args:
    name: 'owner/name'; made if there is none.
    save: writes the folder that is given.

  Returns:
    The repository's address.
  """
  api = _import_hub().HfApi()
  with tempfile.TemporaryDirectory() as parent:
    folder = save(os.path.join(parent, 'tokenizer'))
    url = api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder)
  return str(url)


def read(
    folder: pathlib.Path, mesh: jax.sharding.Mesh
) -> tuple[ml_collections.ConfigDict, dict[str, Any], Stored]:
  """Reads what `write` wrote, and holds it to its hashes.

  Args:
    folder: of the files.
    mesh: devices that get the variables, by the config's partitioning.rules.

  Returns:
    The config, the variables and what is known of them.

  Raises:
    ValueError: files that are missing or damaged, or do not belong together.
  """
  content = _read_json(folder / CONFIG)
  if content.get('format') != _FORMAT:
    raise ValueError(
        f'{folder / CONFIG} has the format {content.get("format")!r}; this'
        f' version reads {_FORMAT!r}.'
    )
  try:
    config = configuration.config_from_json(json.dumps(content['config']))
    stored = Stored(**{name: content[name] for name in Stored._fields})
    model = build_model(config)
    arrays = _place(folder, config, model, mesh, stored.decoder_only)
    spec = model.quantizer.spec()
    found = (
        _hash_model(config, stored.hashes, spec),
        # As it is there: later versions add fields to it.
        integrity.hash_json(content['config']),
    )
    named = stored.model_hash, content['config_hash']
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(
        f'{folder / CONFIG} is damaged: {type(error).__name__}: {error}.'
    ) from error
  convert.check_same_dialect(
      _read_json(folder / workdirs.QUANTIZER), spec
  )
  wanted = {x: y for x, y in stored.hashes.items() if x in arrays}
  # One by one: `hash_arrays` has the order of a tree.
  given = {x: integrity.hash_arrays({x: y})[x] for x, y in arrays.items()}
  if lines := integrity.compare(given, wanted):
    raise ValueError(
        '\n  '.join([f'{folder / WEIGHTS} is damaged (read -> saved):', *lines])
    )
  if found != named:
    raise ValueError(
        f'{folder / CONFIG} is damaged or was changed: the hashes of its model'
        f' and config are {found}, and it names {named}.'
    )
  return config, traverse_util.unflatten_dict(arrays, sep='/'), stored


def _place(folder, config, model, mesh, decoder_only) -> dict[str, jax.Array]:
  """Puts the variables on the devices, by path."""
  abstract = partitioning.place_abstract(
      variables.abstract_variables(model, config.data.image_size),
      mesh,
      config.partitioning.rules,
      config.partitioning.fsdp_min_size,
  )
  abstract = {
      path: x
      for path, x in traverse_util.flatten_dict(abstract, sep='/').items()
      if not (decoder_only and _encodes(path))
  }
  try:
    arrays = safetensors.numpy.load_file(folder / WEIGHTS)
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise ValueError(
        f'{folder / WEIGHTS} cannot be read: {error}. Copy the folder again.'
    ) from error
  if lines := integrity.compare(
      integrity.describe_arrays(arrays), integrity.describe_arrays(abstract)
  ):
    raise ValueError(
        '\n  '.join([
            f'{folder / WEIGHTS} is of another model than {CONFIG}'
            ' (weights -> config):',
            *lines,
        ])
    )
  return {
      path: jax.make_array_from_callback(
          x.shape, abstract[path].sharding, lambda index, x=x: x[index]
      )
      for path, x in arrays.items()
  }


def _hash_model(
    config: ml_collections.ConfigDict,
    hashes: Mapping[str, str],
    spec: Mapping[str, Any],
) -> str:
  return integrity.hash_json({
      'hashes': hashes, 'image_size': config.data.image_size, 'spec': spec
  })


def _encodes(path: str) -> bool:
  return path.split('/')[1] in _ENCODERS


def _without_folders(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns a config for others: of paths, which say much, the last part."""
  config = json.loads(configuration.config_to_json(config))
  flat = traverse_util.flatten_dict(config, keep_empty_nodes=True, sep='.')
  for name, value in flat.items():
    if isinstance(value, str) and name in configuration.PATHS:
      flat[name] = pathlib.PurePath(value).name
  return traverse_util.unflatten_dict(flat, sep='.')


def _without_places(value: Any) -> Any:
  """Returns an evaluation for others: no command, of paths the last part."""
  if isinstance(value, Mapping):
    return {
        name: _without_places(x)
        for name, x in value.items()
        if name != 'command'
    }
  if isinstance(value, list | tuple):
    return [_without_places(x) for x in value]
  if isinstance(value, str) and os.path.isabs(value):
    return pathlib.PurePath(value).name
  return value


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  content = workdirs.read_json(path)
  if content is None:
    raise ValueError(
        f'{path} is missing. A tokenizer is a folder that save_pretrained'
        ' wrote; use from_workdir for a run.'
    )
  return content


def _import_hub() -> Any:
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
        'The Hugging Face Hub needs huggingface_hub, which is not installed:'
        ' pip install huggingface_hub.'
    ) from error
  return huggingface_hub
