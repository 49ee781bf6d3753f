"""Tests of the conversions between pixels and floats."""

from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.models import pixels


def test_pixels_become_floats_between_minus_1_and_1():
  values = pixels.to_float(jnp.arange(256, dtype=jnp.uint8))
  assert values.dtype == jnp.float32
  np.testing.assert_allclose(values, np.linspace(-1, 1, 256), atol=1e-6)
  assert (values[0], values[255]) == (-1, 1)


def test_floats_become_the_nearest_pixels():
  levels = jnp.arange(256, dtype=jnp.uint8)
  np.testing.assert_array_equal(
      pixels.to_uint8(pixels.to_float(levels)), levels
  )
  floats = jnp.array([-2, 2, jnp.nan, 0.3 / 127.5 - 1, 0.7 / 127.5 - 1])
  np.testing.assert_array_equal(pixels.to_uint8(floats), [0, 255, 0, 0, 1])


@pytest.mark.parametrize(
    ('convert', 'dtype'),
    [(pixels.to_float, jnp.float32), (pixels.to_uint8, jnp.uint8)],
)
def test_images_of_another_dtype_are_refused(convert, dtype):
  with pytest.raises(ValueError, match=jnp.dtype(dtype).name):
    convert(jnp.zeros(3, dtype))
