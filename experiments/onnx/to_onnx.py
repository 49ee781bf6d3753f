"""Converts a tokenizer to ONNX and compares ONNX Runtime with JAX.

  python experiments/onnx/to_onnx.py --workdir=runs/fsq_888 --output=onnx

Needs a separate environment, see README.md. The differences of tokens and
images are written to results.json.
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
# jax2onnx cannot convert `decode` with a symbolic batch dimension.
_BATCH_SIZE = 64
_VERSIONS = ('jax', 'jax2onnx', 'onnx', 'onnxruntime')
sys.path.insert(0, str(_ROOT))


def table(results: Mapping[str, Any]) -> str:
  """Returns a Markdown table of the results."""
  lines = [
      '| run | images | differing tokens | differing pixels | at most |',
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
  """Writes encode.onnx and decode.onnx with batch size `_BATCH_SIZE`.

  Args:
    tokenizer: a `Tokenizer`.
    folder: existing output folder.
  """
  import jax
  from jax.extend import core
  import jax2onnx

  from fsq_jax.models import fused_attention
  from fsq_jax.tokenizer import tokenizer as tokenizers

  model = tokenizer.model
  tokens = (*tokenizer.grid_size, *model.quantizer.index_shape)
  for name, method, shape, dtype in (
      (
          'encode', tokenizers.images_to_tokens,
          (*tokenizer.config.data.image_size, model.channels), np.uint8,
      ),
      ('decode', tokenizers.tokens_to_images, tokens, np.int32),
  ):
    x = jax.ShapeDtypeStruct((_BATCH_SIZE, *shape), dtype)
    # jax2onnx replaces functions of JAX while it traces, which breaks Flax's
    # scan over blocks: pass it a function that has been traced already.
    with fused_attention.unfused():
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
  """Counts differences between ONNX Runtime and JAX on held-out images."""
  import onnxruntime

  from fsq_jax import data

  config = tokenizer.config
  dataset = data.build_dataset(
      config.data, split='eval', seed=config.seed, process_index=0,
      process_count=1,
  )
  images = np.concatenate([x['image'][x['mask']] for x in dataset])
  images = images[: 2 ** (len(images).bit_length() - 1)]
  # Hides warnings about unused constants.
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
  """Converts, compares and writes results.json."""
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
