"""Executes notebooks and stores their outputs, with small images.

  python experiments/notebooks/execute.py [NAME...] [--folder=FOLDER]

Without names all notebooks are executed, in the order in which one uses the run
of another, in FOLDER, a new temporary folder by default.
"""

import argparse
import base64
import io
import os
import pathlib
import sys
import tempfile

import nbclient
import nbformat
from PIL import Image

_HERE = pathlib.Path(__file__).resolve().parent
_NAMES = (
    'fsq_in_five_minutes', 'train_a_tokenizer', 'tokenize_and_generate_inputs',
    'generate_digits',
)  # fmt: skip
_NUM_COLORS = 128


def execute(notebook: nbformat.NotebookNode, folder: pathlib.Path) -> None:
  """Executes a notebook in a folder, with this checkout on the path."""
  client = nbclient.NotebookClient(
      notebook,
      timeout=None,
      coalesce_streams=True,
      resources={'metadata': {'path': str(folder)}},
  )
  paths = [str(_HERE.parents[1]), os.environ.get('PYTHONPATH', '')]
  path = os.pathsep.join(filter(None, paths))
  client.execute(env=os.environ | {'PYTHONPATH': path})


def compact(notebook: nbformat.NotebookNode) -> None:
  """Reduces outputs to text and palette images; drops logs and versions."""
  notebook.metadata = {
      'kernelspec': {
          'display_name': 'Python 3', 'language': 'python', 'name': 'python3'
      },
      'language_info': {'name': 'python'},
  }
  for cell in notebook.cells:
    cell.metadata.pop('execution', None)
    if cell.cell_type != 'code':
      continue
    cell.outputs = [x for x in cell.outputs if x.get('name') != 'stderr']
    for output in cell.outputs:
      if 'image/png' in output.get('data', ()):
        output.data = {'image/png': _compress(output.data['image/png'])}
        output.metadata = {}


def _compress(png: str) -> str:
  """Returns a base64 PNG with fewer colours."""
  image = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
  file = io.BytesIO()
  image.quantize(_NUM_COLORS).save(file, 'PNG', optimize=True)
  return base64.b64encode(file.getvalue()).decode()


def main() -> None:
  """Executes the notebooks given on the command line."""
  parser = argparse.ArgumentParser(
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('names', nargs='*', metavar='NAME')
  parser.add_argument('--folder', type=pathlib.Path, help='folder of the runs')
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    folder = arguments.folder or pathlib.Path(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or _NAMES:
      path = _HERE / f'{name}.ipynb'
      notebook = nbformat.read(path, as_version=4)
      execute(notebook, folder)
      compact(notebook)
      nbformat.write(notebook, path)
      sys.stderr.write(f'{name}: {path.stat().st_size / 1e3:.0f} kB\n')


if __name__ == '__main__':
  main()
