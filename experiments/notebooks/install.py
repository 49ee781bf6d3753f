"""Installs this checkout for a notebook; JAX and its plugins stay as they are.

  python experiments/notebooks/install.py

An editable install: a process that runs already has to add the checkout to
`sys.path`.
"""

import importlib.metadata
import pathlib
import subprocess
import sys
import tempfile

_CHECKOUT = pathlib.Path(__file__).resolve().parents[2]


def main() -> None:
  """Runs pip with the installed versions of JAX as constraints."""
  versions = {
      x.metadata['Name']: x.version
      for x in importlib.metadata.distributions()
      if (x.metadata['Name'] or '').startswith('jax')
  }
  with tempfile.TemporaryDirectory() as folder:
    constraints = pathlib.Path(folder, 'constraints.txt')
    constraints.write_text(
        ''.join(f'{name}=={versions[name]}\n' for name in sorted(versions))
    )
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet']
    subprocess.run([*pip, '-c', constraints, '-e', _CHECKOUT], check=True)


if __name__ == '__main__':
  main()
