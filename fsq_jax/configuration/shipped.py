"""Tokenizers that ship with the package, found by name without a network."""

import os
import pathlib

# A folder of `Tokenizer.save_pretrained` for each name.
FOLDERS = pathlib.Path(__file__).parents[1] / 'tokenizer' / 'pretrained'
NAMES = ('photos',)
# The tokenizer of commands that name no run.
DEFAULT = 'photos'


def find(name: str | os.PathLike[str]) -> pathlib.Path | None:
  """Returns the folder of a shipped tokenizer; None for a path.

  Args:
    name: 'photos', without a separator; './photos' and any `pathlib.Path` are
      paths.

  Raises:
    ValueError: the current folder has a run or a saved tokenizer of that name,
      or the files are missing.
  """
  if not isinstance(name, str) or name not in NAMES:
    return None
  folder, local = folder_of(name), pathlib.Path(name).absolute()
  if (local / 'config.json').exists():
    raise ValueError(
        f'{name!r} is ambiguous: it is a tokenizer that ships with fsq_jax, and'
        f' {local} is another one. Give ./{name} for the folder, or {folder}'
        ' for the shipped tokenizer.'
    )
  return folder


def explain_workdir(path: str | os.PathLike[str]) -> str:
  """Returns advice on a name given in place of the folder of a run, or ''."""
  if not isinstance(path, str) or path not in NAMES:
    return ''
  return (
      f' {path!r} is the name of a tokenizer that ships with fsq_jax: give its'
      f' folder, {folder_of(path)}; --mode=reconstruct uses {DEFAULT!r} if'
      ' --workdir is left out.'
  )


def folder_of(name: str) -> pathlib.Path:
  """Returns the folder of a name of `NAMES`.

  Raises:
    ValueError: the files are missing.
  """
  folder = FOLDERS / name
  if not (folder / 'config.json').is_file():
    raise ValueError(
        f'{folder} has no config.json: fsq_jax was installed without its'
        ' package data; install it again.'
    )
  return folder
