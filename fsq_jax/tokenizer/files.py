"""Tokenizers as folders: weights, config, convention, model card, hashes.

model.safetensors holds the variables by path, config.json the run's config and
the metadata of the weights, quantizer.json the convention of the tokens,
README.md a model card.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import os
import pathlib
import tempfile
from typing import Any, NamedTuple

from flax import traverse_util
import jax
from jax import numpy as jnp
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy

import fsq_jax
from fsq_jax.checkpoints import integrity
from fsq_jax.configuration import loading as config_loading
from fsq_jax.configuration import rules
from fsq_jax.configuration import shipped
from fsq_jax.data import pipelines
from fsq_jax.models import autoencoder
from fsq_jax.models import builder as model_builder
from fsq_jax.models import variables as variables_lib
from fsq_jax.quantizers import specs
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import model_card
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import urls

WEIGHTS = 'model.safetensors'
CONFIG = 'config.json'
CARD = 'README.md'
_FORMAT = 'fsq_jax tokenizer, version 1'
# Parts of the model that only encode.
ENCODERS = ('encoder', 'projector_in')


class Metadata(NamedTuple):
  """Metadata of a model's weights.

  Attributes:
    step: training steps taken; None if unknown.
    evaluation: content of the run's evaluation.json for that step, or None.
    hashes: hash of each variable of the whole model, by path
      (`integrity.hash_arrays`); None until it is computed.
    decoder_only: whether the encoder is missing.
  """

  step: int | None = None
  evaluation: Mapping[str, Any] | None = None
  hashes: Mapping[str, str] | None = None
  decoder_only: bool = False


class SavedModel(NamedTuple):
  """A trained model.

  Attributes:
    config: the whole config of the run.
    model: the autoencoder, see `build_model`.
    variables: params and the model's other collections.
    metadata: of the weights.
  """

  config: ml_collections.ConfigDict
  model: autoencoder.Autoencoder
  variables: Mapping[str, Any]
  metadata: Metadata = Metadata()

  @property
  def model_hash(self) -> str:
    """sha256 of the hashes of the weights, the image size and the spec."""
    return integrity.hash_json({
        'hashes': self.metadata.hashes,
        'image_size': self.config.data.image_size,
        'spec': self.model.quantizer.spec(),
    })

  def with_hashes(self) -> 'SavedModel':
    """Returns the model with the hashes of its variables."""
    if self.metadata.hashes is not None:
      return self
    hashes = integrity.hash_arrays(dict(self.variables))
    return self._replace(metadata=self.metadata._replace(hashes=hashes))

  def without_encoder(self) -> 'SavedModel':
    """Returns the parts that decode, with the hashes of the whole model."""
    saved = self.with_hashes()
    return saved._replace(
        variables=_without_encoder(saved.variables),
        metadata=saved.metadata._replace(decoder_only=True),
    )

  def at_size(self, image_size: tuple[int, int]) -> 'SavedModel':
    """Returns the model at another of its data.image_sizes.

    Args:
      image_size: (height, width) in pixels; the result's data.image_size.

    Raises:
      ValueError: a size that the model was not trained with.
    """
    sizes = pipelines.image_sizes(self.config.data)
    if image_size not in sizes:
      raise ValueError(
          f'The image size is {image_size}; this model was trained with'
          f' {", ".join(map(str, sizes))}. Other sizes need training with'
          ' data.image_sizes; images of any size are taken with'
          " fit='pad'."
      )
    config = self.config.copy_and_resolve_references()
    config.data.image_size = image_size
    evaluation = self.metadata.evaluation
    if evaluation is not None and image_size != self.config.data.image_size:
      name = pipelines.size_name(image_size)
      sized = evaluation.get('image_sizes', {}).get(name)
      evaluation = sized and {'step': evaluation['step'], **sized}
    return self._replace(
        config=config,
        model=build_model(config, jnp.dtype(self.model.encoder.dtype).name),
        metadata=self.metadata._replace(evaluation=evaluation),
    )


def build_model(
    config: ml_collections.ConfigDict, dtype: str | None = None
) -> autoencoder.Autoencoder:
  """Builds the autoencoder of a run's config.

  Args:
    config: the whole config.
    dtype: that the model computes in; by default the config's.

  Raises:
    ValueError: an unknown dtype.
  """
  model_config = config.model.copy_and_resolve_references()
  if dtype is not None:
    if dtype not in ('float32', 'bfloat16'):
      raise ValueError(
          f"dtype is {dtype!r}; allowed: 'float32', 'bfloat16' and None."
      )
    model_config.dtype = dtype
  return model_builder.build_autoencoder(
      model_config, config.data.image_size, config.data.channels
  )


def write(
    folder: str | os.PathLike[str], saved: SavedModel, *, decoder_only: bool
) -> pathlib.Path:
  """Writes a folder; see `tokenizer.Tokenizer.save_pretrained`."""
  if not workdirs.is_empty(workdirs.run_folder(folder, 'folder')):
    raise ValueError(f'{folder} is not empty; give a new folder.')
  folder = workdirs.create(folder, stores=urls.STORES)
  saved = saved.without_encoder() if decoder_only else saved.with_hashes()
  config, model, metadata = saved.config, saved.model, saved.metadata
  stored = {
      'hashes': metadata.hashes,
      'model_hash': saved.model_hash,
      'step': metadata.step,
      'evaluation': without_places(metadata.evaluation),
      'decoder_only': metadata.decoder_only,
  }
  spec = model.quantizer.spec()
  arrays = write_arrays(folder / WEIGHTS, saved.variables)
  workdirs.write_json(folder / workdirs.QUANTIZER, spec)
  card = model_card.write(
      config,
      {
          **stored,
          'spec': spec,
          'codebook_size': model.quantizer.codebook_size,
          'tokens_shape': (
              *model.encoder.grid_size, *model.quantizer.index_shape
          ),
          'num_parameters': sum(
              x.size for path, x in arrays.items() if path.startswith('params/')
          ),
      },
  )
  workdirs.write_bytes(folder / CARD, card.encode())
  saved_config = without_folders(config)
  # Last: a folder without it is no tokenizer.
  workdirs.write_json(
      folder / CONFIG,
      {
          'format': _FORMAT,
          'fsq_jax': fsq_jax.__version__,
          **stored,
          'config_hash': integrity.hash_json(saved_config),
          'config': saved_config,
      },
  )
  return folder


def read_description(
    folder: pathlib.Path,
) -> tuple[ml_collections.ConfigDict, Metadata]:
  """Reads the config and the metadata of a folder of `write`, but no weights.

  Raises:
    ValueError: a missing or corrupted file, or the folder of a run.
  """
  content = _read_content(folder)
  with _corruption_named(folder):
    return _parse_content(content)


def find(name: str | os.PathLike[str], *patterns: str) -> pathlib.Path:
  """Returns a folder, or downloads one from the Hugging Face Hub.

  Args:
    name: of a tokenizer that ships with the package (`shipped.find`), a folder,
      gs://BUCKET/X, or 'owner/name' of a repository.
    *patterns: of files to download beside those of a tokenizer.

  Raises:
    ValueError: no such folder or repository, or an ambiguous name.
  """
  if (folder := shipped.find(name)) is not None:
    return folder
  folder = workdirs.run_folder(name, 'name')
  if workdirs.is_folder(folder):
    return folder
  if not rules.is_hub_id(str(name)):
    raise ValueError(
        f'There is no folder {folder}; give a folder written by'
        " save_pretrained, 'owner/name' of a repository of the Hugging Face"
        ' Hub, or the name of a tokenizer that ships with fsq_jax:'
        f' {", ".join(shipped.NAMES)}.'
    )
  try:
    hub = _import_hub()
  except ValueError as error:
    raise ValueError(f'{name} is no local folder. {error}') from error
  files = [WEIGHTS, CONFIG, workdirs.QUANTIZER, CARD, *patterns]
  try:
    return pathlib.Path(hub.snapshot_download(str(name), allow_patterns=files))
  # Errors of the hub and of the network have no common base class.
  except Exception as error:
    raise ValueError(
        f'{name} is no local folder, and downloading it from the Hugging Face'
        f' Hub failed: {error}'
    ) from error


def upload(name: str, save: Callable[[str], pathlib.Path]) -> str:
  """Uploads a folder to a repository of the Hugging Face Hub.

  Args:
    name: 'owner/name'; created if it does not exist.
    save: writes the tokenizer to a given folder.

  Returns:
    The repository's URL.
  """
  api = _import_hub().HfApi()
  with tempfile.TemporaryDirectory() as parent:
    folder = save(os.path.join(parent, 'tokenizer'))
    url = api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder)
  return str(url)


def read(
    folder: pathlib.Path, mesh: jax.sharding.Mesh, dtype: str | None = None
) -> SavedModel:
  """Reads a folder of `write` and checks it against its hashes.

  Args:
    folder: of the files.
    mesh: devices for the variables, sharded by the config's
      partitioning.rules.
    dtype: as in `build_model`.

  Returns:
    The model.

  Raises:
    ValueError: missing or corrupted files, or files of different models.
  """
  content = _read_content(folder)
  with _corruption_named(folder):
    config, metadata = _parse_content(content)
    model = build_model(config, dtype)
    variables = read_arrays(
        folder / WEIGHTS,
        _abstract(config, model, mesh, metadata.decoder_only),
        metadata.hashes,
    )
    saved = SavedModel(config, model, variables, metadata)
    hashes = (
        saved.model_hash,
        # Of the config as it is stored: later versions add fields to it.
        integrity.hash_json(content['config']),
    )
    stored = content['model_hash'], content['config_hash']
  specs.check_same_spec(
      read_json(folder / workdirs.QUANTIZER), model.quantizer.spec()
  )
  if hashes != stored:
    raise ValueError(
        f'{folder / CONFIG} is corrupted or was changed: the hashes of its'
        f' model and config are {hashes}, those stored in it {stored}.'
    )
  return saved


def write_arrays(
    path: pathlib.Path, variables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Writes variables by path as safetensors, atomically; returns them."""
  flat = traverse_util.flatten_dict(dict(variables), sep='/')
  arrays = {name: np.asarray(x) for name, x in flat.items()}
  workdirs.write_bytes(path, safetensors.numpy.save(arrays))
  return arrays


def read_arrays(
    path: pathlib.Path, abstract: Any, hashes: Mapping[str, str]
) -> dict[str, Any]:
  """Reads variables that `write_arrays` wrote onto devices.

  Args:
    path: of the file.
    abstract: tree of shapes and dtypes with shardings.
    hashes: hash of each variable by path (`integrity.hash_arrays`).

  Returns:
    The tree of variables.

  Raises:
    ValueError: a corrupted file, or variables of another model.
  """
  abstract = traverse_util.flatten_dict(dict(abstract), sep='/')
  try:
    with workdirs.local_copy(path) as local:
      arrays = safetensors.numpy.load_file(local)
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise ValueError(
        f'{path} cannot be read: {error}. Copy the folder again.'
    ) from error
  if lines := integrity.compare(
      integrity.describe_arrays(arrays), integrity.describe_arrays(abstract)
  ):
    raise ValueError(
        '\n  '.join([
            f'{path} belongs to another model than {CONFIG}'
            ' (weights -> config):',
            *lines,
        ])
    )
  arrays = {
      name: jax.make_array_from_callback(
          x.shape, abstract[name].sharding, lambda index, x=x: x[index]
      )
      for name, x in arrays.items()
  }
  # One by one: `hash_arrays` has the order of a tree.
  given = {x: integrity.hash_arrays({x: y})[x] for x, y in arrays.items()}
  wanted = {x: y for x, y in hashes.items() if x in arrays}
  if lines := integrity.compare(given, wanted):
    raise ValueError(
        '\n  '.join([f'{path} is corrupted (read -> saved):', *lines])
    )
  return traverse_util.unflatten_dict(arrays, sep='/')


def _read_content(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the content of config.json, of the format of this version."""
  content = read_json(folder / CONFIG)
  if 'format' not in content and 'train' in content:  # The config itself.
    raise ValueError(
        f'{folder} is a run, not a saved tokenizer; load it with'
        f' Tokenizer.from_workdir({str(folder)!r}).'
    )
  if content.get('format') != _FORMAT:
    raise ValueError(
        f'{folder / CONFIG} has the format {content.get("format")!r}; this'
        f' version reads {_FORMAT!r}.'
    )
  return content


def _parse_content(
    content: Mapping[str, Any],
) -> tuple[ml_collections.ConfigDict, Metadata]:
  """Returns config and metadata of the content of config.json."""
  return (
      config_loading.config_from_json(json.dumps(content['config'])),
      Metadata(**{name: content[name] for name in Metadata._fields}),
  )


@contextlib.contextmanager
def _corruption_named(folder: pathlib.Path) -> Iterator[None]:
  """Context in which config.json lacks a value, or has one of a wrong type."""
  try:
    yield
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(
        f'{folder / CONFIG} is corrupted: {type(error).__name__}: {error}.'
    ) from error


def _abstract(config, model, mesh, decoder_only) -> dict[str, Any]:
  """Returns shapes and dtypes of the variables with shardings."""
  abstract = partitioning.place_abstract(
      variables_lib.abstract_variables(model, config.data.image_size),
      mesh,
      config.partitioning.rules,
      config.partitioning.fsdp_min_size,
  )
  return _without_encoder(abstract) if decoder_only else abstract


def _without_encoder(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the collections without the parts that only encode."""
  kept = {
      path: x
      for path, x in traverse_util.flatten_dict(dict(variables)).items()
      if path[1] not in ENCODERS
  }
  return traverse_util.unflatten_dict(kept)


def without_folders(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the config with paths, which are private, cut to their names."""
  known = config_loading.fields_of(config)
  paths = {name for name, field in known.items() if field.rule.is_path}
  config = json.loads(config_loading.config_to_json(config))
  flat = traverse_util.flatten_dict(config, keep_empty_nodes=True, sep='.')
  for name, value in flat.items():
    if isinstance(value, str) and name in paths:
      flat[name] = pathlib.PurePath(value).name
  return traverse_util.unflatten_dict(flat, sep='.')


def without_places(value: Any) -> Any:
  """Returns an evaluation without its command, paths cut to their names."""
  if isinstance(value, Mapping):
    return {
        name: without_places(x)
        for name, x in value.items()
        if name != 'command'
    }
  if isinstance(value, list | tuple):
    return [without_places(x) for x in value]
  if isinstance(value, str) and os.path.isabs(value):
    return pathlib.PurePath(value).name
  return value


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON object of a file that has to exist."""
  content = workdirs.read_json(path)
  if content is None:
    raise ValueError(
        f'{path} is missing. from_pretrained loads folders written by'
        ' save_pretrained; load a run with from_workdir.'
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
