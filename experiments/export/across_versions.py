r"""Exports a run with several versions of JAX and loads each export with each.

  python experiments/export/across_versions.py --workdir=runs/fsq_888 \
      --python=OLD/bin/python --python=NEW/bin/python

The environments hold this package's dependencies. The differences of tokens and
images are written to results.json.
"""

import argparse
from collections.abc import Mapping
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_RESULTS = pathlib.Path(__file__).with_name('results.json')
# Exports the run in argv[1] to argv[2], and saves tokens and reconstructions of
# its evaluation images.
_WRITE = """
import sys
import numpy as np
from fsq_jax import data
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.tokenizer import export

workdir, folder = sys.argv[1:]
tokenizer = Tokenizer.from_workdir(workdir, batch_size=10**6)
config = tokenizer.config
dataset = data.build_dataset(
    config.data, split='eval', seed=config.seed, process_index=0,
    process_count=1,
)
batches = list(dataset)
images = np.concatenate(
    [batch['image'][batch['mask']] for batch in batches]
)
# A power of two: one batch of the tokenizer without padding.
images = images[: 2 ** (len(images).bit_length() - 1)]
tokens = tokenizer.encode(images)
export.write(tokenizer, folder)
np.savez(
    f'{folder}.npz', images=images, tokens=tokens,
    reconstructions=tokenizer.decode(tokens),
)
"""
# Runs the export without this package and prints the differences.
_READ = """
import json, sys
sys.modules['fsq_jax'] = None
import jax
import numpy as np
import safetensors.numpy
from jax import export

folder = sys.argv[1]
weights = safetensors.numpy.load_file(f'{folder}/weights.safetensors')
expected = np.load(f'{folder}.npz')
result = {'reader': jax.__version__}


def run(name, x):
  with open(f'{folder}/{name}.stablehlo', 'rb') as file:
    program = export.deserialize(bytearray(file.read()))
  return np.asarray(program.call(weights, x))


try:
  tokens = run('encode', expected['images'])
  images = run('decode', expected['tokens'])
except Exception as error:
  result['refused'] = f'{type(error).__name__}: {error}'[:500]
else:
  changes = np.abs(images.astype(int) - expected['reconstructions'])
  result |= {
      'num_tokens': tokens.size,
      'num_pixels': images.size,
      'tokens_differing': int(np.sum(tokens != expected['tokens'])),
      'pixels_differing': int(np.sum(changes > 0)),
      'largest_change': int(np.max(changes)),
  }
print(json.dumps(result))
"""


def table(results: Mapping[str, Any]) -> str:
  """Returns a Markdown table of the results."""
  lines = [
      '| exported with | loaded with | differing tokens | differing pixels |',
      '|---|---|---|---|',
  ]
  for row in results['rows']:
    cells = ['fails to load', 'fails to load']
    if 'refused' not in row:
      cells = [
          f'{row["tokens_differing"]:,} of {row["num_tokens"]:,}',
          f'{row["pixels_differing"]:,} of {row["num_pixels"]:,}, by at most'
          f' {row["largest_change"]}',
      ]
    cells = [f'JAX {row["writer"]}', f'JAX {row["reader"]}', *cells]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def _run(python: str, script: str, *args: str) -> str:
  return subprocess.run(
      [python, '-c', script, *args], cwd=_ROOT, check=True,
      env=os.environ | {'PYTHONPATH': str(_ROOT)}, stdout=subprocess.PIPE,
      text=True,
  ).stdout


def main() -> None:
  """Exports, compares and writes results.json."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--python', action='append', required=True)
  args = parser.parse_args()
  workdir = str(pathlib.Path(args.workdir).absolute())
  rows = []
  with tempfile.TemporaryDirectory() as parent:
    for i, writer in enumerate(args.python):
      folder = pathlib.Path(parent, str(i))
      _run(writer, _WRITE, workdir, str(folder))
      manifest = json.loads((folder / 'manifest.json').read_text())
      rows += [
          {'writer': manifest['jax'], **json.loads(_run(x, _READ, str(folder)))}
          for x in args.python
      ]
    sizes = {x.name: x.stat().st_size for x in sorted(folder.iterdir())}
  results = {
      'config': pathlib.Path(workdir).name,
      'platform': platform.platform(),
      'bytes': sizes,
      'rows': rows,
  }
  _RESULTS.write_text(json.dumps(results, indent=2) + '\n')
  sys.stdout.write(f'{table(results)}\n')


if __name__ == '__main__':
  main()
