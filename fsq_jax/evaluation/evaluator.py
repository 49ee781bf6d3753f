"""Evaluation of a whole split: image metrics and codebook statistics."""

from collections.abc import Callable, Iterator, Mapping
import pathlib
import types
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import ml_collections

from fsq_jax.configuration import errors
from fsq_jax.data import builder as data_builder
from fsq_jax.data import pipelines
from fsq_jax.evaluation import image_metrics
from fsq_jax.evaluation import network_metrics
from fsq_jax.evaluation import results as results_lib
from fsq_jax.models import pixels
from fsq_jax.runtime import partitioning
from fsq_jax.workdir import files as workdirs


class Evaluator:
  """Evaluates variables on a split, each image once.

  Results do not depend on the batch size or on the number of devices.
  """

  def __init__(
      self,
      model: nn.Module,
      dataset: pipelines.Dataset,
      mesh: jax.sharding.Mesh,
      *,
      num_grid_images: int,
      networks: network_metrics.NetworkMetrics | None = None,
      other_sizes: Mapping[str, 'SizedSplit'] = types.MappingProxyType({}),
  ):
    """Functions are compiled on first call.

    Args:
      model: an autoencoder.
      dataset: built with split='eval'.
      mesh: from `partitioning.create_mesh`.
      num_grid_images: number of originals and reconstructions to return.
      networks: metrics by networks, for the same data set; None for no metrics.
      other_sizes: from `open_other_sizes`; evaluated too.
    """
    if networks is None:
      networks = network_metrics.NetworkMetrics({}, mesh, images={})
    self._networks = networks
    self._quantizer = model.quantizer
    self._dataset = dataset
    self._mesh = mesh
    self._num_grid_images = num_grid_images
    # Every process needs the results of the whole batch.
    self._eval_step = jax.jit(
        build_eval_step(model),
        out_shardings=partitioning.replicated(mesh),
    )
    self._gather = jax.jit(
        lambda batch: batch, out_shardings=partitioning.replicated(mesh)
    )
    self._at_sizes = {
        size: Evaluator(
            model,
            split.dataset,
            mesh,
            num_grid_images=num_grid_images,
            networks=split.networks,
        )
        for size, split in other_sizes.items()
    }

  def run(
      self,
      variables: Mapping[str, Any],
      *,
      before_batch: Callable[[], None] = lambda: None,
      after_batch: Callable[
          [Mapping[str, Any], results_lib.EvalOutput], None
      ] = lambda batch, output: None,
  ) -> results_lib.Evaluation:
    """Evaluates the variables of the model.

    Args:
      variables: params and the model's other collections.
      before_batch: called before each batch is added; it may raise an error to
        stop the evaluation.
      after_batch: called with each batch and its results, on the host; not
        with batches of other sizes.

    Raises:
      ValueError: the split has no readable image.
    """
    sums = results_lib.EvaluationSums(
        self._quantizer, self._networks, self._dataset, self._num_grid_images
    )
    for results in self.outputs(variables):
      before_batch()
      sums.update(*results)
      batch, output, *_ = results
      after_batch(batch, output)
    return sums.result()._replace(
        at_sizes={
            size: evaluator.run(variables, before_batch=before_batch)
            for size, evaluator in self._at_sizes.items()
        }
    )

  def outputs(self, variables: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Reconstructs the split once.

    Args:
      variables: as in `run`.

    Yields:
      The arguments of `results.EvaluationSums.update`, batch by batch.
    """
    pending = None
    for local_batch in self._dataset:
      batch = partitioning.shard_batch(local_batch, self._mesh)
      output = self._eval_step(variables, batch['image'])
      # A batch is processed while devices compute the next one.
      previous, pending = pending, (self._gather(batch), output, batch['image'])
      if previous is not None:
        yield _fetch(*previous)
    if pending is not None:
      yield _fetch(*pending)


def _fetch(
    batch: Any, output: results_lib.EvalOutput, images: jax.Array
) -> tuple[Any, ...]:
  """Waits for the results of a batch and copies them to the host."""
  return *jax.device_get((batch, output)), images, output.reconstructions


def build_evaluator(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    dataset: pipelines.Dataset,
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
) -> Evaluator:
  """Builds the evaluator of training.

  Args:
    config: the whole config.
    model: an autoencoder.
    dataset: built with split='eval'.
    mesh: from `partitioning.create_mesh`.
    folder: of the run, where feature statistics of the originals are kept.

  Raises:
    ValueError: missing or corrupted weights of a network, images that are too
      small for a network, or native_size, which training does not support.
  """
  if config.eval.native_size:
    raise ValueError(
        'eval.native_size is True; training evaluates crops and allows only'
        ' False. Set it with --mode=eval.'
    )
  return Evaluator(
      model,
      dataset,
      mesh,
      num_grid_images=config.eval.num_grid_images,
      networks=build_networks(config, dataset, mesh, folder),
      other_sizes=open_other_sizes(config, mesh, folder),
  )


class SizedSplit(NamedTuple):
  """The evaluation split in crops of one size, and its network metrics."""

  dataset: pipelines.Dataset
  networks: network_metrics.NetworkMetrics


def open_other_sizes(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
) -> dict[str, SizedSplit]:
  """Opens the evaluation split at all data.image_sizes but data.image_size.

  Args:
    config: the whole config.
    mesh: from `partitioning.create_mesh`.
    folder: where feature statistics of the originals are kept.

  Returns:
    The split by size, such as '48x64' (height x width), in the order of
    data.image_sizes.

  Raises:
    ValueError: as by `build_evaluator`.
  """
  splits = {}
  for size in pipelines.image_sizes(config.data):
    if size != tuple(config.data.image_size):
      sized = config.copy_and_resolve_references()
      # Not one cache of decoded images per size.
      sized.data.update({'image_size': size, 'cache_mib': 0})
      with errors.about('data.image_sizes'):
        dataset = data_builder.build_dataset(
            sized.data,
            split='eval',
            seed=config.seed,
            **partitioning.data_shard(mesh)._asdict(),
        )
        networks = build_networks(sized, dataset, mesh, folder)
      splits[pipelines.size_name(size)] = SizedSplit(dataset, networks)
  return splits


def build_networks(
    config: ml_collections.ConfigDict,
    dataset: pipelines.Dataset,
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
) -> network_metrics.NetworkMetrics:
  """Loads the networks of eval.networks for a data set."""
  networks = network_metrics.NetworkMetrics(
      config.eval.networks,
      mesh,
      images={
          name: value
          for name, value in (dataset.fingerprint | dataset.protocol).items()
          if name
          not in ('batch_size', 'process_count', 'data_dir', 'skipped_files')
      },
      folder=folder / workdirs.REFERENCES,
  )
  if not config.eval.native_size:
    networks.check_size(config.data.image_size)
  return networks


def build_eval_step(
    model: nn.Module,
) -> Callable[[Any, jax.Array], results_lib.EvalOutput]:
  """Builds the function that reconstructs and measures one batch.

  Args:
    model: an autoencoder.

  Returns:
    A pure function of the model's variables and [B, H, W, C] uint8 images.
    Metrics compare the images with reconstructions rounded to uint8.
  """

  def step_fn(variables, images):
    output = model.apply(variables, pixels.to_float(images))
    return results_lib.EvalOutput(
        metrics=image_metrics.image_metrics(images, output.reconstructions),
        indices=output.indices,
        reconstructions=pixels.to_uint8(output.reconstructions),
    )

  return step_fn
