"""Output heads: normalization, losses against NumPy, sampling, chunks."""

import functools
import math

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.generators import draws
from fsq_jax.generators import embeddings
from fsq_jax.generators import flat_heads
from fsq_jax.generators import heads
from fsq_jax.generators import level_heads
from fsq_jax.generators import vocabulary

_VOCABULARY = vocabulary.from_levels((3, 2, 4))
_WIDTH = 8


class _Tied(nn.Module):
  """A tied head with its embedding table."""

  vocabulary: vocabulary.Vocabulary
  width: int
  dtype: jnp.dtype

  def setup(self):
    self.embedding = embeddings.TableEmbedding(self.vocabulary, self.width)
    self.head = flat_heads.TiedFlat(
        self.vocabulary, self.width, self.dtype, embedding=self.embedding
    )

  def cross_entropy(self, *args):
    return self.head.cross_entropy(*args)

  def sample(self, *args, **kwargs):
    return self.head.sample(*args, **kwargs)

  def all_log_probabilities(self, *args):
    return self.head.all_log_probabilities(*args)


_HEADS = {
    'levels_autoregressive': level_heads.AutoregressiveLevels,
    'levels_independent': level_heads.IndependentLevels,
    'flat': flat_heads.Flat,
    'flat_tied': _Tied,
}


def _build(name, draw_variables, v=_VOCABULARY, **kwargs):
  head = _HEADS[name](v, _WIDTH, jnp.float32, **kwargs)

  class _Init(nn.Module):  # Initializes by a method other than __call__.

    @nn.compact
    def __call__(self, *args):
      return head.clone(parent=self, name='head').cross_entropy(*args)

  inputs = _features(1), np.zeros((2, 3), np.int32)
  variables = draw_variables(_Init(), *inputs)
  return head, {'params': variables['params']['head']}


def _features(seed, shape=(2, 3)):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(*shape, _WIDTH)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize('name', _HEADS)
def test_loss_and_samples_are_of_one_normalized_distribution(
    name, draw_variables
):
  head, variables = _build(name, draw_variables)
  features = np.broadcast_to(_features(0, (1, 1)), (2, 3000, _WIDTH))
  keys = jax.random.split(jax.random.key(0), (2, 3000))

  @jax.jit
  def compute(variables, features, keys):
    apply = functools.partial(head.apply, variables)
    tokens, log_probs = apply(
        features, keys, draw=draws.Draw(), method='sample'
    )
    losses = apply(features, tokens, 0.1, method='cross_entropy')
    every = apply(features[:1, :1], method='all_log_probabilities')
    return tokens, log_probs, losses, every[0, 0]

  tokens, log_probs, losses, every = compute(variables, features, keys)
  every = np.float64(every)
  np.testing.assert_allclose(np.exp(every).sum(), 1, atol=1e-5)
  assert np.exp(every).std() > 0.005
  # Teacher-forced log-probability = log-probability while sampling = table.
  np.testing.assert_allclose(-losses.nll, log_probs, atol=1e-5)
  np.testing.assert_allclose(log_probs, every[np.asarray(tokens)], atol=1e-5)
  frequencies = np.bincount(np.ravel(tokens), minlength=24) / 6000
  np.testing.assert_allclose(frequencies, np.exp(every), atol=0.02)
  # Label smoothing, by the definition.
  if name.startswith('levels'):
    table = every.reshape(3, 2, 4)
    expected = 0.0
    index = np.unravel_index(int(tokens[0, 0]), (3, 2, 4))
    for i in range(3):
      marginal = np.log(np.exp(table).sum(tuple(range(i + 1, 3))))
      conditional = marginal[index[:i]]
      conditional = conditional - np.log(np.exp(conditional).sum())
      target = np.full(len(conditional), 0.1 / len(conditional))
      target[index[i]] += 0.9
      expected -= (target * conditional).sum()
  else:
    target = np.full(24, 0.1 / 24)
    target[int(tokens[0, 0])] += 0.9
    expected = -(target * every).sum()
  np.testing.assert_allclose(losses.smoothed[0, 0], expected, rtol=1e-4)


@pytest.mark.parametrize('name', _HEADS)
def test_all_1000_probabilities_sum_to_1(name, draw_variables):
  head, variables = _build(
      name, draw_variables, vocabulary.from_levels((8, 5, 5, 5))
  )

  @jax.jit
  def compute(variables, features):
    apply = functools.partial(head.apply, variables)
    every = apply(features[:, :1], method='all_log_probabilities')
    losses = apply(features, jnp.arange(1000)[None], method='cross_entropy')
    return every[0, 0], losses.nll[0]

  features = np.broadcast_to(_features(0, (1, 1)), (1, 1000, _WIDTH))
  every, nll = compute(variables, features)
  np.testing.assert_allclose(np.exp(np.float64(every)).sum(), 1, atol=1e-5)
  np.testing.assert_allclose(-nll, every, atol=1e-5)


def test_independent_levels_are_a_product_and_autoregressive_ones_are_not(
    draw_variables
):
  tables = {}
  for name in ('levels_autoregressive', 'levels_independent'):
    head, variables = _build(name, draw_variables)
    every = jax.jit(
        functools.partial(head.apply, method='all_log_probabilities')
    )(variables, _features(0))
    table = np.exp(np.float64(every))[0, 0].reshape(3, 8)
    product = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
    tables[name] = np.abs(table - product).max()
  assert tables['levels_independent'] < 1e-6
  assert tables['levels_autoregressive'] > 1e-3


@pytest.mark.parametrize(
    'name', ['levels_autoregressive', 'levels_independent', 'flat']
)
def test_first_loss_is_that_of_uniform_tokens(name):
  head = _HEADS[name](_VOCABULARY, _WIDTH, jnp.float32)
  features, tokens = _features(0), np.arange(6).reshape(2, 3)

  @jax.jit
  def compute(key):
    return head.init_with_output(key, features, tokens, method='cross_entropy')

  losses, _ = compute(jax.random.key(0))
  np.testing.assert_allclose(losses.nll, math.log(24), rtol=1e-6)


@pytest.mark.parametrize('name', ['levels_autoregressive', 'flat'])
def test_guidance_joins_the_logits_of_both_branches(name, draw_variables):
  head, variables = _build(name, draw_variables)
  c, u = _features(0), _features(1)
  keys = jax.random.split(jax.random.key(0), (2, 3))

  @jax.jit
  def compute(variables, c, u, scale):
    return head.apply(
        variables, c, keys, draw=draws.Draw(temperature=0.0),
        null_features=u, scale=scale, method='sample',
    )

  every = functools.partial(
      jax.jit(functools.partial(head.apply, method='all_log_probabilities')),
      variables,
  )
  # s = 0 is the unconditional branch, s = 1 the conditional one.
  for scale, x in ((0.0, u), (1.0, c)):
    tokens, log_probs = compute(variables, c, u, scale)
    expected = np.take_along_axis(
        np.asarray(every(x)), np.asarray(tokens)[..., None], -1
    )
    np.testing.assert_allclose(log_probs, expected[..., 0], atol=1e-5)
  if name == 'flat':
    joined = 3 * np.asarray(every(c)) - 2 * np.asarray(every(u))
    tokens, log_probs = compute(variables, c, u, 3.0)
    np.testing.assert_array_equal(tokens, joined.argmax(-1))
    joined -= np.log(np.exp(joined).sum(-1, keepdims=True))
    np.testing.assert_allclose(log_probs, joined.max(-1), atol=1e-4)


def test_temperature_0_takes_the_largest(draw_variables):
  """Of K codes with a flat head, level by level with level heads."""
  keys = jax.random.split(jax.random.key(0), (2, 3))
  for name in ('levels_autoregressive', 'flat'):
    head, variables = _build(name, draw_variables)

    @jax.jit
    def compute(variables, features, head=head):
      tokens, _ = head.apply(
          variables, features, keys, draw=draws.Draw(temperature=0.0),
          method='sample',
      )
      return tokens, head.apply(
          variables, features, method='all_log_probabilities'
      )

    tokens, every = map(np.asarray, compute(variables, _features(0)))
    expected = every.argmax(-1)
    if name == 'levels_autoregressive':
      table = np.exp(np.float64(every)).reshape(-1, 3, 2, 4)
      expected = []
      for p in table:
        index = ()
        for i in range(3):
          index += (p[index].sum(tuple(range(1, 3 - i))).argmax(),)
        expected.append(np.ravel_multi_index(index, (3, 2, 4)))
      expected = np.reshape(expected, (2, 3))
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.slow
def test_chunks_of_positions_change_nothing(draw_variables):
  """Loss, gradients and samples of three positions at a time and of all."""
  results = []
  features, tokens = _features(0, (2, 6)), np.arange(12).reshape(2, 6)
  keys = jax.random.split(jax.random.key(0), (2, 6))
  for max_logits in (2**26, 2 * 24 * 3):
    head, variables = _build('flat', draw_variables, max_logits=max_logits)

    def loss(variables, features, head=head):
      losses = head.apply(
          variables, features, tokens, 0.1, method='cross_entropy'
      )
      return jnp.sum(losses.smoothed), losses

    def compute(variables, features, loss=loss, head=head):
      return (
          jax.grad(loss, (0, 1), has_aux=True)(variables, features),
          head.apply(
              variables, features, keys, draw=draws.Draw(),
              null_features=features, method='sample',
          ),
      )

    results.append(jax.jit(compute)(variables, features))
    logits = [
        math.prod(v.aval.shape)
        for v in _all_values(
            jax.make_jaxpr(compute)(variables, features).jaxpr
        )
        if v.aval.shape[-1:] == (24,) and v.aval.dtype == jnp.float32
        and v.aval.ndim >= 3
    ]
    # No array with logits of all positions: they would be [2, 6, 24].
    assert (max(logits) == 2 * 6 * 24) == (max_logits == 2**26)
  for other in results[1:]:
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        results[0], other,
    )


def _all_values(jaxpr):
  """Yields the outputs of all equations, also of inner functions."""
  for equation in jaxpr.eqns:
    yield from equation.outvars
    for parameter in equation.params.values():
      inner = getattr(parameter, 'jaxpr', parameter)
      if hasattr(inner, 'eqns'):
        yield from _all_values(inner)


def test_logits_of_64000_codes_fit_in_chunks():
  """Abstractly, for the batch of the largest published configs."""
  v = vocabulary.from_levels((8, 8, 8, 5, 5, 5))
  head = flat_heads.Flat(v, 16, jnp.bfloat16)
  features = jax.ShapeDtypeStruct((256, 256, 16), jnp.bfloat16)
  tokens = jax.ShapeDtypeStruct((256, 256), jnp.uint16)
  variables = {'params': {'kernel': jax.ShapeDtypeStruct((16, 64000), 'f4')}}
  closed = jax.make_jaxpr(
      jax.grad(
          lambda p, x, t: jnp.mean(
              head.apply(p, x, t, 0.1, method='cross_entropy').smoothed
          )
      )
  )(variables, features, tokens)
  largest = max(math.prod(v.aval.shape) for v in _all_values(closed.jaxpr))
  assert largest <= 2**26


def test_tokens_outside_of_the_codebook_have_no_loss(draw_variables):
  for name in ('levels_autoregressive', 'flat'):
    head, variables = _build(name, draw_variables)
    tokens = np.asarray([[-1, 24, 23], [0, 1, 2]])
    losses = jax.jit(functools.partial(head.apply, method='cross_entropy'))(
        variables, _features(0), tokens
    )
    expected = [[True, True, False], [False] * 3]
    np.testing.assert_array_equal(np.isnan(losses.nll), expected)


def test_level_heads_need_levels():
  head = level_heads.IndependentLevels(
      vocabulary.Vocabulary(codebook_size=4), _WIDTH, jnp.float32
  )
  with pytest.raises(ValueError, match='needs tokens with levels'):
    jax.eval_shape(
        functools.partial(head.init, method='cross_entropy'),
        jax.random.key(0), _features(0), np.zeros((2, 3), np.int32),
    )


def test_closed_form_of_label_smoothing_at_large_logits():
  logits = jnp.asarray([[300.0, -200.0, 0.0, 10.0]])
  losses = heads.softmax_cross_entropy(logits, jnp.asarray([1]), 0.2)
  log_probs = np.asarray([0.0, -500.0, -300.0, -290.0])
  np.testing.assert_allclose(losses.nll, [500.0])
  np.testing.assert_allclose(
      losses.smoothed, [0.8 * 500 - 0.2 * log_probs.mean()], rtol=1e-6
  )
