"""SimVQ: the reference's numbers, the worked example, the frozen codebook."""

import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import quantizers

_GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'testdata' / 'simvq.npz')
_CASES = [
    ('l20_legacy0', 'euclidean', 'standard'),
    ('l20_legacy1', 'euclidean', 'legacy'),
    ('l21_legacy0', 'cosine', 'standard'),
    ('l21_legacy1', 'cosine', 'legacy'),
]


def _build(**fields):
  fields = {'codebook_size': 16, 'code_dim': 4, **fields}
  return quantizers.SimVQ(**fields)


def _init(quantizer):
  z = jnp.zeros((1, quantizer.code_dim))
  return jax.jit(quantizer.init)(jax.random.key(1), z)


def _variables(entries, kernel, bias, **params):
  """Returns variables; kernels are [inputs, outputs]."""
  linear = {'kernel': jnp.asarray(kernel), 'bias': jnp.asarray(bias)}
  return {
      'params': {'projected_codebook': {'projection': linear}, **params},
      'codebook': {'projected_codebook': {'entries': jnp.asarray(entries)}},
  }


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _in_numpy(metric, weighting, shape):
  """Returns values and gradients in float64, under the reference's keys."""
  K, d = shape
  entries, kernel, bias = _normal(0, K, d), _normal(1, d, d), _normal(2, d)
  z = _normal(3, 3, 11, d)
  codes = np.float64(entries) @ np.float64(kernel) + bias
  x, table = np.float64(z), codes
  if metric == 'cosine':
    x, table = _unit(x), _unit(codes)
  indices = np.square(x[..., None, :] - table).sum(-1).argmin(-1)
  error = x - table[indices]
  of_z, of_codes = (0.25, 1) if weighting == 'standard' else (1, 0.25)
  grad_x = of_z * 2 * error / error.size + np.arange(1, d + 1)
  grad_table = np.zeros((K, d))
  np.add.at(grad_table, indices, -of_codes * 2 * error / error.size)

  def through_unit(gradient, raw, unit):
    if metric == 'euclidean':
      return gradient
    inner = (gradient * unit).sum(-1, keepdims=True)
    return (gradient - inner * unit) / np.linalg.norm(raw, axis=-1)[..., None]

  grad_codes = through_unit(grad_table, codes, table)
  return {
      'params/embedding.weight': entries,
      'params/embedding_proj.weight': kernel.T,
      'params/embedding_proj.bias': bias,
      'params/z_proj.weight': np.eye(d, dtype=np.float32),
      'params/z_proj.bias': np.zeros(d, np.float32),
      'z': z,
      'zhat': table[indices],
      'indices': indices,
      'loss': (of_z + of_codes) * np.square(error).mean(),
      'grad_z': through_unit(grad_x, np.float64(z), x),
      'grad_embedding_proj_weight': (np.float64(entries).T @ grad_codes).T,
  }


def _from_file(name):
  return {
      key.removeprefix(f'{name}/'): array
      for key, array in _GOLDEN.items()
      if key.startswith(f'{name}/')
  }


@pytest.mark.parametrize(('source', 'input_projection'), [
    ('file', 'none'),
    pytest.param('file', 'linear', marks=pytest.mark.slow),
    pytest.param('numpy', 'linear', marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize(('name', 'metric', 'weighting'), _CASES)
def test_equals_the_reference(
    name, metric, weighting, source, input_projection
):
  if source == 'file':
    golden = _from_file(name)
  else:
    golden = _in_numpy(metric, weighting, (21, 5))
  K, d = golden['params/embedding.weight'].shape
  quantizer = _build(
      codebook_size=K,
      code_dim=d,
      metric=metric,
      weighting=weighting,
      input_projection=input_projection,
  )
  params = {}
  if input_projection == 'linear':  # The reference's is the identity.
    params['latent_projection'] = {
        'kernel': golden['params/z_proj.weight'].T,
        'bias': golden['params/z_proj.bias'],
    }
  variables = _variables(
      golden['params/embedding.weight'],
      golden['params/embedding_proj.weight'].T,
      golden['params/embedding_proj.bias'],
      **params,
  )

  @jax.jit
  def gradients(params, z):
    def objective(params, z):
      out = quantizer.apply({**variables, 'params': params}, z, train=True)
      weights = jnp.arange(1.0, d + 1)
      return out.loss + jnp.sum(out.z_q * weights), out

    return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, z)

  (of_params, of_z), out = gradients(variables['params'], golden['z'])
  np.testing.assert_array_equal(out.indices, golden['indices'])
  np.testing.assert_allclose(out.z_q, golden['zhat'], atol=5e-7)
  np.testing.assert_allclose(out.loss, golden['loss'], rtol=1e-6)
  np.testing.assert_allclose(of_z, golden['grad_z'], rtol=1e-5, atol=1e-5)
  # The reference's z_q passes no gradient to the codes; nor does ours.
  np.testing.assert_allclose(
      of_params['projected_codebook']['projection']['kernel'].T,
      golden['grad_embedding_proj_weight'],
      rtol=1e-4,
      atol=1e-7,
  )


def test_gives_the_worked_example():
  quantizer = _build(codebook_size=3, code_dim=2)
  entries = jnp.float32([[1, 0], [0, 1], [-1, -1]])
  variables = _variables(
      entries, jnp.float32([[2, 0], [1, 1]]), jnp.zeros(2)
  )
  z = jnp.float32([[1.4, 1.3]])
  out = jax.jit(quantizer.apply)(variables, z)
  np.testing.assert_array_equal(out.indices, [1])
  np.testing.assert_array_equal(out.z_q, [[1, 1]])
  np.testing.assert_allclose(out.loss, 0.15625, rtol=1e-6)

  def loss(variables, z):
    return quantizer.apply(variables, z).loss

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
  of_variables, of_z = gradient(variables, z)
  of_projection = of_variables['params']['projected_codebook']['projection']
  np.testing.assert_allclose(
      of_projection['kernel'], [[0, 0], [-0.4, -0.3]], atol=1e-6
  )
  np.testing.assert_allclose(of_z, [[0.1, 0.075]], rtol=1e-5)
  # Indices decode to projected entries.
  apply = jax.jit(quantizer.apply, static_argnames='method')
  codes = apply(variables, jnp.arange(3), method='indices_to_codes')
  np.testing.assert_array_equal(codes, [[2, 0], [1, 1], [-3, -1]])
  assert np.any(codes != entries)


@pytest.mark.slow
@pytest.mark.parametrize(
    'metric', [pytest.param('euclidean', marks=pytest.mark.slow), 'cosine']
)
def test_equals_numpy_with_an_input_projection(metric):
  quantizer = _build(metric=metric, input_projection='linear')
  kernel, bias = _normal(0, 4, 4), _normal(1, 4)
  latent_kernel, latent_bias = _normal(2, 4, 4), _normal(3, 4)
  entries, z = _normal(4, 16, 4), _normal(5, 3, 7, 4)
  variables = _variables(
      entries,
      kernel,
      bias,
      latent_projection={'kernel': latent_kernel, 'bias': latent_bias},
  )
  out = jax.jit(quantizer.apply)(variables, z)
  x = np.float64(z) @ latent_kernel + latent_bias
  codes = np.float64(entries) @ kernel + bias
  if metric == 'cosine':
    x, codes = _unit(x), _unit(codes)
  distances = np.square(x[..., None, :] - codes).sum(-1)
  indices = distances.argmin(-1)
  np.testing.assert_array_equal(out.indices, indices)
  np.testing.assert_allclose(out.z_q, codes[indices], rtol=1e-4, atol=1e-6)
  loss = 1.25 * distances.min(-1).mean() / 4
  np.testing.assert_allclose(out.loss, loss, rtol=1e-5)
  # Codes are already behind the projection of the latents.
  np.testing.assert_array_equal(
      quantizer.apply(variables, out.z_q, method='codes_to_indices'), indices
  )


@pytest.mark.slow
def test_input_projection_starts_as_the_identity():
  without, with_it = _build(), _build(input_projection='linear')
  z = _normal(0, 50, 4)
  variables = _init(without)
  identity = _init(with_it)['params']['latent_projection']
  np.testing.assert_array_equal(identity['kernel'], np.eye(4))
  variables['params']['latent_projection'] = identity
  np.testing.assert_array_equal(
      jax.jit(with_it.apply)(variables, z).indices,
      jax.jit(without.apply)(variables, z).indices,
  )


def test_entries_start_with_variance_one_over_the_dimensions():
  variables = _init(_build(codebook_size=4096, code_dim=16))
  entries = variables['codebook']['projected_codebook']['entries']
  np.testing.assert_allclose(np.var(entries), 1 / 16, rtol=0.02)
  np.testing.assert_allclose(np.mean(entries), 0, atol=0.005)


@pytest.mark.slow
def test_training_moves_every_code_but_never_the_entries():
  quantizer = _build()
  variables = _init(quantizer)
  assert set(variables) == {'params', 'codebook'}
  z = jnp.full((8, 4), 5.0) + _normal(0, 8, 4)  # All choose few codes.

  def loss(params):
    out, changed = quantizer.apply(
        {**variables, 'params': params}, z, train=True, mutable=['codebook']
    )
    return out.loss, (out.indices, changed)

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  gradients, (indices, changed) = gradient(variables['params'])
  jax.tree.map(
      np.testing.assert_array_equal, changed['codebook'], variables['codebook']
  )
  assert len(np.unique(indices)) < 8
  params = jax.tree.map(lambda p, g: p - g, variables['params'], gradients)

  @jax.jit
  def codes(params):
    return quantizer.apply(
        {**variables, 'params': params},
        jnp.arange(16),
        method='indices_to_codes',
    )

  assert np.all(np.any(codes(params) != codes(variables['params']), axis=-1))


def test_variables_of_another_size_are_refused():
  variables = _init(_build(codebook_size=24))
  z = _normal(0, 20, 4)
  with pytest.raises(ValueError, match=r'\(24, 4\), .* needs \(16, 4\)'):
    _build(codebook_size=16).apply(variables, z)


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'weighting': 'old'}, "'old'; known: .'legacy', 'standard'"),
        ({'input_projection': True}, "True; known: .'linear', 'none'"),
        ({'code_dim': None}, 'code_dim is None; use an integer, 1 or more'),
    ],
)
def test_wrong_fields_are_refused_by_name(fields, match):
  with pytest.raises(ValueError, match=match):
    _build(**fields)
