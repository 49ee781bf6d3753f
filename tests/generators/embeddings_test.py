"""Embeddings of tokens and classes against indexing in NumPy."""

import jax
import numpy as np
import pytest

from fsq_jax.generators import embeddings
from fsq_jax.generators import vocabulary


def test_levels_are_summed_with_a_row_for_masked(draw_variables):
  module = embeddings.LevelEmbedding(vocabulary.from_levels((3, 4, 2)), 5)
  tokens = np.asarray([[23, 0], [7, -1]])
  known = np.asarray([[True, False], [True, True]])
  variables = draw_variables(module, tokens, known)
  y = np.asarray(jax.jit(module.apply)(variables, tokens, known))
  table = variables['params']['embedding']
  assert table.shape == (4 + 5 + 3, 5)
  first, second, third = np.split(table, [4, 9])
  np.testing.assert_allclose(
      y[0, 0], first[2] + second[3] + third[1], rtol=1e-6
  )
  np.testing.assert_allclose(
      y[0, 1], first[3] + second[4] + third[2], rtol=1e-6
  )
  np.testing.assert_allclose(
      y[1, 0], first[0] + second[3] + third[1], rtol=1e-6
  )
  # A known token outside of the codebook is no other token.
  assert np.isnan(y[1, 1]).all()


def test_table_has_room_for_the_mask_beyond_16_bits(draw_variables):
  size = 2**16
  module = embeddings.TableEmbedding(
      vocabulary.Vocabulary(codebook_size=size), 2
  )
  tokens = np.asarray([[size - 1, size - 1, 0]], np.uint16)
  known = np.asarray([[True, False, True]])
  variables = draw_variables(module, tokens, known)
  y = np.asarray(jax.jit(module.apply)(variables, tokens, known))
  table = variables['params']['embedding']
  assert table.shape == (size + 1, 2)
  np.testing.assert_array_equal(y[0], table[[size - 1, size, 0]])


def test_labels_have_a_null_row(draw_variables):
  module = embeddings.ClassEmbedding(3, 4)
  labels = np.asarray([0, 2, -1, 3, 4])
  variables = draw_variables(module, labels)
  y = np.asarray(jax.jit(module.apply)(variables, labels))
  np.testing.assert_array_equal(
      y[:3], variables['params']['embedding'][[0, 2, 3]]
  )
  # A label of C is not the null row by accident.
  assert np.isnan(y[3:]).all()


def test_labels_outside_are_rejected_on_the_host():
  embeddings.check_labels(np.asarray([-1, 0, 2]), 3)
  with pytest.raises(ValueError, match='labels contain 3; allowed are 0 to 2'):
    embeddings.check_labels(np.asarray([0, 3]), 3)
  with pytest.raises(ValueError, match='labels contain -2'):
    embeddings.check_labels(np.asarray([-2]), 3)
