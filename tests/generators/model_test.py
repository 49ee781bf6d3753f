"""The token model against NumPy, leaks of hidden tokens, key-value cache."""

import functools
import itertools
import math

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.generators import architecture
from fsq_jax.generators import model as models
from fsq_jax.generators import vocabulary

# No two sizes are equal, so that no two axes can be mixed up.
_SIZES = {'depth': 2, 'width': 8, 'num_heads': 2, 'mlp_dim': 12}
_LEVELS = (3, 2)
_GRID = (2, 3)
_ROPE_PREFIX = {'positions': 'rope', 'conditioning': 'prefix'}
_BERT_ADALN = {
    'mlp': 'gelu', 'norm': 'layer', 'use_bias': True, 'qk_norm': False,
    'conditioning': 'adaln',
}  # fmt: skip


def _model(causal, options):
  return models.TokenModel(
      architecture.Architecture(causal=causal, **_SIZES, **options),
      vocabulary.from_levels(_LEVELS), _GRID, 4, 'levels',
      'levels_autoregressive',
  )


_MODELS = {
    'masked, rope, prefix': _model(False, _ROPE_PREFIX),
    'masked, bert, adaln': _model(False, _BERT_ADALN),
    'causal, rope, prefix': _model(True, _ROPE_PREFIX),
    'causal, bert, adaln': _model(True, _BERT_ADALN),
}


def _batch(model):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 6, (5, 6))
  known = None if model.architecture.causal else rng.uniform(size=(5, 6)) < 0.5
  return tokens, np.asarray([2, -1, 0, 3, 1]), known


@functools.cache
def _function(model):
  return jax.jit(functools.partial(model.apply, method='log_probabilities'))


def _dense(x, p):
  return x @ p['kernel'] + p.get('bias', 0)


def _gelu(x):
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return 0.5 * x * (1 + np.tanh(inner))


def _silu(x):
  return x / (1 + np.exp(-x))


def _rms(x, scale=1.0):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def _norm(x, p, a, modulation):
  p = p.get('norm', {})
  if a.norm == 'layer':
    x = x - x.mean(-1, keepdims=True)
  x = _rms(x, p.get('scale', 1.0)) + p.get('bias', 0)
  if modulation is not None:
    x = x * (1 + modulation[1][:, None]) + modulation[0][:, None]
  return x


def _softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def _rotate(x, place):
  """Rotates [N, d] as complex numbers; the first half by row."""
  pairs = x[:, 0::2] + 1j * x[:, 1::2]
  half = pairs.shape[1] // 2
  frequencies = 10000.0 ** (-np.arange(half) / half)
  angles = np.concatenate(
      [place[:, :1] * frequencies, place[:, 1:] * frequencies], -1
  )
  turned = pairs * np.exp(1j * angles)
  return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def _attention(x, p, a, place):
  """Example by example, head by head."""
  d = a.head_dim
  q, k, v = np.split(_dense(x, p['qkv']), 3, axis=-1)
  mixed = np.zeros_like(x)
  for b, head in itertools.product(range(len(x)), range(a.num_heads)):
    part = slice(head * d, (head + 1) * d)
    queries, keys = q[b][:, part], k[b][:, part]
    if a.qk_norm:
      queries = _rms(queries, p['query_norm']['scale'])
      keys = _rms(keys, p['key_norm']['scale'])
    if place is not None:
      queries, keys = _rotate(queries, place), _rotate(keys, place)
    logits = queries @ keys.T / math.sqrt(d)
    if a.causal:
      logits[np.triu_indices(len(logits), 1)] = -np.inf
    mixed[b][:, part] = _softmax(logits) @ v[b][:, part]
  return _dense(mixed, p['out'])


def _trunk(x, p, a, condition, place):
  for i in range(a.depth):
    block = jax.tree.map(lambda leaf, i=i: leaf[i], p['blocks'])
    m, gates = [None, None], [1.0, 1.0]
    if condition is not None:
      parts = np.split(_dense(_silu(condition), block['modulation']), 6, -1)
      m = [parts[0:2], parts[3:5]]
      gates = [parts[2][:, None], parts[5][:, None]]
    y = _norm(x, block.get('attention_norm', {}), a, m[0])
    x = x + gates[0] * _attention(y, block['attention'], a, place)
    y = _norm(x, block.get('mlp_norm', {}), a, m[1])
    hidden = _dense(y, block['mlp']['in'])
    if a.mlp == 'swiglu':
      hidden = hidden * _silu(_dense(y, block['mlp']['gate']))
    else:
      hidden = _gelu(hidden)
    x = x + gates[1] * _dense(hidden, block['mlp']['out'])
  m = None
  if condition is not None:
    m = np.split(_dense(_silu(condition), p['modulation']), 2, -1)
  return _norm(x, p.get('final_norm', {}), a, m)


def _level_head(h, p):
  """Returns log p of all codes [..., K], by a loop over the level indices."""
  columns = np.cumsum([0, *_LEVELS])
  result = np.zeros((*h.shape[:-1], 6))
  for code, levels in enumerate(itertools.product(*map(range, _LEVELS))):
    context = h
    for i, level in enumerate(levels):
      y = _rms(context, p['norm']['scale']) + p['position'][i]
      y = y + _gelu(y @ p['mlp_in_kernel'][i]) @ p['mlp_out_kernel'][i]
      part = slice(columns[i], columns[i + 1])
      logits = y @ p['kernel'][:, part] + p['bias'][part]
      result[..., code] += np.log(_softmax(logits))[..., level]
      context = context + p['embedding'][columns[i] + level]
  return result


def _reference(model, variables, tokens, labels, known):
  """Returns log p of all codes at all positions, [B, N, K] float64."""
  a = model.architecture
  p = jax.tree.map(np.float64, variables['params'])
  table = p['token_embedding']['embedding']
  first, second = np.unravel_index(tokens, _LEVELS)
  if known is not None:
    first, second = np.where(known, first, 3), np.where(known, second, 2)
  x = table[first] + table[4 + second]
  if a.positions == 'learned':
    x = x + p['position_embedding']
  # The null row is the last one.
  label = p['class_embedding']['embedding'][np.where(labels < 0, 4, labels)]
  place = np.stack(np.unravel_index(np.arange(6), _GRID), -1)
  prefix, condition = label, None
  if a.conditioning == 'adaln':
    condition = label
    prefix = np.broadcast_to(p['start'], label.shape) if a.causal else None
  if prefix is not None:
    x = np.concatenate([prefix[:, None], x], 1)
    place = np.concatenate([np.zeros((1, 2)), place])
  if a.causal:
    x, place = x[:, :-1], place[:-1]
  if a.positions == 'learned':
    place = None
  h = _trunk(x, p['trunk'], a, condition, place)[:, -6:]
  return _level_head(h, p['output'])


@pytest.mark.slow
@pytest.mark.parametrize('name', _MODELS)
def test_model_is_that_of_numpy(name, draw_variables):
  model = _MODELS[name]
  batch = _batch(model)
  variables = draw_variables(model, *batch)
  log_probs = _function(model)(variables, *batch)
  assert log_probs.dtype == jnp.float32
  expected = _reference(model, variables, *batch)
  np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, atol=1e-5)


@pytest.mark.fast_variants(
    'random-masked, rope, prefix',
    'random-causal, bert, adaln',
    'zeros-causal, rope, prefix',
    'zeros-masked, bert, adaln',
)
@pytest.mark.parametrize('name', _MODELS)
@pytest.mark.parametrize('fill', ['random', 'zeros'])
def test_no_hidden_or_future_token_leaks(name, fill, draw_variables):
  model = _MODELS[name]
  tokens, labels, known = _batch(model)
  if fill == 'zeros':
    tokens = np.zeros_like(tokens)
  variables = draw_variables(model, tokens, labels, known)
  before = np.asarray(_function(model)(variables, tokens, labels, known))
  if known is not None:
    changed = np.where(known, tokens, (tokens + 3) % 6)
    after = _function(model)(variables, changed, labels, known)
    np.testing.assert_array_equal(after, before)
    seen = np.where(known, (tokens + 3) % 6, tokens)
    after = np.asarray(_function(model)(variables, seen, labels, known))
    assert (np.abs(after - before).max(-1) > 1e-4).all()
    return
  for n in range(6):
    changed = tokens.copy()
    changed[:, n:] = (changed[:, n:] + 3) % 6
    after = np.asarray(_function(model)(variables, changed, labels, known))
    np.testing.assert_array_equal(after[:, : n + 1], before[:, : n + 1])
    if n < 5:
      assert (np.abs(after - before)[:, n + 1 :].max(-1) > 1e-4).all()


def test_class_and_null_class_reach_every_position(draw_variables):
  for model in _MODELS.values():
    tokens, _, known = _batch(model)
    tokens = np.broadcast_to(tokens[:1], tokens.shape)
    known = None if known is None else np.broadcast_to(known[:1], known.shape)
    labels = np.asarray([0, 1, 2, 3, -1])
    variables = draw_variables(model, tokens, labels, known)
    log_probs = np.asarray(_function(model)(variables, tokens, labels, known))
    for a, b in itertools.combinations(log_probs, 2):
      assert (np.abs(a - b).max(-1) > 1e-5).all()


@pytest.mark.parametrize(
    'name',
    [
        'causal, rope, prefix',
        pytest.param('causal, bert, adaln', marks=pytest.mark.slow),
    ],
)
def test_steps_with_the_cache_equal_the_whole_sequence(name, draw_variables):
  model = _MODELS[name]
  tokens, labels, _ = _batch(model)
  variables = draw_variables(model, tokens, labels, None)

  @jax.jit
  def both(variables, tokens, labels):
    def take(cache, position):
      previous = jnp.take(tokens, jnp.maximum(position - 1, 0), axis=1)
      features, cache = model.apply(
          variables, previous, labels, cache, position, method='step'
      )
      return cache, features[:, 0]

    _, steps = jax.lax.scan(take, model.empty_cache(5), jnp.arange(6))
    return jnp.moveaxis(steps, 0, 1), model.apply(
        variables, tokens, labels, None, method='features'
    )

  np.testing.assert_allclose(*both(variables, tokens, labels), atol=1e-5)


def test_wrong_arguments_are_rejected():
  masked, causal = (_MODELS[f'{x}, rope, prefix'] for x in ('masked', 'causal'))
  tokens, labels = jnp.zeros((1, 6), jnp.int32), jnp.zeros(1, jnp.int32)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match='known is None'):
    jax.eval_shape(masked.init, key, tokens, labels, None)
  with pytest.raises(ValueError, match='known is given'):
    jax.eval_shape(causal.init, key, tokens, labels, tokens > 0)
  with pytest.raises(ValueError, match=r'needs \[B, 6\]'):
    jax.eval_shape(causal.init, key, tokens[:, :4], labels, None)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'head': 'softmax'}, "head is 'softmax'; known"),
        ({'head': 'flat_tied'}, "shares the embedding 'table'"),
        ({'vocabulary': vocabulary.Vocabulary(codebook_size=6)}, 'no levels'),
    ],
)
def test_parts_that_do_not_fit_are_rejected(options, message):
  with pytest.raises(ValueError, match=message):
    _MODELS['causal, rope, prefix'].clone(**options)


@pytest.mark.slow
@pytest.mark.parametrize('name', _MODELS)
def test_options_of_execution_change_no_gradient(name, draw_variables):
  """Rematerialization and the unroll factor of the scan."""
  model = _MODELS[name]
  batch = _batch(model)
  variables = draw_variables(model, *batch)

  def gradient(**options):
    changed = model.clone(
        architecture=model.architecture.__class__(**{
            **vars(model.architecture), **options
        })
    )

    def loss(variables):
      return jnp.mean(changed.apply(variables, *batch).nll)

    return jax.jit(jax.grad(loss))(variables)

  plain = gradient()
  for x in jax.tree.leaves(plain):
    assert np.isfinite(x).all()
  other = gradient(remat='dots', scan_unroll=2)
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5), plain, other
  )
