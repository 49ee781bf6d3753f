"""Metrics by networks: against direct calls; kept statistics; refusals."""

import json
import logging
import pathlib
import shutil

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import perceptual
from fsq_jax import workdir as workdirs
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.evaluation import network_metrics
from fsq_jax.evaluation import results as results_lib
from fsq_jax.models import pixels
from fsq_jax.models.pretrained import encoder as pretrained_vit
from fsq_jax.perceptual import lpips
from fsq_jax.runtime import partitioning

_ROOT = pathlib.Path(__file__).parents[2]
_ENCODER = _ROOT / 'tests/testdata/encoders/dinov2'
_SIDE = 32
_NUM_IMAGES = 8


def _write_lpips(path, network, seed=0):
  """Weights at random; heads are positive, as LPIPS has them."""
  rng = np.random.default_rng(seed)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(
      lpips.Lpips(network).init, jax.random.key(0), images, images
  )
  arrays = {}
  for name, x in traverse_util.flatten_dict(
      shapes['params'], sep='/'
  ).items():
    draw = rng.standard_normal(x.shape, np.float32)
    gain = np.float32((2 / max(np.prod(x.shape[:-1]), 1)) ** 0.5)
    arrays[name] = np.abs(draw) if name.startswith('head') else gain * draw
  safetensors.numpy.save_file(arrays, path)
  return str(path)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Files of weights by the names of metrics."""
  folder = tmp_path_factory.mktemp('weights')
  vgg16 = _write_lpips(folder / 'vgg16.safetensors', 'vgg16')
  alexnet = _write_lpips(folder / 'alexnet.safetensors', 'alexnet')
  return {
      'lpips_alexnet': alexnet,
      'lpips_vgg16': vgg16,
      'fd_vgg16': vgg16,
      'fd_encoder': str(_ENCODER),
  }


@pytest.fixture(scope='module')
def config():
  """The debug config, with images that AlexNet takes."""
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.data.image_size = (_SIDE, _SIDE)
  return config


@pytest.fixture(scope='module')
def model(config):
  return models.build_autoencoder(config.model, config.data.image_size)


@pytest.fixture(scope='module')
def variables(model):
  images = jnp.zeros((1, _SIDE, _SIDE, 3))
  return jax.device_get(jax.jit(model.init)(jax.random.key(1), images))


@pytest.fixture(scope='module')
def pairs(model, variables):
  """All images and what the model makes of them, uint8."""
  images = _Images(_NUM_IMAGES).images
  output = jax.jit(model.apply)(variables, _floats(images))
  reconstructions = jax.jit(pixels.to_uint8)(output.reconstructions)
  return images, np.asarray(reconstructions)


def _floats(images):
  return np.float32(images) / np.float32(127.5) - 1


class _Images:
  """Noise of various brightness in batches, as a data set has them."""

  damaged = 0
  tiles = ()

  def __init__(self, batch_size, seed=0, num_unreadable=0):
    rng = np.random.default_rng(seed)
    self.images = np.uint8(
        rng.uniform(0, 255, (_NUM_IMAGES, _SIDE, _SIDE, 3))
        * rng.uniform(0.2, 1, (_NUM_IMAGES, 1, 1, 1))
    )
    self.num_examples = _NUM_IMAGES
    self.digests = np.zeros((0, 32), np.uint8)
    self.fingerprint = {'content': f'seed {seed}', 'batch_size': batch_size}
    self.protocol = {'crop': 'none'}
    self._batch_size = batch_size
    self._num_unreadable = num_unreadable

  def __iter__(self):
    for start in range(0, _NUM_IMAGES, self._batch_size):
      index = np.arange(start, start + self._batch_size)
      mask = index < _NUM_IMAGES - self._num_unreadable
      images = self.images[np.minimum(index, _NUM_IMAGES - 1)].copy()
      images[~mask] = 0
      yield {
          'image': images,
          'index': index,
          'mask': mask,
          'upscaled': np.zeros(len(index), bool),
      }


def _evaluator(config, model, files, folder, *, batch_size=4, num_devices=1,
               **images):
  config = config.copy_and_resolve_references()
  config.eval.networks.update(files)
  mesh = partitioning.create_mesh(
      {'data': num_devices, 'fsdp': 1}, jax.devices()[:num_devices]
  )
  return evaluators.build_evaluator(
      config, model, _Images(batch_size, **images), mesh, folder
  )


def _without(files, *names):
  return {name: path for name, path in files.items() if name not in names}


@pytest.fixture(scope='module')
def kept(config, model, variables, files, tmp_path_factory):
  """An evaluation by all networks but VGG16, which costs too much."""
  folder = tmp_path_factory.mktemp('kept')
  files = _without(files, 'lpips_vgg16', 'fd_vgg16')
  return _evaluator(config, model, files, folder).run(variables)


@pytest.fixture(scope='module')
def kept_vgg16(config, model, variables, files, tmp_path_factory):
  """An evaluation by VGG16."""
  folder = tmp_path_factory.mktemp('kept_vgg16')
  files = _without(files, 'lpips_alexnet', 'fd_encoder')
  return _evaluator(config, model, files, folder).run(variables)


def _moments(features):
  features = np.asarray(features, np.float64)
  return features.mean(axis=0), np.cov(features, rowvar=False)


def _numpy_frechet(features, others):
  """By the eigenvalues of the product, which is not how the package does it."""
  (m1, s1), (m2, s2) = _moments(features), _moments(others)
  roots = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real
  return (
      np.sum((m1 - m2) ** 2) + np.trace(s1) + np.trace(s2) - 2 * np.sum(roots)
  )


@pytest.fixture(scope='module')
def mean_latents(pairs):
  """Of originals and of reconstructions, by direct calls."""
  encoder = models.load_encoder(_ENCODER, final_affine=False)
  apply = jax.jit(encoder.module.apply)
  return [
      np.mean(apply(encoder.variables, _floats(x)), axis=(1, 2)) for x in pairs
  ]


def _mean_lpips(files, pairs, network):
  path = files[f'lpips_{network}']
  module, weights, _ = perceptual.load_lpips(path, network)
  distances = jax.jit(module.apply)(weights, *map(_floats, pairs))
  assert np.std(distances) > 0
  return np.mean(np.float64(distances))


@pytest.mark.slow
def test_lpips_is_the_mean_of_one_direct_call(kept, files, pairs):
  expected = _mean_lpips(files, pairs, 'alexnet')
  assert kept.metrics['lpips_alexnet'] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_frechet_distances_are_those_of_numpy(kept, mean_latents):
  # Roots of eigenvalues that are 0 keep half the digits.
  assert kept.metrics['fd_encoder'] == pytest.approx(
      _numpy_frechet(*mean_latents), rel=1e-4
  )


@pytest.mark.slow
def test_metrics_of_vgg16_are_those_of_direct_calls(kept_vgg16, files, pairs):
  expected = _mean_lpips(files, pairs, 'vgg16')
  assert kept_vgg16.metrics['lpips_vgg16'] == pytest.approx(expected, rel=1e-6)
  module, weights, _ = perceptual.load_lpips(files['fd_vgg16'], 'vgg16')
  apply = jax.jit(lambda w, x: module.apply(w, x, method='pooled'))
  pooled = [apply(weights, _floats(x)) for x in pairs]
  assert pooled[0].shape == (_NUM_IMAGES, 512)
  assert kept_vgg16.metrics['fd_vgg16'] == pytest.approx(
      _numpy_frechet(*pooled), rel=1e-4
  )


@pytest.mark.slow
@pytest.mark.parametrize(
    ('batch_size', 'num_devices'),
    [(5, 1), pytest.param(8, 8, marks=pytest.mark.slow)],
)
def test_batches_and_devices_do_not_change_the_numbers(
    config, model, variables, files, kept, tmp_path, batch_size, num_devices
):
  # VGG16 costs too much here, and is made of the same operations.
  files = _without(files, 'lpips_vgg16', 'fd_vgg16')
  actual = _evaluator(
      config, model, files, tmp_path,
      batch_size=batch_size, num_devices=num_devices,
  ).run(variables)
  for name in files:
    assert actual.metrics[name] == pytest.approx(
        kept.metrics[name], rel=1e-6
    ), name


@pytest.mark.slow
def test_unreadable_images_count_in_no_metric(
    config, model, variables, mean_latents, tmp_path
):
  evaluation = _evaluator(
      config, model, {'fd_encoder': str(_ENCODER)}, tmp_path, num_unreadable=3
  ).run(variables)
  assert evaluation.protocol['num_images'] == _NUM_IMAGES - 3
  assert evaluation.metrics['fd_encoder'] == pytest.approx(
      _numpy_frechet(*(x[:-3] for x in mean_latents)), rel=1e-4
  )


@pytest.fixture
def calls(monkeypatch):
  """Sums of the pixels that the encoder has been applied to, batch by batch."""
  seen = []
  apply = pretrained_vit.PretrainedVit.__call__

  def counted(module, images):
    grey = jnp.round((images + 1) * 127.5).astype(jnp.int32)
    jax.debug.callback(lambda x: seen.append(int(x)), jnp.sum(grey))
    return apply(module, images)

  monkeypatch.setattr(pretrained_vit.PretrainedVit, '__call__', counted)
  return seen


def _applied(calls):
  """All pixels that the encoder has been applied to since."""
  jax.effects_barrier()
  total = sum(calls)
  calls.clear()
  return total


def _write(folder, evaluation):
  results_lib.write_evaluation(folder, 1, evaluation)
  return (folder / workdirs.EVALUATION).read_bytes()


@pytest.mark.slow
def test_cached_statistics_give_the_same_metrics(
    config, model, variables, files, pairs, tmp_path, calls
):
  files = {'fd_encoder': files['fd_encoder']}
  images, reconstructions = (int(np.sum(x, dtype=np.int64)) for x in pairs)
  assert images != reconstructions

  evaluator = _evaluator(config, model, files, tmp_path)
  first = _write(tmp_path, evaluator.run(variables))
  assert _applied(calls) == images + reconstructions
  # In one process, as between evaluations of a training run.
  assert _write(tmp_path, evaluator.run(variables)) == first
  assert _applied(calls) == reconstructions
  # In another one.
  again = _evaluator(config, model, files, tmp_path)
  assert _write(tmp_path, again.run(variables)) == first
  assert _applied(calls) == reconstructions


@pytest.fixture
def one_kept(config, model, variables, tmp_path):
  """A folder with statistics of the encoder, and the distance."""
  files = {'fd_encoder': str(_ENCODER)}
  evaluation = _evaluator(config, model, files, tmp_path).run(variables)
  return tmp_path, evaluation.metrics['fd_encoder']


@pytest.mark.slow
def test_cached_statistics_of_other_images_are_not_used(
    config, model, variables, one_kept, tmp_path_factory, calls
):
  folder, distance = one_kept
  files = {'fd_encoder': str(_ENCODER)}
  other = _evaluator(config, model, files, folder, seed=1).run(variables)
  fresh = tmp_path_factory.mktemp('fresh')
  expected = _evaluator(config, model, files, fresh, seed=1).run(variables)
  assert other.metrics == expected.metrics
  assert other.metrics['fd_encoder'] != distance
  # Nor do they take the place of the first ones.
  calls.clear()
  again = _evaluator(config, model, files, folder).run(variables)
  assert again.metrics['fd_encoder'] == distance
  jax.effects_barrier()
  assert len(calls) == _NUM_IMAGES // 4


@pytest.mark.slow
def test_cached_statistics_of_other_weights_are_not_used(
    config, model, variables, one_kept, tmp_path_factory, caplog
):
  folder, distance = one_kept
  encoder = tmp_path_factory.mktemp('changed') / 'encoder'
  shutil.copytree(_ENCODER, encoder)
  (path,) = encoder.glob('*.safetensors')
  arrays = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file(
      {name: 1.1 * x for name, x in arrays.items()}, path
  )
  files = {'fd_encoder': str(encoder)}
  fresh = tmp_path_factory.mktemp('fresh')
  expected = _evaluator(config, model, files, fresh).run(variables)
  caplog.clear()
  other = _evaluator(config, model, files, folder).run(variables)
  assert other.metrics == expected.metrics
  assert other.metrics['fd_encoder'] != distance
  assert 'Features of originals are computed again' in caplog.messages[0]


@pytest.mark.slow
def test_kept_statistics_of_images_since_damaged_give_no_number(
    config, model, variables, one_kept, caplog
):
  folder, _ = one_kept
  caplog.set_level(logging.ERROR)
  evaluation = _evaluator(
      config, model, {'fd_encoder': str(_ENCODER)}, folder, num_unreadable=3
  ).run(variables)
  assert np.isnan(evaluation.metrics['fd_encoder'])
  (message,) = caplog.messages
  assert 'is of 8 other images than the 5 that were read. Remove' in message


@pytest.mark.slow
def test_kept_statistics_of_pixels_that_have_changed_give_no_number(
    config, model, variables, one_kept, monkeypatch, caplog
):
  folder, _ = one_kept
  evaluator = _evaluator(
      config, model, {'fd_encoder': str(_ENCODER)}, folder
  )
  # Under the same names, of the same sizes.
  update_sums = results_lib.EvaluationSums.update

  def update(self, batch, *args):
    image = batch['image'].copy()
    image[0, 0, 0, 0] ^= 1
    update_sums(self, {**batch, 'image': image}, *args)

  monkeypatch.setattr(results_lib.EvaluationSums, 'update', update)
  caplog.set_level(logging.ERROR)
  assert np.isnan(evaluator.run(variables).metrics['fd_encoder'])
  assert 'other images' in caplog.text


class _Poisoned:
  """A model whose reconstruction of the brightest image is not finite."""

  def __init__(self, model, images):
    self.quantizer = model.quantizer
    self._model = model
    brightest = np.sort(np.mean(_floats(images), axis=(1, 2, 3)))[-2:]
    self._threshold = np.mean(brightest)

  def apply(self, variables, images):
    output = self._model.apply(variables, images)
    bright = jnp.mean(images, axis=(1, 2, 3), keepdims=True) > self._threshold
    return output._replace(
        reconstructions=jnp.where(bright, jnp.nan, output.reconstructions)
    )


@pytest.mark.slow
def test_nonfinite_values_are_counted_and_not_averaged(
    config, model, variables, files, pairs, tmp_path
):
  files = _without(files, 'lpips_vgg16', 'fd_vgg16')
  evaluation = _evaluator(
      config, _Poisoned(model, pairs[0]), files, tmp_path
  ).run(variables)
  assert evaluation.protocol['num_nonfinite_reconstructions'] == 1
  record = json.loads(_write(tmp_path, evaluation))
  for name in files:
    assert record['metrics'][name] is None
  # The originals were good: the next evaluation is not harmed.
  later = _evaluator(config, model, files, tmp_path).run(variables)
  assert later.metrics['fd_encoder'] > 0


@pytest.mark.slow
def test_frechet_distance_of_one_image_is_nan(
    config, model, variables, tmp_path
):
  evaluation = _evaluator(
      config, model, {'fd_encoder': str(_ENCODER)}, tmp_path,
      num_unreadable=_NUM_IMAGES - 1,
  ).run(variables)
  assert np.isnan(evaluation.metrics['fd_encoder'])
  assert np.isfinite(evaluation.metrics['psnr'])


@pytest.mark.slow
def test_numbers_stand_beside_hashes_and_definitions(kept, files):
  evaluation = kept
  files = _without(files, 'lpips_vgg16', 'fd_vgg16')
  hashes = {name: models.hash_weights(path) for name, path in files.items()}
  assert evaluation.protocol['networks'] == hashes
  lines, summary = evaluation.lines(), evaluation.summary()
  for name, digest in hashes.items():
    value = evaluation.metrics[name]
    assert f'{name}: {value:.6g} (weights sha256 {digest})' in lines
    assert f'{name} {value:.3f} (weights {digest[:12]})' in summary
    assert name in evaluation.protocol['definitions']
  assert f'psnr: {evaluation.metrics["psnr"]:.6g}' in lines
  assert 'rfid' not in evaluation.protocol['definitions']


def test_every_metric_has_a_definition_and_a_field(config):
  assert network_metrics.DEFINITIONS.keys() == set(config.eval.networks)


def test_a_missing_file_is_refused_by_its_field(config, model, tmp_path):
  for name in network_metrics.DEFINITIONS:
    with pytest.raises(ValueError, match=rf'^eval\.networks\.{name}: .*none'):
      _evaluator(config, model, {name: str(tmp_path / 'none')}, tmp_path)


def test_images_too_small_for_a_network_are_refused_at_once(
    config, model, files, tmp_path
):
  config = config.copy_and_resolve_references()
  config.data.image_size = (48, 28)
  files = {'lpips_alexnet': files['lpips_alexnet']}
  with pytest.raises(
      ValueError, match=r'lpips_alexnet needs images of 31 pixels.*\(48, 28\)'
  ):
    _evaluator(config, model, files, tmp_path)
