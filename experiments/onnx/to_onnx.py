"""Converts a run's tokenizer to ONNX and compares what ONNX Runtime gives.

  python experiments/onnx/to_onnx.py --workdir=runs/fsq_888 --output=onnx

It needs an environment of its own, which README.md says how to install.
results.json keeps what became of the tokens and images; README.md shows it.
"""

import argparse
from collections.abc import Mapping
import importlib.metadata
import json
import pathlib
import sys
from typing import Any

import numpy as np

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_RESULTS = pathlib.Path(__file__).with_name('results.json')
# Images that a program takes; jax2onnx has no decode for any number of them.
_BATCH_SIZE = 64
_VERSIONS = ('jax', 'jax2onnx', 'onnx', 'onnxruntime')
sys.path.insert(0, str(_ROOT))


def table(results: Mapping[str, Any]) -> str:
  """Returns the results as Markdown."""
  lines = [
      '| run | images | tokens that differ | pixels that differ | by at most |',
      '|---|---|---|---|---|',
  ]
  for name, row in results['runs'].items():
    lines.append(
        f'| {name} | {row["num_images"]} | {row["tokens_differing"]:,} of'
        f' {row["num_tokens"]:,} | {row["pixels_differing"]:,} of'
        f' {row["num_pixels"]:,} | {row["largest_change"]} |'
    )
  return '\n'.join(lines)


def convert(tokenizer: Any, folder: pathlib.Path) -> None:
  """Writes encode.onnx and decode.onnx, for `_BATCH_SIZE` images.

  Args:
    tokenizer: a `Tokenizer`.
    folder: an existing one.
  """
  import jax
  from jax.extend import core
  import jax2onnx

  from fsq_jax.tokenizer import tokenizer as tokenizers

  model = tokenizer.model
  tokens = (*tokenizer.grid_size, *model.quantizer.index_shape)
  for name, method, shape, dtype in (
      (
          'encode', tokenizers.images_to_tokens,
          (*tokenizer.config.data.image_size, 3), np.uint8,
      ),
      ('decode', tokenizers.tokens_to_images, tokens, np.int32),
  ):
    x = jax.ShapeDtypeStruct((_BATCH_SIZE, *shape), dtype)
    # jax2onnx traces with functions of its own in the place of JAX's, which
    # Flax's scan over blocks does not bear: it gets a program that is traced.
    program = core.jaxpr_as_fun(
        jax.make_jaxpr(
            lambda x, method=method: model.apply(
                tokenizer.variables, x, method=method
            )
        )(x)
    )
    jax2onnx.to_onnx(
        lambda x, program=program: program(x)[0], [x], return_mode='file',
        output_path=folder / f'{name}.onnx', input_names=['x'],
    )


def compare(tokenizer: Any, folder: pathlib.Path) -> dict[str, int]:
  """Runs both on images of the run's evaluation; counts what differs."""
  import onnxruntime

  from fsq_jax import data

  config = tokenizer.config
  dataset = data.build_dataset(
      config.data, split='eval', seed=config.seed, process_index=0,
      process_count=1,
  )
  images = np.concatenate([x['image'][x['mask']] for x in dataset])
  images = images[: 2 ** (len(images).bit_length() - 1)]
  # Warnings of constants that jax2onnx leaves unused.
  onnxruntime.set_default_logger_severity(3)

  def run(name: str, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / f'{name}.onnx')
    parts = np.split(x, len(x) // _BATCH_SIZE)
    return np.concatenate([session.run(None, {'x': y})[0] for y in parts])

  tokens = tokenizer.encode(images)
  changes = np.abs(run('decode', tokens).astype(int) - tokenizer.decode(tokens))
  return {
      'num_images': len(images),
      'num_tokens': tokens.size,
      'tokens_differing': int(np.sum(run('encode', images) != tokens)),
      'num_pixels': changes.size,
      'pixels_differing': int(np.sum(changes > 0)),
      'largest_change': int(np.max(changes)),
  }


def main() -> None:
  """Converts, measures, and writes results.json."""
  from fsq_jax.tokenizer import Tokenizer

  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--output', required=True)
  args = parser.parse_args()
  folder = pathlib.Path(args.output)
  folder.mkdir(parents=True)
  tokenizer = Tokenizer.from_workdir(args.workdir)
  convert(tokenizer, folder)
  results = {'runs': {}}
  if _RESULTS.exists():
    results = json.loads(_RESULTS.read_text())
  results['versions'] = {x: importlib.metadata.version(x) for x in _VERSIONS}
  name = pathlib.Path(args.workdir).name
  results['runs'][name] = compare(tokenizer, folder)
  _RESULTS.write_text(json.dumps(results, indent=2) + '\n')
  sys.stdout.write(f'{table(results)}\n')


if __name__ == '__main__':
  main()
