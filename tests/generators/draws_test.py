"""Drawing from logits against NumPy."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.generators import draws
from fsq_jax.generators import keys

_LOGITS = np.log(np.asarray([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))


def _kept(logits):
  return np.isfinite(np.asarray(logits)).tolist()


def test_top_k_keeps_the_largest_and_ties():
  assert _kept(draws.keep_top_k(_LOGITS, 2)) == [0, 1, 0, 1, 0]
  assert _kept(draws.keep_top_k(_LOGITS, 0)) == [1] * 5
  assert _kept(draws.keep_top_k(_LOGITS, 9)) == [1] * 5
  tied = jnp.asarray([1.0, 2.0, 1.0, 0.0])
  assert _kept(draws.keep_top_k(tied, 2)) == [1, 1, 1, 0]


def test_top_p_keeps_the_nucleus():
  # Sorted: 0.4, 0.3, 0.15, 0.1, 0.05; the first above the threshold stays.
  for p, expected in (
      (0.01, [0, 1, 0, 0, 0]),
      (0.39, [0, 1, 0, 0, 0]),
      (0.41, [0, 1, 0, 1, 0]),
      (0.72, [0, 1, 0, 1, 1]),
      (0.9, [1, 1, 0, 1, 1]),
      (1.0, [1, 1, 1, 1, 1]),
  ):
    assert _kept(draws.keep_top_p(_LOGITS, p)) == expected, p


def _frequencies(rule, num=4000):
  noise = np.random.default_rng(0).gumbel(size=(num, 5)).astype(np.float32)
  logits = jnp.broadcast_to(_LOGITS, (num, 5))
  indices, log_probs = jax.jit(draws.draw_index, static_argnums=2)(
      logits, noise, rule
  )
  np.testing.assert_allclose(log_probs, _LOGITS[indices], atol=1e-5)
  return np.bincount(indices, minlength=5) / num


@pytest.mark.parametrize(
    'rule',
    [
        draws.Draw(),
        draws.Draw(temperature=0.5),
        draws.Draw(temperature=2.0, top_k=3),
        draws.Draw(top_p=0.72),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(rule):
  p = np.exp(_LOGITS) ** (1 / rule.temperature)
  if rule.top_k:
    p[np.argsort(p)[: -rule.top_k]] = 0
  if rule.top_p < 1:
    p[[0, 2]] = 0
  frequencies = _frequencies(rule)
  assert ((frequencies > 0) <= (p > 0)).all()
  np.testing.assert_allclose(frequencies, p / p.sum(), atol=0.03)


def test_temperature_0_takes_the_largest():
  assert _frequencies(draws.Draw(temperature=0.0), num=8)[1] == 1


def test_large_codebooks_are_drawn_evenly():
  """Gumbel noise of bfloat16 has 128 values: all samples would be low."""
  random_keys = jax.random.split(jax.random.key(0), 16)
  noise = jax.jit(keys.gumbel, static_argnums=1)(random_keys, 64000)
  logits = jnp.zeros((16, 64000), jnp.float32)
  indices, _ = draws.draw_index(logits, noise, draws.Draw())
  assert len(np.unique(indices)) > 14
  assert 0.3 < np.mean(np.asarray(indices)) / 64000 < 0.7
  with pytest.raises(ValueError, match='cast them to float32'):
    draws.draw_index(logits.astype(jnp.bfloat16), noise, draws.Draw())


@pytest.mark.parametrize(
    'options', [{'temperature': -1.0}, {'top_k': -1}, {'top_p': 0.0}]
)
def test_wrong_options_are_rejected(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    draws.Draw(**options)
