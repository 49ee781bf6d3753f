"""Optimizer and schedule against NumPy; frozen parameters stay as they are."""

import chex
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from fsq_jax.runtime import parameter_paths
from fsq_jax.train import optim

_CONFIG = {
    'name': 'adamw',
    'learning_rate': 1e-2,
    'end_learning_rate': 1e-3,
    'warmup_steps': 2,
    'b1': 0.9,
    'b2': 0.99,
    'eps': 1e-8,
    'weight_decay': 0.1,
    'clip_norm': 1.0,
    'learning_rate_factors': (),
}
_NUM_STEPS = 10
_OPTIMIZERS = ('adamw', 'muon')

every_optimizer = pytest.mark.parametrize('name', _OPTIMIZERS)


def _params():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
      'encoder': {
          'blocks': {'kernel': normal(2, 3, 4), 'bias': normal(2, 4)},
          'norm': {'scale': normal(4)},
          'positions': {'embedding': normal(2, 4)},
      },
      'decoder': {'dense': {'kernel': normal(4, 3), 'bias': normal(3)}},
  }


def _gradients(step):
  """Gradients of a global norm that is above 1 at even steps, else below."""
  rng = np.random.default_rng(step + 1)
  scale = 0.01 if step % 2 else 3.0
  return jax.tree.map(
      lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32),
      _params(),
  )


def _train(config, num_updates=3):
  """Returns the parameters after updates by `_gradients`, and the state."""
  optimizer = optim.build_optimizer(config, _NUM_STEPS)

  @jax.jit
  def step(params, state, gradients):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  params = _params()
  state = jax.jit(optimizer.init)(params)
  for i in range(num_updates):
    params, state = step(params, state, _gradients(i))
  return params, state


def _schedule(config, step):
  warmup = config['warmup_steps']
  peak, end = config['learning_rate'], config['end_learning_rate']
  if step < warmup:
    return peak * (step + 1) / warmup
  progress = (step - warmup) / (_NUM_STEPS - warmup)
  return end + (peak - end) * (1 + np.cos(np.pi * progress)) / 2


def _expected(config, trained, num_updates=3):
  """AdamW of Loshchilov and Hutter in float64, as flat dicts of arrays."""
  params = {k: np.float64(v) for k, v in _flat(_params()).items()}
  first = dict.fromkeys(trained, 0.0)
  second = dict.fromkeys(trained, 0.0)
  b1, b2 = config['b1'], config['b2']
  for i in range(num_updates):
    gradients = {k: np.float64(_flat(_gradients(i))[k]) for k in trained}
    norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
    clip = config['clip_norm']
    scale = min(1, clip / norm) if clip else 1
    for k in trained:
      g = gradients[k] * scale
      first[k] = b1 * first[k] + (1 - b1) * g
      second[k] = b2 * second[k] + (1 - b2) * g**2
      m = first[k] / (1 - b1 ** (i + 1))
      v = second[k] / (1 - b2 ** (i + 1))
      update = m / (np.sqrt(v) + config['eps'])
      if k.endswith('kernel'):
        update += config['weight_decay'] * params[k]
      params[k] -= _schedule(config, i) * update
  return params


def _flat(tree):
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): x
      for path, x in leaves
  }


@pytest.mark.parametrize(
    ('step', 'expected'),
    [
        (0, 2e-5), (49, 1e-3), (99, 2e-3), (100, 2e-3), (850, 1.1e-3),
        (1600, 2e-4), (5000, 2e-4),
    ],
)  # fmt: skip
def test_schedule_has_the_values_of_its_closed_form(step, expected):
  schedule = optim.warmup_cosine(2e-3, 2e-4, warmup_steps=100, num_steps=1600)
  rate = jax.jit(schedule)(step)
  assert rate.dtype == jnp.float32
  np.testing.assert_allclose(rate, expected, rtol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
  schedule = optim.warmup_cosine(2e-3, 2e-4, warmup_steps=0, num_steps=4)
  rates = jax.jit(jax.vmap(schedule))(jnp.arange(5))
  cosine = np.cos(np.pi * np.arange(5) / 4)
  np.testing.assert_allclose(rates, 1.1e-3 + 0.9e-3 * cosine, rtol=1e-6)


def test_builder_reads_the_schedule_of_the_config():
  schedule = jax.jit(optim.build_schedule(_CONFIG, _NUM_STEPS))
  for step in range(_NUM_STEPS + 1):
    np.testing.assert_allclose(
        schedule(step), _schedule(_CONFIG, step), rtol=1e-6
    )


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'clip_norm': 0.0},
        {'warmup_steps': 0},
        {'weight_decay': 0.0},
    ],
    ids=['default', 'unclipped', 'no_warmup', 'no_decay'],
)
def test_updates_are_those_of_adamw(changes):
  config = _CONFIG | changes
  params, _ = _train(config)
  expected = _expected(config, list(_flat(params)))
  for path, x in _flat(params).items():
    np.testing.assert_allclose(x, expected[path], rtol=1e-5, err_msg=path)


@pytest.mark.slow
def test_muon_orthogonalises_the_kernel_of_each_block():
  config = _CONFIG | {'name': 'muon', 'weight_decay': 0.0}
  before = _params()['encoder']['blocks']['kernel']
  after = _train(config, num_updates=1)[0]['encoder']['blocks']['kernel']
  gradients = np.float64(_gradients(0)['encoder']['blocks']['kernel'])
  for update, gradient in zip(before - after, gradients, strict=True):
    u, _, v = np.linalg.svd(gradient, full_matrices=False)
    in_their_axes = u.T @ update @ v.T / _schedule(config, 0)
    # Of the root mean square of AdamW's update, about 0.2; five iterations
    # bring the singular values of most matrices to 0.68 ... 1.14.
    values = np.diag(in_their_axes) / (0.2 * np.sqrt(4))
    assert np.all(values > 0.6)
    assert np.all(values < 1.2)
    np.testing.assert_allclose(in_their_axes, np.diag(values * 0.4), atol=1e-3)


def test_muon_is_adamw_for_the_rest():
  muon, _ = _train(_CONFIG | {'name': 'muon'})
  adamw, _ = _train(_CONFIG)
  for path, x in _flat(muon).items():
    if path == 'encoder/blocks/kernel':
      assert np.all(np.abs(x - _flat(adamw)[path]) > 1e-6)
    else:
      np.testing.assert_allclose(x, _flat(adamw)[path], rtol=1e-6)


@every_optimizer
def test_decay_moves_kernels_only(name):
  config = _CONFIG | {'name': name}
  decayed, _ = _train(config)
  plain, _ = _train(config | {'weight_decay': 0.0})
  moved = {
      path
      for path, x in _flat(decayed).items()
      if np.any(x != _flat(plain)[path])
  }
  assert moved == {'encoder/blocks/kernel', 'decoder/dense/kernel'}


@pytest.mark.slow
@every_optimizer
def test_first_factor_that_matches_multiplies_the_learning_rate(name):
  factors = (('encoder/norm/.*', 0.5), ('encoder/.*', 0.1))
  config = _CONFIG | {'name': name}
  plain, _ = _train(config, num_updates=1)
  scaled, _ = _train(config | {'learning_rate_factors': factors}, num_updates=1)
  before = _flat(_params())
  for path, x in _flat(scaled).items():
    factor = {'encoder/norm': 0.5, 'decoder/dens': 1.0}.get(path[:12], 0.1)
    expected = factor * (_flat(plain)[path] - before[path])
    np.testing.assert_allclose(x - before[path], expected, atol=1e-6)


def test_split_takes_the_paths_that_match_as_a_whole():
  params = {**_params(), 'decoder2': {'bias_of_rows': jnp.zeros(2)}}
  patterns = ['.*/bias', 'encoder/norm/.*']
  trained, frozen = parameter_paths.split_frozen(params, patterns)
  assert set(_flat(frozen)) == {
      'encoder/blocks/bias', 'decoder/dense/bias', 'encoder/norm/scale'
  }
  assert set(_flat(trained)) == set(_flat(params)) - set(_flat(frozen))
  merged = parameter_paths.merge_frozen(trained, frozen)
  chex.assert_trees_all_equal(merged, params)


def test_nothing_frozen_is_an_empty_tree():
  trained, frozen = parameter_paths.split_frozen(_params(), ())
  assert frozen == {}
  chex.assert_trees_all_equal(trained, _params())
  chex.assert_trees_all_equal(
      parameter_paths.merge_frozen(trained, {}), _params()
  )


def test_everything_frozen_is_refused():
  with pytest.raises(ValueError, match='leaves no parameter to train'):
    parameter_paths.split_frozen(_params(), ('.*',))


_wrong_pattern = pytest.mark.parametrize(
    'pattern', ['encoder', 'dense/.*', 'encodr/.*']
)


@_wrong_pattern
def test_pattern_that_matches_nothing_is_refused(pattern):
  with pytest.raises(ValueError, match='matches no parameter') as error:
    parameter_paths.split_frozen(_params(), ('encoder/.*', pattern))
  assert repr(pattern) in str(error.value)
  assert 'encoder/blocks/kernel' in str(error.value)


@_wrong_pattern
def test_factor_that_matches_nothing_is_refused(pattern):
  factors = (('encoder/.*', 0.1), (pattern, 0.1))
  with pytest.raises(ValueError, match=r'factors has .* matches no parameter'):
    optim.build_optimizer(
        _CONFIG | {'learning_rate_factors': factors}, _NUM_STEPS
    ).init(_params())


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(ValueError, match=r"is 'sgd'; known: \['adamw', 'muon'\]"):
    optim.build_optimizer(_CONFIG | {'name': 'sgd'}, _NUM_STEPS)
