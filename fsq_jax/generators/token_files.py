"""The token files of a generator: found, or made by its tokenizer."""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from fsq_jax.configuration import errors
from fsq_jax.generators import builder
from fsq_jax.runtime import processes
from fsq_jax.tokenizer import tokenizer as tokenizers
from fsq_jax.tokens import source as sources
from fsq_jax.tokens import tokenization
from fsq_jax.workdir import files as workdirs

_SPLITS = ('train', 'eval')


class TokenFiles(NamedTuple):
  """Token files and the tokenizer that made them.

  Attributes:
    train: tokens of the training images.
    eval: tokens of the held-out images.
    format: token format of both splits.
    tokenizer: decodes them; None without tokens.tokenizer.
  """

  train: sources.TokenSource
  eval: sources.TokenSource
  format: builder.TokenFormat
  tokenizer: tokenizers.Tokenizer | None

  def describe(self) -> dict[str, Any]:
    """Returns folder, number of images and hash of both, as JSON values."""
    return {
        split: {
            'folder': str(source.folder),
            'num_images': len(source),
            'sha256': source.manifest.shards_sha256,
        }
        for split, source in (('train', self.train), ('eval', self.eval))
    }


class TokenArrays(NamedTuple):
  """Tokens of several images on the host.

  Attributes:
    tokens: [n, N] int32.
    labels: [n] int32, -1 for no class.
  """

  tokens: np.ndarray
  labels: np.ndarray


def open_files(
    config: ml_collections.ConfigDict,
    check: Callable[[builder.TokenFormat], Any] = lambda tokens: None,
) -> TokenFiles:
  """Opens the token files of a config; makes those that are missing.

  Args:
    config: the whole config of a generator; paths are absolute.
    check: called with the format that the tokenizer gives, before files are
      made, which may take hours; its class names are unknown yet.

  Raises:
    ValueError: there is no such tokenizer, files are corrupted, of another
      tokenizer, or of different formats, or networks of metrics cannot take
      the tokenizer's images.
    Interrupted: by a signal while files are made.
  """
  options = config.tokens
  tokenizer = load_tokenizer(config)
  if tokenizer is not None:
    check_networks(config.eval.networks, tokenizer.model.channels)
    check(
        builder.TokenFormat(
            quantizer=tokenizer.spec,
            codebook_size=tokenizer.model.quantizer.codebook_size,
            grid=tokenizer.grid_size,
            label_names=('unknown',),
            model_hash=tokenizer.model_hash,
        )
    )
  found, formats = {}, {}
  for split in _SPLITS:
    with errors.about(f'tokens.{split}'):
      folder = options[split] or _make(options, tokenizer, split)
      with processes.fail_together():
        found[split] = sources.TokenSource(folder)
        if tokenizer is not None:
          _check_tokenizer(found[split], tokenizer)
        formats[split] = builder.TokenFormat.from_manifest(
            found[split].manifest
        )
  if lines := _differences(*formats.values()):
    raise ValueError(
        '\n  '.join([
            'The token files tokens.train and tokens.eval are of different'
            ' tokens (train -> eval); use one tokenizer for both, and images'
            ' with the same classes:',
            *lines,
        ])
    )
  if tokenizer is not None:  # The encoder can be as large as the generator.
    tokenizer = tokenizer.without_encoder()
  return TokenFiles(**found, format=formats['train'], tokenizer=tokenizer)


def load_tokenizer(
    config: ml_collections.ConfigDict, batch_size: int | None = None
) -> tokenizers.Tokenizer | None:
  """Loads the tokenizer of a generator's config; None if it has none.

  Args:
    config: the whole config.
    batch_size: of the tokenizer; by default tokens.eval_batch_size.
  """
  options = config.tokens
  check_folder(config)
  if not options.tokenizer:
    return None
  with errors.about('tokens.tokenizer'):
    return tokenizers.load_tokenizer(
        options.tokenizer,
        options.checkpoint,
        batch_size or options.eval_batch_size,
    )


def check_folder(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError if tokens.tokenizer is set and is not a folder."""
  path = config.tokens.tokenizer
  if path and not workdirs.is_folder(
      workdirs.run_folder(path, 'tokens.tokenizer')
  ):
    raise ValueError(
        f'tokens.tokenizer: {path} is not a folder. Train the tokenizer first'
        " (the config file's header has the command), or set"
        ' --config.tokens.tokenizer to the workdir of its run.'
    )


def check_networks(networks: Mapping[str, str], channels: int) -> None:
  """Raises ValueError for networks of metrics unless images are RGB.

  Args:
    networks: the `eval.networks` section: paths by name, '' for none.
    channels: of the tokenizer's images.
  """
  chosen = [name for name, path in networks.items() if path]
  if chosen and channels != 3:
    raise ValueError(
        f'eval.networks has {", ".join(chosen)}, which take RGB images, and the'
        f' images of tokens.tokenizer have {channels} channels; set'
        f" --config.eval.networks.{chosen[0]}=''."
    )


def _check_tokenizer(
    source: sources.TokenSource, tokenizer: tokenizers.Tokenizer
) -> None:
  try:
    source.check_decodable(tokenizer.spec, tokenizer.model_hash)
  except ValueError as error:
    raise ValueError(
        f'{error}\nDelete the folder to have it made again, or set'
        ' --config.tokens.checkpoint to the checkpoint that made it.'
    ) from error


def _make(
    options: ml_collections.ConfigDict,
    tokenizer: tokenizers.Tokenizer,
    split: str,
) -> pathlib.Path:
  """Returns the folder of a split of the tokenizer's images, tokenized."""
  config = tokenizer.config.copy_and_resolve_references()
  config.tokenize.split = split
  config.tokenize.fit = 'crop'
  config.tokenize.views = options.train_views if split == 'train' else 1
  folder = tokenization.default_folder(config, options.tokenizer)
  # The same decision in all processes, which tokenize together.
  if processes.is_any(not tokenization.is_complete(folder)):
    try:
      tokenization.tokenize_workdir(
          config, options.tokenizer, which=options.checkpoint, folder=folder
      )
    except ValueError as error:
      raise ValueError(
          f"{error}\nThe tokenizer's own images are to be tokenized; for others"
          f' set --config.tokens.{split} to token files of --mode=tokenize. A'
          ' folder of save_pretrained does not say where its images are.'
      ) from error
  return folder


def read(
    source: sources.TokenSource, indices: Sequence[int]
) -> TokenArrays:
  """Reads the tokens of some images."""
  examples = [source[int(i)] for i in indices]
  grid = source.manifest.grid
  return TokenArrays(
      np.array([x.tokens for x in examples], np.int32).reshape(
          len(examples), grid[0] * grid[1]
      ),
      np.array([x.label for x in examples], np.int32),
  )


def select(num_images: int, limit: int) -> np.ndarray:
  """Returns at most `limit` image numbers at regular intervals; 0 is all."""
  if not limit or limit >= num_images:
    return np.arange(num_images)
  return np.linspace(0, num_images, limit, endpoint=False).astype(np.int64)


def check_same(
    saved: Mapping[str, Any], current: builder.TokenFormat
) -> None:
  """Raises ValueError if a generator was trained on tokens of another format.

  Args:
    saved: 'tokens' of the record of a checkpoint.
    current: format of the tokens to be used.
  """
  if lines := _differences(builder.TokenFormat.from_json(saved), current):
    raise ValueError(
        '\n  '.join([
            'The generator was trained on other tokens (trained on -> given);'
            ' give the tokenizer and checkpoint that made its tokens'
            ' (tokens.tokenizer, tokens.checkpoint):',
            *lines,
        ])
    )


def _differences(
    first: builder.TokenFormat, second: builder.TokenFormat
) -> list[str]:
  pairs = zip(first._fields, first, second, strict=True)
  return [f'{name}: {a!r} -> {b!r}' for name, a, b in pairs if a != b]
