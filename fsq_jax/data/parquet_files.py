"""Finds the Parquet files of a split in a folder or on the Hugging Face Hub."""

from collections.abc import Sequence
import glob
import os
import re
from typing import Any

from fsq_jax.data import listing

# 'owner/name', either with '@revision', a branch, tag or commit.
_REPOSITORY = re.compile(r'(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?')
# Sub-folders as of data/train-*.parquet and default/train/0000.parquet.
_DEPTH = 3


def find(name: str, data_dir: str, split: str) -> tuple[str, list[str]]:
  """Finds the files of a split, without a network.

  Args:
    name: data.name, a repository 'owner/name' or 'owner/name@revision' of data
      sets; '' takes the files of data_dir.
    data_dir: data.data_dir; '' is the cache of huggingface_hub.
    split: see `select`.

  Returns:
    The folder, absolute, and the names of the files relative to it.

  Raises:
    ValueError: no such folder or files, or files are missing.
  """
  if data_dir:
    root = os.path.abspath(os.path.expanduser(data_dir))
  else:
    hub, (repository, revision) = import_hub(), _parse(name)
    try:
      root = hub.snapshot_download(
          repository, repo_type='dataset', revision=revision,
          local_files_only=True,
      )
    # Errors of the hub and of the network have no common base class.
    except Exception as error:
      raise ValueError(
          f'{name!r} is not in the cache of huggingface_hub ({error}).'
          f' {_how_to_prepare(name)}'
      ) from error
  if not os.path.isdir(root):
    raise ValueError(
        f'data.data_dir is {root!r}, which is not a folder.'
        + (f' {_how_to_prepare(name)}' if name else '')
    )
  names = [
      path.replace(os.sep, '/')
      for depth in range(_DEPTH)
      for path in glob.glob('*/' * depth + '*.parquet', root_dir=root)
  ]
  try:
    return root, select(names, split)
  except ValueError as error:
    advice = f' {_how_to_prepare(name)}' if name else ''
    raise ValueError(f'{root}: {error}{advice}') from error


def prepare(name: str, data_dir: str, splits: Sequence[str]) -> str:
  """Downloads the files of splits of a repository; resumes a download.

  Args:
    name: as for `find`.
    data_dir: folder of the files; '' is the cache of huggingface_hub.
    splits: see `select`.

  Returns:
    The folder of the files.

  Raises:
    RuntimeError: huggingface_hub is not installed, or the download fails.
    ValueError: the repository has no files of a split.
  """
  repository, revision = _parse(name)
  try:
    hub = import_hub()
  except ValueError as error:
    raise RuntimeError(str(error)) from error
  try:
    names = hub.HfApi().list_repo_files(
        repository, repo_type='dataset', revision=revision
    )
  except Exception as error:
    raise RuntimeError(_describe_failure(name, error)) from error
  chosen = set()
  for split in splits:
    try:
      chosen.update(select(names, split))
    except ValueError as error:
      raise ValueError(
          f'{name} on the Hugging Face Hub: {error} Data sets without Parquet'
          ' files on their main branch may have them as'
          f' {repository}@refs/convert/parquet.'
      ) from error
  try:
    return hub.snapshot_download(
        repository, repo_type='dataset', revision=revision,
        allow_patterns=[glob.escape(x) for x in sorted(chosen)],
        local_dir=os.path.expanduser(data_dir) or None,
    )
  except Exception as error:
    raise RuntimeError(_describe_failure(name, error)) from error


def select(names: Sequence[str], split: str) -> list[str]:
  """Returns the names of the files of a split, in their order.

  Args:
    names: of files, relative to the root, '/'-separated.
    split: 'train' takes train.parquet, train-00000-of-00294.parquet (with or
      without a hash at the end), or the files of a folder train, in the root or
      in one sub-folder. A name with '*' or '{000..146}', or that ends with
      '.parquet', is a pattern relative to the root; '*' excludes '/'.

  Raises:
    ValueError: no files, files in several sub-folders, or files that
      `listing.check_parts` rejects.
  """
  names = sorted(
      x for x in names
      if x.endswith('.parquet') and not x.startswith('.') and '/.' not in x
  )
  if split.endswith('.parquet') or listing.is_pattern(split):
    return _select_pattern(names, split)
  word = re.escape(split)
  pattern = re.compile(
      rf'(?P<folder>(.*/)?)({word}([-_.]?\d+(-of-\d+)?)?'
      rf'(-[0-9a-f]{{16}})?|{word}/[^/]+)\.parquet'
  )
  matches = [x for x in map(pattern.fullmatch, names) if x]
  folders = sorted({x['folder'] for x in matches})
  if not matches:
    raise ValueError(
        f'there are no Parquet files of the split {split!r}; files:'
        f' {listing.shorten(names)}. Set data.train_split and data.eval_split'
        " to the beginning of names such as 'train' of"
        " train-00000-of-00294.parquet, or to a pattern such as 'train-*'."
    )
  if len(folders) > 1:
    raise ValueError(
        f'the sub-folders {listing.shorten(folders)} all have files of the'
        f' split {split!r}. Choose one by data.data_dir, or by a pattern such'
        f' as {folders[-1] + split + "*.parquet"!r}.'
    )
  files = [x[0] for x in matches]
  listing.check_parts(files, split)
  return files


def import_hub() -> Any:
  """Returns the module huggingface_hub, of the extra `hub`.

  Raises:
    ValueError: it is not installed.
  """
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
        'Parquet files of the Hugging Face Hub need huggingface_hub, which is'
        ' not installed: pip install huggingface_hub. Files that are on this'
        ' machine need data.data_dir alone.'
    ) from error
  return huggingface_hub


def _select_pattern(names: Sequence[str], split: str) -> list[str]:
  files, missing = [], []
  for pattern in listing.expand_ranges(split):
    found = re.compile(re.escape(pattern).replace(r'\*', '[^/]*'))
    matches = list(filter(found.fullmatch, names))
    files += matches
    missing += [] if matches else [pattern]
  if missing:
    raise ValueError(
        f'no Parquet files are named {listing.shorten(missing)}; files:'
        f' {listing.shorten(names)}.'
    )
  return list(dict.fromkeys(files))  # '{1..10}*' has 10 twice.


def _parse(name: str) -> tuple[str, str | None]:
  match = _REPOSITORY.fullmatch(name)
  if not match:
    raise ValueError(
        f"data.name is {name!r}; write 'owner/name' or 'owner/name@revision' of"
        ' a data set on the Hugging Face Hub, or set data.data_dir alone.'
    )
  return match['id'], match['revision']


def _how_to_prepare(name: str) -> str:
  return (
      f'Download {name!r} once, with network access, by `python launch.py'
      ' --config=... --mode=prepare` with the same config; it resumes.'
  )


def _describe_failure(name: str, error: Exception) -> str:
  return (
      f'Downloading {name!r} from the Hugging Face Hub failed:'
      f' {type(error).__name__}: {error}'
  )
