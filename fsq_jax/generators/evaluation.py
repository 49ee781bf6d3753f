"""Evaluation of a generator: held-out NLL, baselines, and samples."""

from collections.abc import Callable, Iterator, Mapping
import functools
import pathlib
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import ml_collections
import numpy as np

from fsq_jax.data import builder as data_builder
from fsq_jax.evaluation import sample_files
from fsq_jax.evaluation import sample_metrics
from fsq_jax.generators import baselines as baselines_lib
from fsq_jax.generators import builder
from fsq_jax.generators import embeddings
from fsq_jax.generators import likelihood
from fsq_jax.generators import model as models
from fsq_jax.generators import sampler as samplers
from fsq_jax.generators import saved_generator
from fsq_jax.generators import token_files
from fsq_jax.report import grid as grid_lib
from fsq_jax.runtime import batching
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import tokenizer as tokenizers
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import provenance

# Training images at most for the baselines, for counting copies, and for the
# principal components of pixels and nearest neighbours.
_MAX_BASELINE_IMAGES = 50_000
_MAX_TRAIN_IMAGES = 10_000
# Classes at most in the contact sheet, examples and completions of inpainting,
# and samples that are shown with their nearest training image.
_MAX_CLASSES = 20
_NUM_INPAINTED = 6
_NUM_COMPLETIONS = 3
_NUM_NEAREST = 8

DEFINITIONS = {
    'bits_per_image': (
        'mean over held-out images of -log2 p(tokens | class), without label'
        ' smoothing; exact for autoregressive models, for masked models the'
        ' any-order bound: the mean over random orders, estimated from'
        ' num_draws masks per image'
    ),
    'bits_per_token': 'bits_per_image / tokens per image',
    'train_bits_per_token': (
        'bits_per_token of as many training images, without dropout'
    ),
    'generalization_gap': 'bits_per_token - train_bits_per_token',
    'compression_bits_per_token': (
        'compression cost of the FSQ paper (arXiv 2309.15505): code length in'
        ' compression_steps groups of tokens in Halton order, per token'
    ),
    'copied_token_grids': (
        'samples whose tokens equal those of a training image, among'
        ' num_train_images_compared'
    ),
}
_SHEETS = {
    'samples': '', 'inpainting': '_inpainting', 'nearest': '_nearest',
}  # fmt: skip


class Evaluation(NamedTuple):
  """Results of an evaluation.

  Attributes:
    metrics: by name.
    baselines: held-out bits per token of count-based models.
    protocol: JSON values.
    sheets: pictures [h, w, 3] uint8, by name, see `_SHEETS`.
  """

  metrics: dict[str, float]
  baselines: dict[str, float]
  protocol: dict[str, Any]
  sheets: Mapping[str, np.ndarray]

  def scalars(self) -> dict[str, float]:
    """Returns the numbers of a row of metrics.jsonl."""
    return self.metrics

  def lines(self) -> list[str]:
    """Returns a line per number."""
    return [
        *(f'{name}: {value:.6g}' for name, value in self.metrics.items()),
        *(
            f'baseline {name}: {value:.6g} bits per token'
            for name, value in self.baselines.items()
        ),
    ]

  def summary(self) -> str:
    """Returns the most important numbers in one line."""
    metrics = self.metrics
    best = min(self.baselines, key=self.baselines.get)
    text = (
        f'{metrics["bits_per_token"]:.3f} bits per token'
        f' ({metrics["bits_per_image"]:.1f} per image), training images'
        f' {metrics["train_bits_per_token"]:.3f}; {best.replace("_", " ")}'
        f' {self.baselines[best]:.3f}'
    )
    if 'fd_pixel_pca' in metrics:
      text += f'; samples: FD (pixel PCA) {metrics["fd_pixel_pca"]:.3g}'
    if 'nearest_neighbour_accuracy' in metrics:
      text += f', class accuracy {metrics["nearest_neighbour_accuracy"]:.1%}'
    return text

  def write(
      self, folder: pathlib.Path, step: int, label: str = ''
  ) -> pathlib.Path:
    """Writes evaluation.json and the pictures of a step.

    Args:
      folder: the run's folder.
      step: of the checkpoint.
      label: part of the file names, for another checkpoint than the newest.

    Returns:
      The path of the JSON file.
    """
    suffix = f'{label}_step_{step:08d}' if label else f'step_{step:08d}'
    name = f'evaluation_{suffix}.json' if label else workdirs.EVALUATION
    path = folder / name
    workdirs.write_json(
        path,
        {
            'step': step,
            'metrics': self.metrics,
            'baselines': self.baselines,
            'protocol': self.protocol,
        },
    )
    pictures = folder / workdirs.SAMPLES
    for sheet, picture in self.sheets.items():
      grid_lib.save_png(pictures / f'{suffix}{_SHEETS[sheet]}.png', picture)
    return path


class Evaluator:
  """Evaluates variables of a generator, always on the same images."""

  def __init__(
      self,
      config: ml_collections.ConfigDict,
      model: models.TokenModel,
      sampling: builder.Sampling,
      tokens: token_files.TokenFiles,
      mesh: jax.sharding.Mesh,
  ):
    """Reads the held-out tokens; functions are compiled on first call.

    Args:
      config: the whole config.
      model: the model built from the config.
      sampling: options of sampling.
      tokens: token files, and the tokenizer that decodes samples.
      mesh: with the variables.
    """
    self._config = config
    self._options = config.eval
    self._model = model
    self._sampling = sampling
    self._files = tokens
    self._held_out = self._read(
        tokens.eval,
        token_files.select(len(tokens.eval), self._options.num_images),
    )
    num_images = len(self._held_out.labels)
    self._train = self._read(
        tokens.train, token_files.select(len(tokens.train), num_images)
    )
    known = self._read(
        tokens.train,
        token_files.select(len(tokens.train), _MAX_BASELINE_IMAGES),
    )
    self._baselines = self._measure_baselines(known)
    self._copies = Copies(known.tokens)
    self._batcher = batching.Batcher(
        mesh, config.tokens.eval_batch_size, shared=True
    )
    self._sampler = samplers.Sampler(
        model, sampling, mesh, batch_size=config.sample.batch_size, shared=True
    )
    self._bits = jax.jit(
        build_bits(model, self._options.num_draws, config.seed),
        out_shardings=partitioning.replicated(mesh),
    )
    # Before the training: weights may be missing.
    self._networks = sample_metrics.load_networks(
        self._options.networks, partitioning.create_local_mesh()
    )

  def run(
      self,
      variables: Mapping[str, Any],
      *,
      before_batch: Callable[[], None] = lambda: None,
  ) -> Evaluation:
    """Evaluates variables.

    Args:
      variables: params of the model, on the mesh.
      before_batch: called before each batch; it may raise an error to stop.
    """
    num_tokens = self._model.num_tokens

    def measure(arrays: token_files.TokenArrays) -> dict[str, float]:
      def bits(batch):
        before_batch()
        return self._bits(variables, batch)

      batch = {
          **arrays._asdict(), 'examples': np.arange(len(arrays.labels))
      }
      return {
          name: float(np.mean(x, dtype=np.float64))
          for name, x in self._batcher.map(bits, batch).items()
      }

    held_out, train = measure(self._held_out), measure(self._train)
    metrics = {
        'bits_per_token': held_out['bits'] / num_tokens,
        'bits_per_image': held_out['bits'],
        'train_bits_per_token': train['bits'] / num_tokens,
        'generalization_gap': (held_out['bits'] - train['bits']) / num_tokens,
    }
    if 'compression' in held_out:
      metrics['compression_bits_per_token'] = (
          held_out['compression'] / num_tokens
      )
    protocol = {
        'tokens': self._files.describe(),
        'model_hash': self._files.format.model_hash,
        'num_images': len(self._held_out.labels),
        'num_tokens': num_tokens,
        'generator_hash': saved_generator.hash_variables(variables),
        'num_train_images_compared': self._copies.num_images,
        'parameters': 'EMA',
        'seed': self._config.seed,
        'command': provenance.command(),
        'definitions': DEFINITIONS,
    }
    if 'compression' in held_out:
      protocol['num_draws'] = self._options.num_draws
      protocol['compression_steps'] = min(
          likelihood.COMPRESSION_STEPS, num_tokens
      )
    sheets = {}
    if self._files.tokenizer is not None:
      sheets = self._evaluate_samples(
          variables, before_batch, metrics, protocol
      )
    definitions = protocol['definitions']
    protocol['definitions'] = {
        name: definitions[name] for name in metrics if name in definitions
    } | baselines_lib.DEFINITIONS
    return Evaluation(metrics, self._baselines, protocol, sheets)

  def _read(self, source, indices) -> token_files.TokenArrays:
    arrays = token_files.read(source, indices)
    self._model.vocabulary.check(arrays.tokens)
    if not self._model.num_classes:
      arrays = arrays._replace(
          labels=np.full_like(arrays.labels, embeddings.NO_LABEL)
      )
    embeddings.check_labels(arrays.labels, self._model.num_classes)
    return arrays

  def _measure_baselines(
      self, train: token_files.TokenArrays
  ) -> dict[str, float]:
    grid = self._model.grid
    return baselines_lib.measure(
        train.tokens.reshape(-1, *grid), train.labels,
        self._held_out.tokens.reshape(-1, *grid), self._held_out.labels,
        self._model.vocabulary.codebook_size,
    )._asdict()

  def _evaluate_samples(
      self, variables, before_batch, metrics, protocol
  ) -> dict[str, np.ndarray]:
    """Adds the metrics of samples; returns the sheets."""
    num_classes, options = self._model.num_classes, self._options
    shown = choose_classes(num_classes, options.samples_per_class)
    measured = np.full(options.num_samples, embeddings.NO_LABEL)
    if num_classes and options.num_samples:
      measured = sample_files.balanced_labels(
          options.num_samples, num_classes, self._config.seed
      )
    labels = np.concatenate([shown, measured])
    tokens = self._sampler(
        variables, labels, self._config.seed, before_batch=before_batch
    ).tokens
    before_batch()
    images = self._decode(tokens[: len(shown) + _NUM_NEAREST])
    names = self._files.format.label_names
    sheets = {
        'samples': grid_lib.contact_sheet(
            images[: len(shown)], shown, names,
            max_columns=options.samples_per_class,
        ),
        'inpainting': self._inpaint(variables, before_batch),
    }
    protocol['sampler'] = builder.describe_sampling(self._sampling)
    if len(measured):
      tokens, images = tokens[len(shown) :], images[len(shown) :]
      metrics['copied_token_grids'] = self._copies.count(tokens)
      before_batch()
      result = self._sample_evaluator.run(
          self._decode_batches(tokens, measured, before_batch)
      )
      metrics |= result.metrics
      details = dict(result.protocol)
      protocol['definitions'] = (
          protocol['definitions'] | details.pop('definitions')
      )
      protocol['samples'] = {**details, 'reference': options.reference}
      nearest, distances = self._sample_evaluator.find_nearest(images)
      train = self._read(
          self._files.train, self._compared_images('train')[nearest]
      )
      sheets['nearest'] = grid_lib.nearest_sheet(
          images, self._decode(train.tokens), distances
      )
    return sheets

  def _inpaint(self, variables, before_batch) -> np.ndarray:
    """Completes held-out images whose left or upper half is given."""
    rows, columns = self._model.grid
    num = min(_NUM_INPAINTED, len(self._held_out.labels))
    chosen = token_files.select(len(self._held_out.labels), num)
    tokens = self._held_out.tokens[chosen]
    given = np.zeros((num, rows, columns), bool)
    if self._model.architecture.causal:
      given[:, : rows // 2] = True
      argument = np.full(num, rows // 2 * columns)
    else:
      given[:, :, : columns // 2] = True
      argument = given.reshape(num, -1)
    repeated = [
        np.repeat(x, _NUM_COMPLETIONS, axis=0)
        for x in (self._held_out.labels[chosen], tokens, argument)
    ]
    completed = self._sampler(
        variables, repeated[0], self._config.seed,
        tokens=repeated[1], given=repeated[2], before_batch=before_batch,
    ).tokens
    images = self._decode(np.concatenate([tokens, completed]))
    return grid_lib.inpainting_sheet(
        images[:num], ~given,
        images[num:].reshape(num, _NUM_COMPLETIONS, *images.shape[1:]),
    )

  def _decode(self, tokens: np.ndarray) -> np.ndarray:
    return decode(self._files.tokenizer, tokens, self._model.grid)

  def _decode_batches(
      self,
      tokens: np.ndarray,
      labels: np.ndarray,
      before_batch: Callable[[], None] = lambda: None,
  ) -> Iterator[sample_metrics.ImageSet]:
    size = self._config.tokens.eval_batch_size
    for start in range(0, len(tokens), size):
      before_batch()
      rows = slice(start, start + size)
      yield sample_metrics.ImageSet(
          self._decode(tokens[rows]), labels[rows].astype(np.int64)
      )

  def _compared_images(self, split: str) -> np.ndarray:
    """Returns the numbers of the images that samples are compared with."""
    num_images = len(getattr(self._files, split))
    limits = {'train': _MAX_TRAIN_IMAGES, 'eval': self._options.num_images}
    return token_files.select(num_images, limits[split])

  @functools.cached_property
  def _sample_evaluator(self) -> sample_metrics.SampleEvaluator:
    """Decodes the held-out and the training images, once."""
    load = self._decoded_images
    if self._options.reference == 'original':
      load = self._original_images
    return sample_metrics.SampleEvaluator(
        load('eval'), self._decoded_images('train'), self._networks
    )

  def _decoded_images(self, split: str) -> Iterator[sample_metrics.ImageSet]:
    arrays = self._read(
        getattr(self._files, split), self._compared_images(split)
    )
    return self._decode_batches(arrays.tokens, arrays.labels)

  def _original_images(self, split: str) -> Iterator[sample_metrics.ImageSet]:
    """Reads the images of the tokenizer's data set as its evaluation does."""
    config, files = self._files.tokenizer.config, getattr(self._files, split)
    source = data_builder.open_source(config.data, split)
    dataset = data_builder.build_dataset(
        config.data, split=split, seed=config.seed
    )
    indices = self._compared_images(split)
    # By name: token files have no rows for unreadable images.
    names = [files[int(i)].name for i in indices]
    labels = dict(
        zip(names, self._read(files, indices).labels.tolist(), strict=True)
    )
    num_found = 0
    for batch in dataset:
      rows = {
          i: name
          for i in np.flatnonzero(batch['mask'])
          if (name := source.metadata(int(batch['index'][i])).name) in labels
      }
      if rows:
        num_found += len(rows)
        yield sample_metrics.ImageSet(
            batch['image'][list(rows)],
            np.array([labels[name] for name in rows.values()]),
        )
    if num_found < len(indices):
      raise ValueError(
          f"eval.reference is 'original', but {num_found} of {len(indices)}"
          " held-out images are in the tokenizer's data set; use 'decoded', or"
          ' restore the images.'
      )


class Copies:
  """Counts token grids that equal those of training images."""

  def __init__(self, tokens: np.ndarray):
    """Takes [n, N] tokens of the training images."""
    self._known = {x.tobytes() for x in tokens.astype(np.int32)}
    self.num_images = len(tokens)

  def count(self, tokens: np.ndarray) -> int:
    """Returns how many rows of [n, N] tokens are those of training images."""
    return sum(x.tobytes() in self._known for x in tokens.astype(np.int32))


def build_bits(
    model: models.TokenModel, num_draws: int, seed: int
) -> Callable[..., dict[str, jax.Array]]:
  """Builds the function that measures the bits of images.

  Args:
    model: masked or causal.
    num_draws: see `likelihood.any_order_bits`.
    seed: of the masks of masked models.

  Returns:
    A pure function of variables and a batch with 'tokens' [B, N], 'labels' [B]
    and 'examples' [B], the number of each image; it returns 'bits' [B] float32
    and, for masked models, 'compression' [B].
  """

  def bits(variables, batch):
    arguments = model, variables, batch['tokens'], batch['labels']
    if model.architecture.causal:
      return {'bits': jnp.sum(likelihood.exact_bits(*arguments), axis=-1)}
    return {
        'bits': likelihood.any_order_bits(
            *arguments, jax.random.key(seed), num_draws=num_draws,
            examples=batch['examples'],
        ),
        'compression': likelihood.compression_bits(
            *arguments,
            num_steps=min(likelihood.COMPRESSION_STEPS, model.num_tokens),
        ),
    }

  return bits


def choose_classes(num_classes: int, samples_per_class: int) -> np.ndarray:
  """Returns labels of a contact sheet, at most `_MAX_CLASSES` classes."""
  if not num_classes:
    return np.full(samples_per_class, embeddings.NO_LABEL)
  classes = token_files.select(num_classes, _MAX_CLASSES)
  return np.repeat(classes, samples_per_class)


def decode(
    tokenizer: tokenizers.Tokenizer, tokens: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
  """Decodes tokens [B, N] in raster order of a grid to [B, H, W, C] uint8."""
  return tokenizer.decode(tokens.reshape(-1, *grid))
