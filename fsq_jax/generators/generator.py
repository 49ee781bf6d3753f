"""Generator: samples, completes and scores images with a trained model."""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from fsq_jax.checkpoints import saved_model
from fsq_jax.configuration import loading as configuration
from fsq_jax.generators import builder
from fsq_jax.generators import embeddings
from fsq_jax.generators import evaluation
from fsq_jax.generators import sampler as samplers
from fsq_jax.generators import saved_generator
from fsq_jax.generators import token_files
from fsq_jax.runtime import batching
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import files as tokenizer_files
from fsq_jax.tokenizer import tokenizer as tokenizers
from fsq_jax.workdir import files as workdirs


class Generated(NamedTuple):
  """Generated images.

  Attributes:
    images: [B, H, W, C] uint8, with the channels of the tokenizer's images;
      None without a tokenizer.
    tokens: [B, h, w] int32.
    labels: [B] int32, -1 for no class.
    log_probs: [B, h, w] float32 in nats, log p of each token when it was drawn;
      0 for given tokens.
  """

  images: np.ndarray | None
  tokens: np.ndarray
  labels: np.ndarray
  log_probs: np.ndarray


class Generator:
  """A trained generator with the tokenizer that decodes its tokens.

  Attributes:
    config: of the run that trained the model.
    model: the model of tokens.
    tokens: format of the tokens: grid, codebook, class names.
    tokenizer: decodes the tokens; None without.
    step: training steps taken.
  """

  def __init__(
      self,
      saved: saved_generator.SavedGenerator,
      tokenizer: tokenizers.Tokenizer | None,
      mesh: jax.sharding.Mesh,
      *,
      batch_size: int = 64,
  ):
    """Functions are compiled on first call.

    Args:
      saved: the model, with its variables on `mesh`.
      tokenizer: that made the tokens.
      mesh: from `partitioning.create_mesh`, of devices of this process.
      batch_size: largest number of images in a batch.

    Raises:
      ValueError: another tokenizer than the one that made the tokens.
    """
    if tokenizer is not None:
      saved_generator.check_tokenizer(saved.tokens, tokenizer)
    self.config, self.model, self.variables = saved[:3]
    self.tokens, self.step = saved.tokens, saved.step
    self.tokenizer = tokenizer
    self._saved = saved
    self._mesh = mesh
    self._batch_size = batch_size
    self._samplers: dict[builder.Sampling, samplers.Sampler] = {}
    self._bits = jax.jit(
        evaluation.build_bits(
            self.model, self.config.eval.num_draws, self.config.seed
        )
    )

  @classmethod
  def from_workdir(
      cls,
      workdir: str | os.PathLike[str],
      checkpoint: str = 'newest',
      *,
      tokenizer: str | os.PathLike[str] | None = None,
      mesh: jax.sharding.Mesh | None = None,
      batch_size: int = 64,
  ) -> 'Generator':
    """Loads the EMA parameters of a run and its tokenizer.

    Args:
      workdir: the run's folder.
      checkpoint: 'newest', 'best' (fewest held-out bits per token), or a step
        number.
      tokenizer: folder of the tokenizer, if it has moved since the training.
      mesh: see `__init__`; by default all devices of this process.
      batch_size: see `__init__`.

    Raises:
      ValueError: no such checkpoint or tokenizer, or another tokenizer.
    """
    found = saved_model.find_run(workdir, checkpoint)
    mesh = mesh or partitioning.create_local_mesh()
    saved = saved_generator.restore(found, mesh)
    config = saved.config.copy_and_resolve_references()
    if tokenizer is not None:
      config.tokens.tokenizer = os.fspath(tokenizer)
    tokenizer = token_files.load_tokenizer(config, batch_size)
    return cls(saved, tokenizer, mesh, batch_size=batch_size)

  @classmethod
  def from_pretrained(
      cls,
      name: str | os.PathLike[str],
      *,
      mesh: jax.sharding.Mesh | None = None,
      batch_size: int = 64,
  ) -> 'Generator':
    """Loads a folder written by `save_pretrained`.

    Args:
      name: a folder, or 'owner/name' of a repository of the Hugging Face Hub,
        which needs the extra `hub`.
      mesh: as in `from_workdir`.
      batch_size: see `__init__`.

    Raises:
      ValueError: no such folder, or corrupted files.
    """
    folder = tokenizer_files.find(name, f'{saved_generator.TOKENIZER}/*')
    mesh = mesh or partitioning.create_local_mesh()
    saved = saved_generator.read(folder, mesh)
    tokenizer = None
    if (folder / saved_generator.TOKENIZER).is_dir():
      tokenizer = tokenizers.Tokenizer.from_pretrained(
          folder / saved_generator.TOKENIZER, batch_size=batch_size
      )
    return cls(saved, tokenizer, mesh, batch_size=batch_size)

  def save_pretrained(self, folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes a folder that `from_pretrained` loads; returns its path.

    It holds model.safetensors, config.json with hashes, README.md (a model
    card), and the tokenizer as `tokenizer/`.

    Args:
      folder: a new or empty folder, or gs://BUCKET/X.

    Raises:
      ValueError: the folder is not empty, or cannot be written.
    """
    path = workdirs.run_folder(folder, 'folder')
    return saved_generator.write(path, self._saved, self.tokenizer)

  def push_to_hub(self, name: str) -> str:
    """Saves to a repository 'owner/name' of the Hugging Face Hub.

    Returns its URL.
    """
    return tokenizer_files.upload(name, self.save_pretrained)

  def sample(
      self,
      classes: Sequence[int] | None = None,
      num_images: int | None = None,
      *,
      seed: int = 0,
      **options: Any,
  ) -> Generated:
    """Samples images.

    Args:
      classes: label of each image, -1 for no class. With `num_images`, classes
        to balance the images over, in this order; None is all classes.
      num_images: number of images; by default one of each of `classes`.
      seed: random seed. Image i is the same for any number of images.
      **options: replace fields of the section sample of the config, such as
        num_steps=8, temperature=0.9 or guidance={'scale': 2.0}.

    Raises:
      ValueError: unknown classes or options.
    """
    if classes is None:
      classes = range(self.model.num_classes) or [embeddings.NO_LABEL]
    labels = np.asarray(classes)
    if labels.ndim != 1 or not labels.size:
      raise ValueError(
          f'classes is {classes!r}; give a sequence of one class or more.'
      )
    if num_images is not None:
      if not isinstance(num_images, int | np.integer) or num_images < 1:
        raise ValueError(
            f'num_images is {num_images!r}; give an integer >= 1.'
        )
      labels = np.resize(labels, num_images)
    samples = self._sampler(options)(self.variables, labels, seed)
    return self._finish(samples, labels)

  def inpaint(
      self,
      tokens: np.ndarray,
      known: np.ndarray,
      labels: np.ndarray | int | None = None,
      *,
      seed: int = 0,
      **options: Any,
  ) -> Generated:
    """Completes token grids: inpainting, outpainting, class-conditional edits.

    Args:
      tokens: [B, h, w] integers, as of `tokenizer.encode`; any value where they
        are not known.
      known: [h, w] or [B, h, w] bool, tokens that are kept as they are. For an
        autoregressive model they have to be the first ones in raster order.
      labels: [B] integers or one for all, -1 for no class; None for models
        without classes.
      seed: random seed.
      **options: as in `sample`.

    Raises:
      ValueError: other shapes, tokens or labels out of range, or known tokens
        that an autoregressive model cannot complete.
    """
    tokens = self._check_grids(tokens)
    num = len(tokens)
    known = np.asarray(known)
    if known.dtype != bool or known.shape[-2:] != self.model.grid:
      raise ValueError(
          f'known is {known.dtype}{list(known.shape)}; give bool'
          f' {list(self.model.grid)} or [B, ...] of it.'
      )
    known = np.broadcast_to(known, (num, *self.model.grid)).reshape(num, -1)
    given = known
    if self.model.architecture.causal:
      given = known.sum(axis=1)
      if np.any(known != (np.arange(known.shape[1]) < given[:, None])):
        raise ValueError(
            'An autoregressive model can complete only images whose first'
            ' tokens in raster order are known; use a masked model for other'
            ' masks.'
        )
    labels = self._to_labels(labels, num)
    samples = self._sampler(options)(
        self.variables, labels, seed, tokens=tokens.reshape(num, -1),
        given=given,
    )
    return self._finish(samples, labels)

  def nll(
      self,
      tokens: np.ndarray,
      labels: np.ndarray | int | None = None,
  ) -> np.ndarray:
    """Returns the negative log-likelihood of token grids, [B] nats per image.

    Exact for an autoregressive model; for a masked model the any-order bound,
    estimated from eval.num_draws masks, which depend on an image's position in
    the batch. Likelihoods under several labels are compared at one position.

    Args:
      tokens: [B, h, w] integers.
      labels: [B] integers or one for all, -1 for no class; None for models
        without classes.

    Raises:
      ValueError: other shapes, tokens or labels out of range.
    """
    tokens = self._check_grids(tokens)
    self.model.vocabulary.check(tokens)
    labels = self._to_labels(labels, len(tokens))
    embeddings.check_labels(labels, self.model.num_classes)
    batch = {
        'tokens': tokens.reshape(len(tokens), -1).astype(np.int32),
        'labels': labels.astype(np.int32),
        'examples': np.arange(len(tokens)),
    }
    batcher = batching.Batcher(self._mesh, self._batch_size)
    result = batcher.map(lambda x: self._bits(self.variables, x), batch)
    return result['bits'] * np.log(2)

  def _to_labels(
      self, labels: np.ndarray | int | None, num: int
  ) -> np.ndarray:
    if labels is None:
      if self.model.num_classes:
        raise ValueError(
            f'labels are missing; the model has {self.model.num_classes}'
            ' classes. Give the class of each image, or -1 for no class.'
        )
      labels = embeddings.NO_LABEL
    labels = np.asarray(labels)
    if labels.shape not in ((), (num,)):
      raise ValueError(
          f'labels have the shape {labels.shape}; give one label, or {num}, one'
          ' of each image.'
      )
    return np.broadcast_to(labels, num)

  def _check_grids(self, tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens)
    if (
        tokens.dtype.kind not in 'iu'
        or tokens.shape[1:] != self.model.grid
        or not tokens.size
    ):
      raise ValueError(
          f'tokens are {tokens.dtype}{list(tokens.shape)}; give integers'
          f' [B, {", ".join(map(str, self.model.grid))}], B at least 1.'
      )
    return tokens

  def _sampler(self, options: Mapping[str, Any]) -> samplers.Sampler:
    """Returns the sampler of the config with these options replaced."""
    config = self.config.copy_and_resolve_references()
    try:
      if unused := {'batch_size', 'classes', 'num_images'} & set(options):
        raise KeyError(f'{sorted(unused)} are arguments of other calls')
      config.sample.update(options)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise ValueError(
          f'The options {dict(options)} are not of the section sample of the'
          f' config: {error}; its fields are {sorted(config.sample)}.'
      ) from error
    configuration.check_config(config, mode='generate')
    sampling = builder.build_sampling(
        config.sample, config.model.kind, self.model.num_tokens
    )
    if sampling not in self._samplers:
      self._samplers[sampling] = samplers.Sampler(
          self.model, sampling, self._mesh, batch_size=self._batch_size
      )
    return self._samplers[sampling]

  def _finish(self, samples, labels) -> Generated:
    images = None
    if self.tokenizer is not None:
      images = evaluation.decode(
          self.tokenizer, samples.tokens, self.model.grid
      )
    grid = len(labels), *self.model.grid
    return Generated(
        images=images,
        tokens=samples.tokens.reshape(grid),
        labels=np.asarray(labels, np.int32),
        log_probs=samples.log_probs.reshape(grid),
    )
