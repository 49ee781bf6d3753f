"""Vector quantization: published numbers, lookup, averages, restarts."""

import functools
import pathlib

import chex
import jax
from jax import numpy as jnp
from jax.extend import core
import numpy as np
import pytest

from fsq_jax import quantizers
from fsq_jax.quantizers import codebook as codebook_lib
from fsq_jax.quantizers import ema_codebook
from fsq_jax.quantizers import lookup

_TESTDATA = pathlib.Path(__file__).parents[1] / 'testdata'

both_metrics = pytest.mark.parametrize(
    'metric',
    [pytest.param('euclidean', marks=pytest.mark.slow), 'cosine'],
)
both_restarts = pytest.mark.parametrize('restart', ['batch', 'split'])


@functools.partial(jax.jit, static_argnums=0)
def _train(quantizer, variables, z):
  """Returns the output of a training step and the variables after it."""
  out, changed = quantizer.apply(
      variables, z, train=True, mutable=['codebook']
  )
  return out, {**variables, **changed}


def _build(**fields):
  fields = {'codebook_size': 16, 'code_dim': 4, **fields}
  return quantizers.VectorQuantizer(**fields)


def _init(quantizer):
  z = jnp.zeros((1, quantizer.code_dim))
  return jax.jit(quantizer.init)(jax.random.key(1), z)


def _state(entries, counts=None, sums=None, step=0):
  """Returns variables with the given entries [K, d]."""
  ema = ema_codebook.start(jnp.asarray(entries, jnp.float32))
  return {
      'codebook': {
          'entries': ema.entries,
          'counts': ema.counts if counts is None else jnp.asarray(counts),
          'sums': ema.sums if sums is None else jnp.asarray(sums),
          'seed': jnp.uint32(0),
          'step': jnp.int32(step),
      }
  }


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _mesh():
  axis_types = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((jax.device_count(),), ('data',), axis_types)


def _squared_distances(x, codebook):
  x, codebook = np.float64(x), np.float64(codebook)
  return np.square(x[..., None, :] - codebook).sum(-1)


def _perplexity(indices, codebook_size):
  p = np.bincount(np.ravel(indices), minlength=codebook_size) / indices.size
  return np.exp(-np.sum(p[p > 0] * np.log(p[p > 0])))


def _steps_in_numpy(codebook_size, code_dim, decay, commitment_weight):
  """Returns four steps in float64, under the keys of the reference's file."""
  rng = np.random.default_rng(0)
  embedding = _normal(1, codebook_size, code_dim)
  golden = {'init/embedding': embedding}
  counts, sums = np.zeros(codebook_size), np.float64(embedding)
  for step in range(4):
    z = rng.normal(size=(3, 17, code_dim)).astype(np.float32)
    indices = _squared_distances(z, embedding).argmin(-1)
    zhat = np.float64(embedding)[indices]
    chosen = np.eye(codebook_size)[indices.ravel()]
    rows = np.float64(z).reshape(-1, code_dim)
    counts = decay * counts + (1 - decay) * chosen.sum(0)
    sums = decay * sums + (1 - decay) * chosen.T @ rows
    total = counts.sum()
    smoothed = (counts + 1e-5) / (total + codebook_size * 1e-5) * total
    embedding = sums / smoothed[:, None]
    loss = (1 + commitment_weight) * np.square(zhat - z).mean()
    for name, value in {
        'z': z,
        'zhat': zhat,
        'indices': indices,
        'loss': loss,
        'embedding_after': embedding,
        'ema_cluster_size_after': counts,
        'ema_w_after': sums,
    }.items():
      golden[f'step{step}/{name}'] = value
  return golden


@pytest.mark.parametrize(
    ('load', 'decay', 'commitment_weight'),
    [
        (lambda **_: np.load(_TESTDATA / 'vq_ema.npz'), 0.99, 0.25),
        pytest.param(
            functools.partial(_steps_in_numpy, 21, 5), 0.8, 0.5,
            marks=pytest.mark.slow,
        ),
    ],
    ids=['file', 'numpy'],
)
def test_equals_the_steps_of_the_reference(load, decay, commitment_weight):
  fields = {'decay': decay, 'commitment_weight': commitment_weight}
  golden = load(**fields)
  entries = np.float32(golden['init/embedding'])
  K, d = entries.shape
  quantizer = _build(codebook_size=K, code_dim=d, **fields)
  # The reference starts its counts at 0 and its sums at the entries.
  variables = _state(entries, counts=np.zeros(K, np.float32), sums=entries)
  num_steps = len({key.split('/')[0] for key in golden if '/z' in key})
  for step in range(num_steps):
    expected = {
        name: golden[f'step{step}/{name}']
        for name in ('z', 'zhat', 'indices', 'loss')
    }
    out, variables = _train(quantizer, variables, expected['z'])
    np.testing.assert_array_equal(out.indices, expected['indices'])
    np.testing.assert_allclose(out.z_q, expected['zhat'], rtol=3e-6, atol=1e-6)
    # Its loss adds the codebook loss, which has no gradient.
    factor = (1 + commitment_weight) / commitment_weight
    np.testing.assert_allclose(
        factor * out.loss, expected['loss'], rtol=1e-6
    )
    for ours, theirs in [
        ('entries', 'embedding_after'),
        ('counts', 'ema_cluster_size_after'),
        ('sums', 'ema_w_after'),
    ]:
      np.testing.assert_allclose(
          variables['codebook'][ours],
          golden[f'step{step}/{theirs}'],
          rtol=2e-6,
          atol=1e-6,
      )
  assert int(variables['codebook']['step']) == num_steps > 0


def test_averages_follow_their_closed_form():
  K, steps, decay = 4, 5, 0.9
  entries = np.float32([[0, 0], [9, 9], [-9, 9], [9, -9]])
  z = np.float32([[1, 2], [3, -2], [2, 1]])  # All nearest to the first.
  quantizer = _build(codebook_size=K, code_dim=2, decay=decay)
  variables = _state(entries)
  for _ in range(steps):
    out, variables = _train(quantizer, variables, z)
    np.testing.assert_array_equal(out.indices, [0, 0, 0])
  past = decay**steps
  counts = np.full(K, past)
  sums = past * np.float64(entries)
  counts[0] += (1 - past) * 3
  sums[0] += (1 - past) * z.sum(0)
  total = counts.sum()
  smoothed = (counts + 1e-5) / (total + K * 1e-5) * total
  after = variables['codebook']
  np.testing.assert_allclose(after['counts'], counts, rtol=1e-6)
  np.testing.assert_allclose(after['sums'], sums, rtol=1e-6)
  np.testing.assert_allclose(
      after['entries'], sums / smoothed[:, None], rtol=1e-6
  )
  # By our initial state unused entries stay, but for the smoothing.
  np.testing.assert_allclose(after['entries'][1:], entries[1:], rtol=1e-4)


@pytest.mark.slow
@both_metrics
def test_the_output_is_quantized_before_the_update(metric):
  quantizer = _build(decay=0.0, metric=metric)
  variables = _init(quantizer)
  z = _normal(0, 64, 4)
  out, after = _train(quantizer, variables, z)
  expected = jax.jit(quantizer.apply)(variables, z)
  np.testing.assert_array_equal(out.indices, expected.indices)
  chex.assert_trees_all_close(out, expected, rtol=1e-6)
  z = _unit(z) if metric == 'cosine' else z
  # Without a past, entries in use become the means of their latents.
  for index in np.unique(out.indices):
    np.testing.assert_allclose(
        after['codebook']['entries'][index],
        z[out.indices == index].mean(0),
        rtol=1e-3,
        atol=1e-5,
    )


@pytest.mark.slow
def test_only_training_with_a_mutable_collection_updates():
  quantizer = _build(codebook_init='kmeans', restart='batch')
  z = _normal(0, 64, 4)
  init = functools.partial(quantizer.init, jax.random.key(0), z)
  variables = init()
  assert set(variables) == {'codebook'}  # Nothing that params' average sees.
  assert set(variables['codebook']) == {
      'entries', 'counts', 'sums', 'seed', 'step'
  }  # fmt: skip
  chex.assert_trees_all_equal(init(train=True), variables)
  for mutable in (False, ['params']):
    with pytest.raises(ValueError, match=r"with mutable=\['codebook'\] and"):
      quantizer.apply(variables, z, train=True, mutable=mutable)
  _, after = quantizer.apply(variables, z, mutable=['codebook'])
  chex.assert_trees_all_equal(after, variables)
  _, after = _train(quantizer, variables, z)
  moved = after['codebook']['entries'] - variables['codebook']['entries']
  assert np.any(moved != 0)


@pytest.mark.slow
def test_latents_with_nan_leave_the_statistics_alone():
  quantizer = _build(codebook_init='kmeans', restart='batch', decay=0.5)
  clean = _normal(0, 64, 4)
  dirty = np.concatenate([clean, np.full((8, 4), np.nan, np.float32)])
  dirty[64:, 1:] = np.inf
  variables = _init(quantizer)
  for _ in range(8):
    out, variables = _train(quantizer, variables, dirty)
    np.testing.assert_array_equal(out.indices[64:], np.full(8, -1))
    assert np.all(out.indices[:64] >= 0)
  chex.assert_tree_all_finite(variables)
  assert np.isnan(out.loss)
  # Without a single valid latent nothing can be drawn.
  _, after = _train(quantizer, _init(quantizer), dirty[64:])
  chex.assert_tree_all_finite(after)


@both_metrics
def test_finds_the_nearest_code(metric):
  quantizer = _build(metric=metric)
  variables = _init(quantizer)
  z, entries = _normal(0, 4, 25, 4), variables['codebook']['entries']
  out = jax.jit(quantizer.apply)(variables, z)
  if metric == 'cosine':
    z, entries = _unit(z), _unit(entries)
  indices = _squared_distances(z, entries).argmin(-1)
  np.testing.assert_array_equal(out.indices, indices)
  np.testing.assert_allclose(out.z_q, entries[indices], rtol=1e-6)
  error = np.square(np.float64(entries[indices]) - z).mean()
  np.testing.assert_allclose(out.loss, 0.25 * error, rtol=1e-6)


def test_equal_codes_give_the_lowest_index():
  entries = np.float32([[5, 5], [1, 0], [-1, 0], [1, 0]])
  x = jnp.float32([[2, 0], [0, 0], [-2, 0]])
  indices = lookup.nearest(x, jnp.asarray(entries))
  np.testing.assert_array_equal(indices, [1, 1, 2])


def test_distances_have_no_token_where_they_are_not_finite():
  x = jnp.float32([[1, 0], [np.inf, 0], [0, np.nan], [1e30, 0]])
  np.testing.assert_array_equal(
      lookup.nearest(x, jnp.eye(2)), [0, -1, -1, -1]
  )
  damaged = jnp.eye(2).at[1, 1].set(jnp.nan)
  np.testing.assert_array_equal(lookup.nearest(x, damaged), [-1] * 4)


def _equations(jaxpr):
  """Yields all equations of a jaxpr, including inner jaxprs."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in core.jaxprs_in_params(equation.params):
      yield from _equations(inner)


def _all_sizes(jaxpr):
  """Returns the sizes of all arrays that a program computes."""
  return [
      variable.aval.size
      for equation in _equations(jaxpr)
      for variable in equation.outvars
  ]


def test_products_have_the_highest_precision():
  x, codebook = jnp.ones((5, 3)), jnp.ones((7, 3))

  def program(x, codebook):
    entropy = jax.grad(lookup.entropy_loss, argnums=(0, 1))
    return lookup.nearest(x, codebook), entropy(x, codebook)

  highest = jax.lax.Precision.HIGHEST
  precisions = [
      equation.params['precision']
      for equation in _equations(jax.make_jaxpr(program)(x, codebook).jaxpr)
      if equation.primitive.name == 'dot_general'
  ]
  assert set(precisions) == {(highest, highest)}
  # Lookup, entropy, and the latter's backward pass with its recomputation.
  assert len(precisions) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ('num_rows', 'most_rows'),
    [
        (300, 11),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in [(512, 37), (257, 11), (5, 11), (5, 1)]
        ),
    ],
)
def test_chunks_give_the_same_within_the_bound(
    monkeypatch, num_rows, most_rows
):
  # Near enough to each other for the entropy to have a gradient.
  x = jnp.asarray(0.1 * _normal(0, num_rows, 3))
  codebook = jnp.asarray(0.1 * _normal(1, 200, 3))

  def results(x, codebook):
    entropy = jax.value_and_grad(lookup.entropy_loss, argnums=(0, 1))
    return lookup.nearest(x, codebook), entropy(x, codebook)

  whole = jax.jit(results)(x, codebook)
  bound = most_rows * 200 + 199
  monkeypatch.setattr(lookup, 'MAX_DISTANCES', bound)
  # A new function, since JAX remembers the trace of the old one.
  program = jax.jit(lambda *xs: results(*xs)).trace(x, codebook)
  chunked = program.lower().compile()(x, codebook)
  np.testing.assert_array_equal(chunked[0], whole[0])
  chex.assert_trees_all_close(chunked[1], whole[1], rtol=1e-4, atol=1e-6)
  # All other arrays are smaller here, except the entries, [200, 3].
  assert max(_all_sizes(program.jaxpr)) <= max(bound, 600)


def test_a_large_codebook_keeps_the_stated_bound():
  quantizer = _build(
      codebook_size=2**17,
      code_dim=8,
      codebook_init='kmeans',
      restart='batch',
      entropy_weight=0.1,
  )
  z = jax.ShapeDtypeStruct((64, 16, 16, 8), jnp.bfloat16)
  key = jax.eval_shape(jax.random.key, 0)
  variables = jax.eval_shape(quantizer.init, key, z)

  def step(variables, z):
    def loss(z):
      out, changed = quantizer.apply(
          variables, z, train=True, mutable=['codebook']
      )
      return out.loss, changed

    return jax.grad(loss, has_aux=True)(z)

  sizes = _all_sizes(jax.make_jaxpr(step)(variables, z).jaxpr)
  assert max(sizes) == lookup.MAX_DISTANCES < 2**14 * 2**17


def test_chunks_leave_the_tokens_on_their_devices(monkeypatch):
  monkeypatch.setattr(lookup, 'MAX_DISTANCES', 2**10)
  sharding = jax.NamedSharding(_mesh(), jax.P('data'))
  x = jax.device_put(_normal(0, 64, 16, 4), sharding)
  search = jax.jit(lookup.nearest).lower(x, _normal(1, 32, 4)).compile()
  text = search.as_text()
  assert ' while(' in text
  for transfer in ('all-gather', 'all-to-all', 'collective-permute'):
    assert transfer not in text


def test_entropy_loss_equals_numpy():
  x, codebook = 0.1 * _normal(0, 6, 5, 3), 0.1 * _normal(1, 7, 3)
  logits = -_squared_distances(x, codebook) / 0.01
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p = (p / p.sum(-1, keepdims=True)).reshape(30, 7)
  mean = p.mean(0)
  expected = -(p * np.log(p)).sum(-1).mean() + (mean * np.log(mean)).sum()
  loss = jax.jit(lookup.entropy_loss)(x, codebook)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_entropy_loss_stays_in_its_range_with_finite_gradient():
  codebook = np.eye(8, dtype=np.float32)
  value_and_grad = jax.jit(jax.value_and_grad(lookup.entropy_loss))
  # Sure and even: -log K. Sure and collapsed: 0, where mean p underflows.
  for x, expected in [(codebook, -np.log(8)), (codebook[:1] * 3, 0.0)]:
    loss, gradient = value_and_grad(x, codebook)
    np.testing.assert_allclose(loss, expected, atol=1e-6)
    chex.assert_tree_all_finite(gradient)


@pytest.mark.slow
def test_rotation_gives_the_worked_example():
  x, q = jnp.float32([1, 2, 2]), jnp.float32([0, 3, 4])
  np.testing.assert_array_equal(codebook_lib.rotation(x, q), q)
  jacobian = np.asarray(jax.jacobian(codebook_lib.rotation)(x, q), np.float64)
  turn = jacobian * 3 / 5  # |x| / |q|
  np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)
  np.testing.assert_allclose(np.linalg.det(turn), 1, rtol=1e-6)
  np.testing.assert_allclose(jacobian @ x, q, atol=2e-6)
  # It turns in the plane of x and q alone: their normal stays.
  normal = np.cross(x, q)
  np.testing.assert_allclose(turn @ normal, normal, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('x', 'q'),
    [
        ((1, 2, 2), (-1, -2, -2)),
        ((1, 2, 2), (-2, -4, -4.0001)),
        ((0, 0, 0), (1, 2, 3)),
        ((1, 2, 2), (0, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_rotation_is_straight_through_where_it_is_not_defined(x, q):
  x, q = jnp.float32(x), jnp.float32(q)
  np.testing.assert_array_equal(codebook_lib.rotation(x, q), q)
  jacobian = jax.jacobian(codebook_lib.rotation)(x, q)
  np.testing.assert_array_equal(jacobian, np.eye(3))


@pytest.mark.slow
def test_rotation_is_what_the_name_chooses():
  z = _normal(0, 5, 4)
  weights = _normal(1, 5, 4)
  gradients = {}
  for gradient in ('straight_through', 'rotation'):
    quantizer = _build(gradient=gradient)
    variables = _init(quantizer)
    codes = quantizer.apply(variables, z).z_q

    def loss(z, quantizer=quantizer, variables=variables):
      return jnp.sum(quantizer.apply(variables, z).z_q * weights)

    gradients[gradient] = jax.jit(jax.grad(loss))(z)
  np.testing.assert_array_equal(gradients['straight_through'], weights)
  stretch = np.linalg.norm(codes, axis=-1) / np.linalg.norm(z, axis=-1)
  np.testing.assert_allclose(
      np.linalg.norm(gradients['rotation'], axis=-1),
      stretch * np.linalg.norm(weights, axis=-1),
      rtol=1e-5,
  )


def test_a_codebook_that_is_a_parameter_needs_nothing_mutable():
  quantizer = _build(codebook_update='gradient')
  variables, z = _init(quantizer), _normal(0, 64, 4)
  chex.assert_trees_all_equal(
      quantizer.apply(variables, z, train=True), quantizer.apply(variables, z)
  )


def test_gradient_update_gives_the_losses_of_maskgit():
  quantizer = _build(codebook_update='gradient', entropy_weight=0.1)
  variables = _init(quantizer)
  assert set(variables) == {'params'}
  z, codebook = _normal(0, 20, 4), variables['params']['codebook']

  def loss(variables, z):
    return quantizer.apply(variables, z, train=True).loss

  indices = jax.jit(quantizer.apply)(variables, z).indices
  error = np.float64(codebook)[indices] - z
  entropy = jax.jit(lookup.entropy_loss)(z, codebook)
  np.testing.assert_allclose(
      jax.jit(loss)(variables, z),
      1.25 * np.square(error).mean() + 0.1 * entropy,
      rtol=1e-5,
  )
  # Each term draws one side only.
  quantizer = _build(codebook_update='gradient')
  gradient = jax.jit(jax.grad(lambda *xs: loss(*xs), argnums=(0, 1)))
  of_codes, of_z = gradient(variables, z)
  expected = np.zeros((16, 4))
  np.add.at(expected, indices, 2 * error / error.size)
  np.testing.assert_allclose(of_codes['params']['codebook'], expected, 1e-5)
  np.testing.assert_allclose(of_z, -0.25 * 2 * error / error.size, rtol=1e-5)


@pytest.mark.slow
def test_averages_get_no_gradient():
  quantizer = _build()
  z = _normal(0, 20, 4)

  def loss(entries):
    out = quantizer.apply(_state(entries), z)
    return out.loss + jnp.sum(out.z_q)

  quantizer_loss = jax.grad(loss)(_normal(1, 16, 4))
  # The commitment loss stops at the codes, and z_q passes nothing to them.
  np.testing.assert_array_equal(quantizer_loss, np.zeros((16, 4)))


@both_metrics
def test_kmeans_finds_planted_clusters_in_the_first_update(metric):
  rng = np.random.default_rng(0)
  centers = _unit(rng.normal(size=(6, 4))) * 10
  labels = rng.integers(6, size=600)
  z = np.float32(centers[labels] + 0.1 * rng.normal(size=(600, 4)))
  quantizer = _build(metric=metric, codebook_init='kmeans')
  variables = _init(quantizer)
  out, after = _train(quantizer, variables, z)
  # Every cluster has codes of its own, and they lie in its middle.
  target = centers / 10 if metric == 'cosine' else centers
  codes = np.asarray(out.z_q)
  assert np.abs(codes - target[labels]).max() < 0.5
  assert _perplexity(out.indices, 16) > 6
  # Once: from here on only the averages move the codes.
  _, later = _train(quantizer, after, -z)
  _, expected = _train(_build(metric=metric), after, -z)
  chex.assert_trees_all_close(later, expected, rtol=1e-6)


@pytest.mark.slow
def test_kmeans_ends_at_means_and_starts_from_distinct_vectors():
  x = _normal(0, 40, 3)
  far = np.full((50, 3), 100, np.float32)
  key = jax.random.key(0)
  # As many codes as vectors: each vector is drawn once, the rest stay.
  entries = jax.jit(ema_codebook.kmeans, static_argnums=3)(
      far, x, key, lookup.METRICS['euclidean']
  )
  np.testing.assert_array_equal(
      np.sort(entries[:40], axis=0), np.sort(x, axis=0)
  )
  np.testing.assert_array_equal(entries[40:], far[40:])
  # Few codes: a fixed point of Lloyd's algorithm on these numbers.
  x = np.concatenate([x, x + 20])
  entries = ema_codebook.kmeans(far[:2], x, key, lookup.METRICS['euclidean'])
  indices = _squared_distances(x, entries).argmin(-1)
  for index in range(2):
    np.testing.assert_allclose(
        entries[index], x[indices == index].mean(0), rtol=1e-5
    )
  # Spherical: the directions of means of vectors of length 1.
  x = _unit(_normal(0, 40, 3))
  entries = ema_codebook.kmeans(far[:2], x, key, lookup.METRICS['cosine'])
  indices = _squared_distances(x, entries).argmin(-1)
  for index in range(2):
    np.testing.assert_allclose(
        entries[index], _unit(x[indices == index].mean(0)), rtol=1e-5
    )


@pytest.mark.slow
@both_restarts
def test_restarts_end_a_planted_collapse(restart):
  # One code among the latents, all others far away: it takes every latent.
  entries = np.full((16, 4), 50, np.float32) + _normal(1, 16, 4)
  entries[3] = 0
  z = _normal(0, 512, 4)
  usage = {}
  for name in ('none', restart):
    quantizer = _build(restart=name, decay=0.9)
    variables = _state(entries)
    before, _ = _train(quantizer, variables, z)
    assert np.unique(before.indices).tolist() == [3]
    for _ in range(60):
      out, variables = _train(quantizer, variables, z)
    usage[name] = len(np.unique(out.indices))
    chex.assert_tree_all_finite(variables)
  assert usage == {'none': 1, restart: 16}
  assert _perplexity(out.indices, 16) > 10


def _dead_codebook():
  """Returns a codebook whose entries 1, 4 and 6 are dead, of mean count 5."""
  counts = np.float32([20, 0, 8, 4, 0.01, 7.98, 0.01, 0])
  counts[7] = 40 - counts.sum()
  assert np.isclose(counts.mean(), 5)
  entries = _normal(0, 8, 3)
  counts[7] = 0.06  # Rarely used, but above 1 % of the mean.
  return ema_codebook.EmaCodebook(entries, counts, entries * counts[:, None])


@pytest.mark.slow
def test_restart_from_batch_replaces_dead_codes_only():
  before = _dead_codebook()
  x = _normal(1, 10, 3)
  indices = jnp.int32([0, 2, -1, -1, -1, -1, -1, -1, 5, 7])
  after = ema_codebook.restart_from_batch(
      before, x, indices, jax.random.key(0), 0.01
  )
  dead = [1, 4, 6]
  alive = [0, 2, 3, 5, 7]
  for old, new in zip(before, after, strict=True):
    np.testing.assert_array_equal(new[jnp.array(alive)], old[np.array(alive)])
  taken = {
      int(np.flatnonzero((x == np.asarray(after.entries[k])).all(-1))[0])
      for k in dead
  }
  assert len(taken) == 3
  assert taken <= {0, 1, 8, 9}
  np.testing.assert_allclose(
      after.counts[jnp.array(dead)], before.counts.mean()
  )
  np.testing.assert_array_equal(
      after.sums, after.entries * after.counts[:, None]
  )
  # With fewer latents than dead codes the rest waits for the next batch.
  indices = jnp.full((10,), -1).at[4].set(0)
  after = ema_codebook.restart_from_batch(
      before, x, indices, jax.random.key(0), 0.01
  )
  np.testing.assert_array_equal(after.entries[1], x[4])
  np.testing.assert_array_equal(after.entries[2:], before.entries[2:])


@pytest.mark.slow
def test_split_halves_the_most_used_codes():
  before = _dead_codebook()
  after = ema_codebook.split_most_used(
      before, None, None, jax.random.key(0), 0.01
  )
  # Counts in order: 20, 8, 7.98, ... above the mean, one for each dead code.
  pairs = [(1, 0), (4, 2), (6, 5)]
  for child, parent in pairs:
    half = before.counts[parent] / 2
    np.testing.assert_allclose(after.counts[child], half)
    np.testing.assert_allclose(after.counts[parent], half)
    middle = (after.entries[child] + after.entries[parent]) / 2
    np.testing.assert_allclose(middle, before.entries[parent], rtol=1e-6)
    ratio = after.entries[child] / before.entries[parent]
    assert 0 < np.abs(ratio - 1).max() < 5e-3
  for index in (3, 7):
    np.testing.assert_array_equal(after.entries[index], before.entries[index])
    assert after.counts[index] == before.counts[index]
  np.testing.assert_allclose(
      after.sums, after.entries * after.counts[:, None], rtol=1e-6
  )


def test_only_codes_above_the_mean_are_split():
  counts = np.float32([90, 10, 0, 0, 0, 0, 0, 0])
  entries = _normal(0, 8, 3)
  before = ema_codebook.EmaCodebook(entries, counts, entries * counts[:, None])
  after = ema_codebook.split_most_used(
      before, None, None, jax.random.key(0), 0.01
  )
  # The mean is 12.5.
  np.testing.assert_allclose(after.counts, [45, 10, 45, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(after.entries[3:], entries[3:])


@pytest.mark.parametrize(
    'fields',
    [
        {'codebook_init': 'kmeans', 'restart': 'batch'},
        {'restart': 'split', 'metric': 'cosine', 'entropy_weight': 0.1},
    ],
)
@pytest.mark.slow
def test_eight_devices_learn_what_one_learns(fields):
  quantizer = _build(decay=0.5, **fields)
  mesh = _mesh()
  sharding = jax.NamedSharding(mesh, jax.P('data'))
  one = many = _init(quantizer)
  many = jax.device_put(many, jax.NamedSharding(mesh, jax.P()))
  for step in range(6):
    z = _normal(step, 16, 8, 4)
    z[..., 0] = 3 + np.abs(z[..., 0])  # Half of the codes are dead.
    out, one = _train(quantizer, one, z)
    sharded, many = _train(quantizer, many, jax.device_put(z, sharding))
    assert len(sharded.indices.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded.indices, out.indices)
    np.testing.assert_allclose(sharded.loss, out.loss, rtol=1e-5)
  chex.assert_trees_all_close(
      jax.device_get(many), jax.device_get(one), rtol=1e-5, atol=1e-6
  )


@pytest.mark.slow
def test_codes_restart_below_the_share_that_the_field_sets():
  # The first code gets all latents; the counts of others halve per update.
  entries = np.full((16, 4), 50, np.float32) + _normal(1, 16, 4)
  entries[0] = 0
  z = _normal(0, 64, 4)
  restarted = {}
  for restart in ('batch', 'split'):
    for dead_share in (0.0, 0.01, 0.1):
      quantizer = _build(decay=0.5, restart=restart, dead_share=dead_share)
      variables = _state(entries)
      alive = 0
      while alive < 11 and np.all(variables['codebook']['entries'][1:] > 25):
        _, variables = _train(quantizer, variables, z)
        alive += 1
      restarted[restart, dead_share] = alive
  # 2^-n / mean < dead_share for the first time; the mean goes to 4.
  assert restarted == {
      (restart, dead_share): update
      for restart in ('batch', 'split')
      for dead_share, update in ((0.0, 11), (0.01, 5), (0.1, 2))
  }


@pytest.mark.slow
def test_unused_entries_stay_while_their_counts_exceed_the_smoothing():
  entries = np.float32([[0, 0], [9, 9]])
  z = np.float32([[1, 0]])
  quantizer = _build(codebook_size=2, code_dim=2, decay=0.5)
  variables = _state(entries)
  unused = []
  for _ in range(40):
    _, variables = _train(quantizer, variables, z)
    unused.append(float(variables['codebook']['entries'][1, 0]))
  np.testing.assert_allclose(unused[:7], 9, rtol=2e-3)
  # Half way to the origin where the count is the smoothing: 2^-17 = 0.76e-5.
  np.testing.assert_allclose(unused[16], 9 / (1 + 1e-5 * 2**17), rtol=1e-3)
  assert unused[-1] < 1e-4


@pytest.mark.parametrize('train', [False, True])
def test_variables_of_another_size_are_refused(train):
  small, large = _build(codebook_size=8), _build(codebook_size=16)
  z = _normal(0, 20, 4)
  for quantizer, other in ((small, large), (large, small)):
    sizes = rf'\({other.codebook_size}, .*needs \({quantizer.codebook_size},'
    with pytest.raises(ValueError, match='entries .* ' + sizes):
      quantizer.apply(
          _init(other), z, train=train, mutable=['codebook'] if train else False
      )
  variables = _init(large)
  variables['codebook']['counts'] = jnp.ones(8)
  with pytest.raises(ValueError, match=r'counts .* \(8,\), .* \(16,\)'):
    large.apply(variables, z)


@pytest.mark.slow
def test_normalize_takes_every_finite_length():
  extremes = np.float32([[3e38] * 4, [0, 1, 0, 0]])
  x = np.concatenate([_normal(0, 50, 4), extremes])
  expected = jax.jit(lookup.normalize)(x)
  unit = np.float64(x) / np.linalg.norm(np.float64(x), axis=-1, keepdims=True)
  np.testing.assert_allclose(expected, unit, rtol=3e-7)
  # Powers of two round nothing.
  for factor in (2.0**-100, 2.0**-60, 2.0**20, 2.0**60, 2.0**120):
    y = jax.jit(lookup.normalize)(x[:50] * np.float32(factor))
    np.testing.assert_array_equal(y, expected[:50])
  gradient = jax.jit(jax.vmap(jax.grad(lambda x: lookup.normalize(x)[0])))
  length = np.linalg.norm(np.float64(x), axis=-1, keepdims=True)
  jacobian = (np.eye(4)[0] - unit[:, :1] * unit) / length
  np.testing.assert_allclose(gradient(x)[:50], jacobian[:50], atol=2e-6)
  np.testing.assert_array_equal(gradient(x)[51], [1, 0, 0, 0])
  zero = np.zeros((2, 4), np.float32)
  np.testing.assert_array_equal(lookup.normalize(zero), zero)
  chex.assert_tree_all_finite(gradient(zero))
  damaged = np.float32([[1, np.inf], [np.nan, 1]])
  assert np.all(np.any(np.isnan(lookup.normalize(damaged)), axis=-1))


@pytest.mark.parametrize('size', [1e-20, 1e20, 1e30])
@pytest.mark.slow
def test_latents_of_any_length_have_a_token_by_the_cosine_metric(size):
  quantizer = _build(metric='cosine', gradient='rotation')
  variables = _init(quantizer)
  z = _normal(0, 50, 4)
  expected = quantizer.apply(variables, z)
  out = quantizer.apply(variables, z * np.float32(size))
  np.testing.assert_array_equal(out.indices, expected.indices)
  np.testing.assert_array_equal(out.z_q, expected.z_q)
  assert len(np.unique(out.indices)) > 8


@pytest.mark.parametrize('size', [1e-4, 1e4, 1e20, 1e30])
@pytest.mark.slow
def test_rotation_has_its_gradient_at_any_length(size):
  x, q = jnp.float32([1, 2, 2]), jnp.float32([0, 3, 4])
  expected = jax.jacobian(codebook_lib.rotation)(x, q)
  jacobian = jax.jacobian(codebook_lib.rotation)(x * size, q)
  np.testing.assert_allclose(jacobian * size, expected, atol=1e-6)


@pytest.mark.slow
def test_random_choices_follow_the_seed_and_the_step():
  quantizer = _build(codebook_init='kmeans')
  z = _normal(0, 64, 4)

  def first_entries(key):
    variables = quantizer.init(jax.random.key(key), z)
    return _train(quantizer, variables, z)[1]['codebook']['entries']

  np.testing.assert_array_equal(first_entries(0), first_entries(0))
  assert np.any(first_entries(0) != first_entries(1))
  # The same dead codes restart elsewhere in the next step.
  quantizer = _build(restart='batch', decay=0.0)
  entries = np.full((16, 4), 50, np.float32)
  restarted = [
      _train(quantizer, _state(entries, step=step), z)[1]['codebook']
      for step in (1, 2)
  ]
  assert np.any(restarted[0]['entries'] != restarted[1]['entries'])


@pytest.mark.slow
def test_cosine_codes_have_length_one():
  quantizer = _build(metric='cosine')
  variables = _init(quantizer)
  z = 7 * _normal(0, 50, 4)
  _, variables = _train(quantizer, variables, z)
  out = quantizer.apply(variables, z)
  np.testing.assert_allclose(np.linalg.norm(out.z_q, axis=-1), 1, rtol=1e-6)
  shorter = quantizer.apply(variables, 1e-3 * z)
  np.testing.assert_array_equal(shorter.indices, out.indices)
  np.testing.assert_allclose(shorter.loss, out.loss, rtol=1e-5)
  # Zero latents have no direction, but a token and a finite gradient.
  gradient = jax.grad(lambda z: quantizer.apply(variables, z).loss)
  chex.assert_tree_all_finite(gradient(np.zeros((2, 4), np.float32)))


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'codebook_size': None}, 'codebook_size is None; use an integer, 1'),
        ({'codebook_size': 0}, 'codebook_size is 0'),
        ({'codebook_size': 2**29}, f'{2**29}; a table has at most {2**28}'),
        ({'code_dim': 2.0}, r'code_dim is 2\.0; use an integer'),
        ({'metric': 'l2'}, "'l2'; known: .'cosine', 'euclidean'"),
        ({'gradient': 'rotate'}, "'rotate'; known: .'rotation'"),
        ({'codebook_update': 'em'}, "'em'; known: ..*'ema', 'gradient'"),
        ({'codebook_init': 'uniform'}, 'codebook_init .*known'),
        ({'restart': 'all'}, 'restart .*known'),
        ({'decay': 1.0}, r'decay is 1\.0; use less than 1'),
        ({'decay': True}, 'decay is True'),
        ({'dead_share': 1.0}, r'dead_share is 1\.0; use less than 1'),
        ({'dead_share': -0.1}, r'dead_share is -0\.1'),
        ({'commitment_weight': -1.0}, r'commitment_weight is -1\.0.* or more'),
        ({'entropy_weight': float('nan')}, 'entropy_weight is nan'),
        (
            {'codebook_update': 'gradient', 'restart': 'split'},
            "restart .*'ema', or",
        ),
        (
            {'codebook_update': 'gradient', 'codebook_init': 'kmeans'},
            "codebook_init .*codebook_update='ema', or codebook_init='normal'",
        ),
    ],
)
def test_wrong_fields_are_refused_by_name(fields, match):
  with pytest.raises(ValueError, match=match):
    _build(**fields)


def test_sizes_are_known_without_variables():
  quantizer = quantizers.VectorQuantizer(16, 4)
  assert (quantizer.codebook_size, quantizer.code_dim) == (16, 4)
  assert quantizer == _build()
