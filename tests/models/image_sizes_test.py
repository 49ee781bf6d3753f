"""Buckets: which sizes there are, what fills them up, and what ignores it."""

import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.models import autoencoder
from fsq_jax.models import image_sizes
from fsq_jax.runtime import batching
from fsq_jax.runtime import compiled
from fsq_jax.runtime import partitioning

_DEBUG = pathlib.Path(__file__).parents[2] / 'configs' / 'debug.py'
_CONV = {
    'encoder.name': 'conv', 'decoder.name': 'conv',
    'encoder.conv.filters': 32, 'encoder.conv.channel_multipliers': (1, 1),
    'encoder.conv.num_res_blocks': 1,
}  # fmt: skip


def _model(**overrides):
  """A model with a stride of 2 for images of (14, 22) pixels, or a ViT."""
  config = configuration.load_config(_DEBUG)
  fields = {x.replace('__', '.'): y for x, y in overrides.items()}
  config.model.update_from_flattened_dict({**_CONV, **fields})
  return models.build_autoencoder(config.model, (14, 22))


def _record(calls):
  """A function that returns its arrays at half their sides, and a number."""

  def function(x, size):
    calls.append((x, size))
    return {'half': x[:, ::2, ::2], 'finite': np.array(True)}

  return function


def test_buckets_are_two_in_an_octave():
  buckets = [image_sizes.bucket(num) for num in range(1, 100_001)]
  assert sorted(set(buckets))[:12] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
  assert len(set(buckets)) == 34
  ratios = np.array(buckets) / np.arange(1, 100_001)
  assert ratios.min() == 1
  assert ratios.max() < 1.5
  assert buckets == sorted(buckets)
  assert all(image_sizes.bucket(x) == x for x in set(buckets))


@pytest.mark.parametrize(
    ('size', 'expected'),
    [((10, 18), (12, 24)), ((2, 34), (2, 48)), ((14, 20), (16, 24))],
)
def test_arrays_are_filled_up_with_zeros_and_cropped(size, expected):
  sizes, calls = image_sizes.ImageSizes(_model(), (14, 22)), []
  x = np.random.default_rng(0).integers(1, 256, (2, *size, 3), dtype=np.uint8)
  result = sizes.call(_record(calls), x, sizes.multiples)
  (filled, valid), = calls
  assert filled.shape == (2, *expected, 3)
  assert filled.dtype == np.uint8
  assert valid.dtype == np.int32
  assert tuple(valid) == size
  np.testing.assert_array_equal(filled[:, : size[0], : size[1]], x)
  assert np.count_nonzero(filled) == x.size
  np.testing.assert_array_equal(result['half'], x[:, ::2, ::2])
  assert result['half'].flags.c_contiguous
  assert result['finite'].shape == ()


def test_tokens_have_buckets_of_their_own():
  sizes, calls = image_sizes.ImageSizes(_model(), (14, 22)), []
  sizes.call(_record(calls), np.ones((1, 10, 5, 2), np.int32), sizes.grid)
  assert calls[0][0].shape == (1, 12, 6, 2)


@pytest.mark.parametrize('size', [(14, 22), (16, 24), (2, 6)])
def test_buckets_and_the_trained_size_are_taken_as_they_are(size):
  sizes, calls = image_sizes.ImageSizes(_model(), (14, 22)), []
  x = np.ones((1, *size, 3), np.uint8)
  sizes.call(_record(calls), x, sizes.multiples)
  (given, valid), = calls
  assert given is x
  assert valid is None


def test_a_bucket_beyond_the_memory_is_not_used():
  sizes, calls = image_sizes.ImageSizes(_model(), (14, 22)), []
  record = _record(calls)

  def function(x, size):
    if size is not None:
      raise compiled.TooLargeError('no')
    return record(x, size)

  x = np.ones((1, 10, 18, 3), np.uint8)
  sizes.call(function, x, sizes.multiples)
  assert [x.shape for x, _ in calls] == [(1, 10, 18, 3)]


def test_models_that_mix_positions_have_no_buckets():
  attention = {
      'projector_in__name': 'attention',
      **{
          f'projector_in__attention__{name}': value
          for name, value in {
              'width': 8, 'depth': 1, 'num_heads': 1, 'mlp_dim': 8
          }.items()
      },
  }
  model = _model(**attention)
  assert autoencoder.stride_of(model) == 2
  assert not autoencoder.takes_size(model)
  sizes, calls = image_sizes.ImageSizes(model, (14, 22)), []
  x = np.ones((1, 10, 18, 3), np.uint8)
  sizes.call(_record(calls), x, sizes.multiples)
  assert calls[0][0] is x
  assert autoencoder.takes_size(_model())
  assert not autoencoder.takes_size(_model().clone(encoder=None))


def test_arrays_of_any_size_are_mapped_in_batches():
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  batcher = batching.Batcher(mesh, 4)
  x = np.random.default_rng(0).integers(1, 256, (9, 10, 18, 3), dtype=np.uint8)
  sizes = image_sizes.ImageSizes(_model(), (14, 22))
  seen = []

  def function(batch, size):
    seen.append((batch.shape, size))
    return batch[:, ::2, ::2]

  given = sizes.map(function, x, sizes.multiples, batcher)
  np.testing.assert_array_equal(given, x[:, ::2, ::2])
  # Whole images in a bucket of 12 x 24 pixels.
  assert [shape for shape, _ in seen] == [(4, 12, 24, 3)] * 3
  assert all(tuple(size) == (10, 18) for _, size in seen)


@pytest.mark.slow
@pytest.mark.parametrize('projector', [
    'linear', 'standardized', pytest.param('mlp', marks=pytest.mark.slow)
])  # fmt: skip
def test_projectors_see_no_other_position(projector):
  # What `takes_size` says of those that say nothing.
  model = _model(projector_in__name=projector, encoder__conv__latent_width=8)
  assert autoencoder.takes_size(model)
  module = model.projector_in
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 8)))
  # Under jit: running each operation by itself compiles them one by one.
  variables = jax.jit(module.init)(jax.random.key(0), x)
  apply = jax.jit(lambda *arguments: module.apply(*arguments, train=False))
  whole, part = (apply(variables, y) for y in (x, x[:, :1, :2]))
  np.testing.assert_allclose(whole[:, :1, :2], part, rtol=1e-5, atol=1e-6)
