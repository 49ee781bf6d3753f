"""Images of any size: shapes, what padding changes, tiles, errors."""

import pathlib

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import quantizers
from fsq_jax.data import transforms
from fsq_jax.models import autoencoder
from fsq_jax.models import native_size
from fsq_jax.models import pixels
from fsq_jax.models import projectors
from fsq_jax.runtime import partitioning

_DEBUG = pathlib.Path(__file__).parents[2] / 'configs' / 'debug.py'


class _Down(nn.Module):
  """Two convolutions without a norm; the second one has the stride."""

  stride: int

  @nn.compact
  def __call__(self, images):
    x = nn.tanh(nn.Conv(4, (3, 3))(images))
    side = self.stride
    return nn.Conv(3, (side, side), strides=(side, side))(x)


class _Up(nn.Module):
  """Nearest neighbours and a convolution."""

  stride: int

  @nn.compact
  def __call__(self, latents):
    x = jnp.repeat(jnp.repeat(latents, self.stride, 1), self.stride, 2)
    return 0.5 * nn.Conv(3, (5, 5))(x)


class _TileDown(nn.Module):
  """The same for images of (16, 24) pixels alone, as a ViT."""

  grid_size: tuple[int, int] = (4, 6)

  @nn.compact
  def __call__(self, images):
    assert images.shape[1:3] == (16, 24)
    return _Down(4)(images)


class _TileUp(nn.Module):
  """The decoder of `_TileDown`."""

  @nn.compact
  def __call__(self, latents):
    return _Up(4)(latents)


def _small(encoder, decoder):
  return models.Autoencoder(
      encoder=encoder,
      projector_in=projectors.NoProjectorIn(code_dim=3),
      quantizer=quantizers.FSQ(levels=(8, 8, 8)),
      projector_out=projectors.NoProjectorOut(width=3),
      decoder=decoder,
  )


def _without_norm(stride):
  return _small(_Down(stride), _Up(stride))


def _tiled():
  return _small(_TileDown(), _TileUp())


def _build(**overrides):
  """A small model by a config, whose images are (16, 24) pixels."""
  config = configuration.load_config(_DEBUG)
  config.update_from_flattened_dict({
      f'model.{name.replace("__", ".")}': x for name, x in overrides.items()
  })
  return models.build_autoencoder(config.model, (16, 24))


def _conv(**overrides):
  return _build(
      encoder__name='conv',
      decoder__name='conv',
      encoder__conv__filters=32,
      encoder__conv__channel_multipliers=(1, 1, 1),
      encoder__conv__num_res_blocks=1,
      **overrides,
  )


def _variables(model, size=(16, 24)):
  """Variables none of which is at its initial value, without compiling."""
  rng = np.random.default_rng(1)

  def draw(path, x):
    if path[-1].key == 'kernel':
      deviation = np.prod(x.shape[:-1]) ** -0.5
      return np.asarray(rng.normal(0, deviation, x.shape), x.dtype)
    around = 1.0 if path[-1].key in ('scale', 'variance') else 0.0
    return np.asarray(around + rng.uniform(-0.4, 0.4, x.shape), x.dtype)

  shapes = jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, *size, 3))
  )
  return jax.tree_util.tree_map_with_path(draw, shapes)


def _image(height, width):
  rng = np.random.default_rng(height + 1000 * width)
  return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)


def _reconstructor(model, image_size=(16, 24)):
  mesh = partitioning.create_mesh({'data': 8, 'fsdp': 1})
  return native_size.Reconstructor(model, image_size, mesh)


def _forward(model, variables, images):
  output = jax.jit(model.apply)(
      variables, pixels.to_float(jnp.asarray(images))
  )
  return (
      np.asarray(pixels.to_uint8(output.reconstructions)),
      np.asarray(output.indices),
  )


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['whole', 'tiles'])
def test_every_size_comes_back(kind):
  if kind == 'whole':
    model, cell, side = _without_norm(32), (32, 32), 32
  else:
    model, cell, side = _tiled(), (16, 24), 4
  variables = _variables(model)
  reconstructor = _reconstructor(model)
  seen = set()
  sizes = [(h, 98 - h) for h in range(1, 98, 4)]
  sizes += [(1, 1), (97, 97), (16, 24)]
  for height, width in sizes:
    output = reconstructor(variables, _image(height, width))
    assert output.image.shape == (height, width, 3)
    assert output.image.dtype == np.uint8
    assert output.finite
    rows, columns = (
        -(-x // c) * c // side
        for x, c in zip((height, width), cell, strict=True)
    )
    assert output.indices.shape == (rows, columns)
    assert output.indices.dtype == np.int32
    seen.update(output.indices.flat)
  assert len(seen) > 3


def test_padding_mirrors_the_bottom_and_the_right():
  image = _image(3, 5)
  padded = transforms.pad(image, (8, 6))
  assert padded.shape == (8, 6, 3)
  rows, columns = [0, 1, 2, 2, 1, 0, 0, 1], [0, 1, 2, 3, 4, 4]
  np.testing.assert_array_equal(padded, image[rows][:, columns])
  assert transforms.pad(image, (3, 5)).shape == image.shape
  one = transforms.pad(image[:1, :1], (16, 16))
  np.testing.assert_array_equal(one, np.broadcast_to(image[0, 0], one.shape))


def test_padding_changes_no_pixel_beyond_the_receptive_field():
  model = _without_norm(4)
  variables = _variables(model)
  reconstructor = _reconstructor(model)
  image = _image(32, 40)
  whole = reconstructor(variables, image)
  part = reconstructor(variables, image[:27, :37])
  # The decoder looks 2 pixels further, into cells of 4 x 4, out of which the
  # encoder looks 1 pixel: pixel p sees those up to 4 floor((p + 2) / 4) + 4.
  different = np.any(whole.image[:27, :37] != part.image, axis=2)
  assert not different[:22, :34].any()
  assert different[22:].any()
  assert different[:, 34:].any()
  np.testing.assert_array_equal(whole.indices[:6, :9], part.indices[:6, :9])


@pytest.mark.slow
def test_group_norm_feels_the_padding_everywhere_a_little():
  # As the class says: its statistics are of the whole image.
  model = _conv()
  variables = _variables(model)
  reconstructor = _reconstructor(model)
  image = _image(96, 96)
  whole = reconstructor(variables, image).image.astype(int)
  part = reconstructor(variables, image[:94, :94]).image.astype(int)
  # Convolutions reach less than 60 pixels.
  difference = np.abs(whole[:8, :8] - part[:8, :8])
  assert 0 < difference.mean() < 0.2 * whole.std()


@pytest.mark.slow
@pytest.mark.parametrize('size', [(16, 24), (32, 20)])
def test_a_conv_model_takes_what_its_stride_divides_as_it_is(size):
  model = _conv()
  variables = _variables(model)
  image = _image(*size)
  output = _reconstructor(model)(variables, image)
  images, indices = _forward(model, variables, image[None])
  np.testing.assert_array_equal(output.image, images[0])
  np.testing.assert_array_equal(output.indices, indices[0])


@pytest.mark.slow
def test_a_conv_model_is_compiled_for_few_sizes(monkeypatch):
  traced, to_float = [], pixels.to_float

  def to_float_recorded(images):
    traced.append(images.shape)
    return to_float(images)

  model = _conv()
  variables = _variables(model)
  reconstructor = _reconstructor(model)
  # Of 5 to 8 by 9 to 12 latents of 4 x 4, which is in two buckets.
  sizes = [(17, 33), (19, 45), (21, 39), (24, 46), (25, 37), (30, 47), (29, 43)]
  for size in sizes:
    image = _image(*size)
    with monkeypatch.context() as patch:
      patch.setattr(pixels, 'to_float', to_float_recorded)
      output = reconstructor(variables, image)
    padded = transforms.pad(image, (4, 4))
    assert output.indices.shape == tuple(np.floor_divide(padded.shape[:2], 4))
    assert output.num_seen == output.indices.shape
    assert output.finite
    if size in sizes[::3]:
      images, indices = _forward(model, variables, padded[None])
      np.testing.assert_array_equal(output.indices, indices[0])
      expected = images[0, : size[0], : size[1]].astype(int)
      assert np.abs(output.image - expected).max() <= 1
  # Each bucket for sizes within it, and for the size that fills it.
  assert traced == [(1, 24, 48, 3)] * 2 + [(1, 32, 48, 3)] * 2


@pytest.mark.parametrize(
    'build', [_tiled, pytest.param(_build, marks=pytest.mark.slow)]
)
def test_an_image_of_one_tile_is_the_forward_pass(build):
  model = build()
  variables = _variables(model)
  image = _image(16, 24)
  output = _reconstructor(model)(variables, image)
  images, indices = _forward(model, variables, image[None])
  np.testing.assert_array_equal(output.image, images[0])
  np.testing.assert_array_equal(output.indices, indices[0])


@pytest.mark.parametrize(
    'build', [_tiled, pytest.param(_build, marks=pytest.mark.slow)]
)
def test_tiles_are_coded_by_themselves_and_stay_where_they_are(build):
  model = build()
  variables = _variables(model)
  image = _image(3 * 16 - 5, 2 * 24 - 7)
  padded = transforms.pad(image, (16, 24))
  output = _reconstructor(model)(variables, image)
  assert output.indices.shape == (3 * 4, 2 * 6)
  for row in range(3):
    for column in range(2):
      tile = np.s_[16 * row:16 * row + 16, 24 * column:24 * column + 24]
      images, indices = _forward(model, variables, padded[tile][None])
      actual = output.image[tile]
      expected = images[0][: actual.shape[0], : actual.shape[1]]
      # Another batch size may round otherwise.
      assert np.abs(actual.astype(int) - expected).max() <= 1
      cell = np.s_[4 * row:4 * row + 4, 6 * column:6 * column + 6]
      np.testing.assert_array_equal(output.indices[cell], indices[0])


@pytest.mark.slow
def test_indices_may_have_several_in_a_place():
  model = _build(quantizer__name='residual_fsq')
  output = _reconstructor(model)(_variables(model), _image(17, 25))
  assert output.indices.shape == (8, 12, 2)


def test_only_models_of_any_grid_have_a_stride():
  assert autoencoder.stride_of(_conv()) == 4
  assert autoencoder.stride_of(_build()) is None
  mixed = _conv().clone(decoder=_build().decoder)
  assert autoencoder.stride_of(mixed) is None
  statistics = models.LatentStatistics(grid_size=(4, 6), width=256)
  assert autoencoder.stride_of(_conv().clone(statistics=statistics)) is None


def test_what_is_not_finite_is_said():
  model = _tiled()
  variables = _variables(model)
  reconstructor = _reconstructor(model)
  image = _image(40, 10)
  assert reconstructor(variables, image).finite
  bias = variables['params']['decoder']['_Up_0']['Conv_0']['bias']
  bias[0] = np.inf
  assert not reconstructor(variables, image).finite


@pytest.mark.parametrize('build', [_tiled, lambda: _without_norm(4)])
def test_activations_stay_sharded(build):
  model = build()
  mesh = partitioning.create_mesh({'data': 2, 'fsdp': 4})
  images = jax.device_put(
      np.zeros((8, 16, 24, 3), np.uint8), partitioning.replicated(mesh)
  )
  lowered = jax.jit(
      lambda *arguments: native_size.reconstruct(model, *arguments)
  ).lower(_variables(model), images)
  assert lowered.as_text().count('sharding_constraint') >= 3


def test_what_is_no_image_is_refused():
  reconstructor = _reconstructor(_tiled())
  for image, message in (
      (np.zeros((4, 4), np.uint8), r'not \[4, 4\] uint8'),
      (np.zeros((4, 4, 1), np.uint8), r'not \[4, 4, 1\] uint8'),
      (np.zeros((4, 4, 3)), r'not \[4, 4, 3\] float64'),
      (np.zeros((4, 0, 3), np.uint8), r'\[4, 0, 3\] has no pixel'),
  ):
    with pytest.raises(ValueError, match=message):
      reconstructor({}, image)
