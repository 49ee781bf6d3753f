"""Exports a tokenizer as StableHLO functions that need only JAX.

encode, decode, and the conversions between codes and indices, for CPUs, NVIDIA
GPUs and TPUs, with a symbolic batch dimension. Weights are an argument, in one
file for all functions.
"""

from collections.abc import Mapping
import hashlib
import json
import os
import pathlib
from typing import Any

from flax import traverse_util
import jax
from jax import export
from jax import numpy as jnp
import ml_collections
import numpy as np
import safetensors.numpy

import fsq_jax
from fsq_jax.checkpoints import saved_model
from fsq_jax.runtime import processes
from fsq_jax.tokenizer import tokenizer as tokenizers
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import urls

FOLDER = 'export'
MANIFEST = 'manifest.json'
WEIGHTS = 'weights.safetensors'
PLATFORMS = ('cpu', 'cuda', 'tpu')
_FORMAT = 'fsq_jax export, version 1'
_METHODS = {
    'encode': tokenizers.images_to_tokens,
    'decode': tokenizers.tokens_to_images,
    'codes_to_indices': lambda model, x: model.quantizer.codes_to_indices(x),
    'indices_to_codes': lambda model, x: model.quantizer.indices_to_codes(x),
}
_UNCHECKED = (
    'Exported functions cannot raise errors. A token outside of 0 ...'
    ' codebook_size - 1, such as the -1 that encode returns for a NaN latent,'
    ' becomes NaN in indices_to_codes, and in decode an image that is black'
    ' where the NaN reaches: everywhere if the decoder sees the whole grid.'
    ' Other images of the batch are not affected.'
)
_EXAMPLE = """\
import jax
import numpy as np
import safetensors.numpy
from jax import export  # Needs the package flatbuffers.

weights = safetensors.numpy.load_file('{weights}')
weights = jax.device_put(weights)
with open('{name}.stablehlo', 'rb') as file:
  {name} = jax.jit(export.deserialize(bytearray(file.read())).call)
x = np.zeros({shape}, np.{dtype})
y = {name}(weights, x)
"""


def export_workdir(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    which: str = 'newest',
) -> pathlib.Path:
  """Exports a checkpoint of a run.

  Args:
    config: of the run.
    workdir: the run's folder, or a folder of `Tokenizer.save_pretrained`.
    folder: as in `write`; by default, `FOLDER` in the workdir.
    which: 'newest' checkpoint, 'best' (highest PSNR), or a step number.

  Returns:
    The folder.

  Raises:
    ValueError: a config of another model, no checkpoint, or a folder that is
      not empty.
  """
  folder = folder or workdirs.run_folder(workdir) / FOLDER
  with processes.fail_together():
    _check_new(folder)
  tokenizer = tokenizers.load_tokenizer(workdir, which)
  with processes.fail_together():
    saved_model.check_same_model(tokenizer.config, config)
    if jax.process_index() == 0:
      write(tokenizer, folder)
  return workdirs.run_folder(folder, '--export')


def write(
    tokenizer: tokenizers.Tokenizer, folder: str | os.PathLike[str]
) -> pathlib.Path:
  """Writes exported functions, weights and a manifest to a folder.

  Functions take the weights, path to array, and images of
  config.data.image_size, tokens or codes. Unlike `Tokenizer` they neither fit
  images nor check tokens. A tokenizer saved with decoder_only has no encode.

  manifest.json is written last; without it an export is incomplete. It holds
  the version of JAX (this or a newer version reads the functions), the
  convention, model hash, shapes, hashes of the files, and code that loads them.

  Args:
    tokenizer: the tokenizer to export.
    folder: a new or empty folder.

  Returns:
    Its absolute path.

  Raises:
    ValueError: the folder is not empty, or cannot be written.
  """
  _check_new(folder)
  folder = workdirs.create(folder, '--export', urls.STORES)
  programs = export_programs(tokenizer)
  weights = {
      path: np.asarray(x) for path, x in _flatten(tokenizer.variables).items()
  }
  metadata = {
      'model_hash': tokenizer.model_hash,
      'quantizer': tokenizer.spec,
      'codebook_size': tokenizer.model.quantizer.codebook_size,
      'image_size': list(tokenizer.config.data.image_size),
      'grid_size': list(tokenizer.grid_size),
  }
  files = {
      WEIGHTS: safetensors.numpy.save(
          weights, {name: json.dumps(value) for name, value in metadata.items()}
      )
  }
  files |= {
      f'{name}.stablehlo': bytes(program.serialize())
      for name, program in programs.items()
  }
  for name, content in files.items():
    workdirs.write_bytes(folder / name, content)
  functions = {
      name: _describe(name, program) for name, program in programs.items()
  }
  workdirs.write_json(
      folder / MANIFEST,
      {
          'format': _FORMAT,
          'fsq_jax': fsq_jax.__version__,
          'jax': jax.__version__,
          'calling_convention_version': (
              programs['decode'].calling_convention_version
          ),
          'platforms': list(PLATFORMS),
          'step': tokenizer.step,
          **metadata,
          'functions': functions,
          'out_of_range': _UNCHECKED,
          'sha256': {
              name: hashlib.sha256(content).hexdigest()
              for name, content in files.items()
          },
      },
  )
  return folder


def export_programs(
    tokenizer: tokenizers.Tokenizer,
) -> dict[str, export.Exported]:
  """Lowers the functions without running them.

  Args:
    tokenizer: on any devices; the exported functions are for one device.

  Returns:
    By name, functions of the weights, path to array, and of x with the symbolic
    batch dimension b.
  """
  model = tokenizer.model
  grid = tokenizer.grid_size
  tokens = ((*grid, *model.quantizer.index_shape), jnp.int32)
  image_shape = *tokenizer.config.data.image_size, model.channels
  inputs = {
      'encode': (image_shape, jnp.uint8),
      'decode': tokens,
      'codes_to_indices': ((*grid, model.quantizer.code_dim), jnp.float32),
      'indices_to_codes': tokens,
  }
  if tokenizer.decoder_only:
    del inputs['encode']
  weights = {
      path: jax.ShapeDtypeStruct(x.shape, x.dtype)
      for path, x in _flatten(tokenizer.variables).items()
  }
  programs = {}
  for name, (shape, dtype) in inputs.items():

    def program(weights, x, method=_METHODS[name]):
      variables = traverse_util.unflatten_dict(weights, sep='/')
      return model.apply(variables, x, method=method)

    batch = export.symbolic_shape('b')
    programs[name] = export.export(jax.jit(program), platforms=PLATFORMS)(
        weights, jax.ShapeDtypeStruct((*batch, *shape), dtype)
    )
  return programs


def _check_new(folder: str | os.PathLike[str]) -> None:
  folder = workdirs.run_folder(folder, '--export')
  if not workdirs.is_empty(folder):
    problem = 'is not empty'
    if not workdirs.is_file(folder / MANIFEST):
      problem += f' and has no {MANIFEST}, like an interrupted export'
    raise ValueError(
        f'{folder} {problem}; remove it or give a new folder with --export.'
    )


def _flatten(variables: Mapping[str, Any]) -> dict[str, jax.Array]:
  return traverse_util.flatten_dict(dict(variables), sep='/')


def _describe(name: str, program: export.Exported) -> dict[str, Any]:
  x = program.in_avals[-1]
  (y,) = program.out_avals
  example = _EXAMPLE.format(
      weights=WEIGHTS, name=name, shape=(2, *x.shape[1:]), dtype=x.dtype
  )
  return {
      'file': f'{name}.stablehlo',
      **{
          key: {'dtype': str(a.dtype), 'shape': ['b', *a.shape[1:]]}
          for key, a in (('x', x), ('y', y))
      },
      'example': example.splitlines(),
  }
