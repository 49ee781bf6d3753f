"""Generators of runs and of saved folders, with their tokenizers."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections

import fsq_jax
from fsq_jax.checkpoints import integrity
from fsq_jax.checkpoints import saved_model
from fsq_jax.configuration import loading as configuration
from fsq_jax.generators import builder
from fsq_jax.generators import model as models
from fsq_jax.generators import token_files
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import files as tokenizer_files
from fsq_jax.tokenizer import tokenizer as tokenizers
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import urls

TOKENIZER = 'tokenizer'
_FORMAT = 'fsq_jax generator, version 1'
_CARD = """\
---
library_name: fsq_jax
tags:
- image-generation
- finite-scalar-quantization
- jax
---
# {kind} generator on {rows} x {columns} tokens of {codebook_size:,} codes

{num_parameters:,} parameters, {classes}. {evaluation}

```python
from fsq_jax import generators

generator = generators.Generator.from_pretrained(FOLDER)
images = generator.sample(num_images=4, seed=0).images  # uint8
```

`tokenizer/` holds the tokenizer that made the tokens, a folder of
`Tokenizer.from_pretrained`.
"""


class SavedGenerator(NamedTuple):
  """A trained generator.

  Attributes:
    config: the whole config of the run.
    model: the model built from the config.
    variables: EMA of the parameters.
    tokens: format of the tokens.
    step: training steps taken.
    evaluation: content of the run's evaluation.json for that step, or None.
  """

  config: ml_collections.ConfigDict
  model: models.TokenModel
  variables: Mapping[str, Any]
  tokens: builder.TokenFormat
  step: int
  evaluation: Mapping[str, Any] | None


def restore(
    found: saved_model.Checkpoint, mesh: jax.sharding.Mesh
) -> SavedGenerator:
  """Restores the generator of a checkpoint.

  Args:
    found: from `saved_model.find_run`.
    mesh: from `partitioning.create_mesh`.

  Raises:
    ValueError: a corrupted checkpoint, or one of an autoencoder.
  """
  saved_model.check_same_kind(found, is_generator=True)
  tokens = builder.TokenFormat.from_json(found.record['tokens'])
  model = builder.build_model(found.config, tokens)
  fields = {
      'frozen_params': {},
      'model_state': {},
      'ema_params': _abstract_variables(model)['params'],
  }
  return SavedGenerator(
      config=found.config,
      model=model,
      variables=saved_model.restore_variables(found, fields, mesh),
      tokens=tokens,
      step=found.step,
      evaluation=saved_model.read_evaluation(found),
  )


def check_tokenizer(
    tokens: builder.TokenFormat, tokenizer: tokenizers.Tokenizer
) -> None:
  """Raises ValueError unless a tokenizer made the tokens of a generator."""
  token_files.check_same(
      tokens._asdict(),
      tokens._replace(
          quantizer=tokenizer.spec, model_hash=tokenizer.model_hash
      ),
  )


def hash_variables(variables: Mapping[str, Any]) -> str:
  """Returns a sha256 of the parameters of a generator; collective."""
  return integrity.hash_json(integrity.hash_arrays(dict(variables)))


def write(
    folder: pathlib.Path,
    saved: SavedGenerator,
    tokenizer: tokenizers.Tokenizer | None,
) -> pathlib.Path:
  """Writes a folder; see `generator.Generator.save_pretrained`."""
  if not workdirs.is_empty(folder):
    raise ValueError(f'{folder} is not empty; give a new folder.')
  folder = workdirs.create(folder, stores=urls.STORES)
  if tokenizer is not None:
    tokenizer.save_pretrained(folder / TOKENIZER)
  arrays = tokenizer_files.write_arrays(
      folder / tokenizer_files.WEIGHTS, saved.variables
  )
  evaluation = tokenizer_files.without_places(saved.evaluation)
  config = tokenizer_files.without_folders(saved.config)
  metrics = (saved.evaluation or {}).get('metrics', {})
  card = _CARD.format(
      kind=saved.config.model.kind.capitalize(),
      rows=saved.tokens.grid[0],
      columns=saved.tokens.grid[1],
      codebook_size=saved.tokens.codebook_size,
      num_parameters=sum(x.size for x in arrays.values()),
      classes=(
          f'{saved.model.num_classes} classes'
          if saved.model.num_classes
          else 'unconditional'
      ),
      evaluation=(
          f'{metrics["bits_per_token"]:.3f} bits per held-out token after'
          f' {saved.step:,} training steps.'
          if 'bits_per_token' in metrics
          else f'{saved.step:,} training steps.'
      ),
  )
  workdirs.write_bytes(folder / tokenizer_files.CARD, card.encode())
  content = {
      'format': _FORMAT,
      'fsq_jax': fsq_jax.__version__,
      'hashes': integrity.hash_arrays(dict(saved.variables)),
      'tokens': saved.tokens._asdict(),
      'step': saved.step,
      'evaluation': evaluation,
      'config': config,
  }
  # Last: a folder without it is incomplete.
  workdirs.write_json(
      folder / tokenizer_files.CONFIG,
      {**content, 'sha256': integrity.hash_json(content)},
  )
  return folder


def read(folder: pathlib.Path, mesh: jax.sharding.Mesh) -> SavedGenerator:
  """Reads a folder of `write` and checks it against its hashes.

  Args:
    folder: of the files.
    mesh: devices for the variables.

  Raises:
    ValueError: missing or corrupted files.
  """
  path = folder / tokenizer_files.CONFIG
  content = tokenizer_files.read_json(path)
  if content.get('format') != _FORMAT:
    raise ValueError(
        f'{path} has the format {content.get("format")!r}; this version reads'
        f' {_FORMAT!r}.'
    )
  sha256 = content.pop('sha256', None)
  if sha256 != integrity.hash_json(content):
    raise ValueError(
        f'{path} is corrupted or was changed: its hash differs from the one'
        ' stored in it.'
    )
  config = configuration.config_from_json(json.dumps(content['config']))
  tokens = builder.TokenFormat.from_json(content['tokens'])
  model = builder.build_model(config, tokens)
  variables = tokenizer_files.read_arrays(
      folder / tokenizer_files.WEIGHTS,
      partitioning.place_abstract(
          _abstract_variables(model), mesh, config.partitioning.rules,
          config.partitioning.fsdp_min_size,
      ),
      content['hashes'],
  )
  return SavedGenerator(
      config, model, variables, tokens, content['step'], content['evaluation']
  )


def _abstract_variables(model: models.TokenModel) -> dict[str, Any]:
  return jax.eval_shape(
      lambda: models.init_variables(model, jax.random.key(0))
  )
