"""One training step of a generator: bad steps, accumulation, any devices."""

import jax
import numpy as np
import pytest

from fsq_jax.generators import builder
from fsq_jax.generators import objectives
from fsq_jax.generators import training
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim

pytestmark = pytest.mark.slow

_FORM = builder.TokenFormat(
    quantizer={
        'name': 'fsq', 'levels': [3, 2],
        'index_order': 'last dimension fastest',
    },
    codebook_size=6, grid=(2, 3), label_names=('a', 'b', 'c'),
    model_hash='ab' * 32,
)


def _batches(num, batch_size=16):
  rng = np.random.default_rng(0)
  return [
      {
          'tokens': rng.integers(0, 6, (batch_size, 6)).astype(np.int32),
          'labels': rng.integers(-1, 3, batch_size).astype(np.int32),
      }
      for _ in range(num)
  ]


@pytest.fixture
def build(make_config):
  """Builds model, first state, step and mesh: kind, sizes, accumulation."""

  def build(kind, sizes=(1, 1), parts=1):
    config = make_config(kind)
    # Low, since what differs in the last bit grows with the steps' size.
    config.optim.learning_rate = 2e-4
    config.optim.accumulation_steps = parts
    config.partitioning.fsdp_min_size = 32
    mesh = partitioning.create_mesh(
        {'data': sizes[0], 'fsdp': sizes[1]}, jax.devices()[: np.prod(sizes)]
    )
    model = builder.build_model(config, _FORM)
    optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
    states = training.build_state_builder(config, model, optimizer, mesh)
    step = jax.jit(
        training.build_train_step(
            model, builder.build_objective(config.losses), optimizer, config
        ),
        in_shardings=(states.shardings, partitioning.batch_sharding(mesh)),
        out_shardings=(states.shardings, partitioning.replicated(mesh)),
    )
    return model, states.create(), step, mesh

  return build


def _take_steps(state, step, mesh, batches):
  """Returns the last state and the scalars of each step, on the host."""
  rows = []
  for batch in batches:
    state, scalars = step(state, partitioning.shard_batch(batch, mesh))
    rows.append(jax.device_get(scalars))
  return jax.device_get(state), rows


@pytest.mark.parametrize(
    ('kind', 'parts', 'meshes'),
    [('masked', 2, ((8, 1), (2, 4))), ('autoregressive', 1, ((2, 4),))],
)
def test_eight_devices_train_as_one(build, kind, parts, meshes):
  batches = _batches(5)
  _, start, step, mesh = build(kind, (1, 1), parts)
  expected, rows = _take_steps(start, step, mesh, batches)
  for sizes in meshes:
    _, start, step, mesh = build(kind, sizes, parts)
    kernels = [x for x in jax.tree.leaves(start.params) if x.size >= 64]
    is_sharded = [x.addressable_shards[0].data.size < x.size for x in kernels]
    assert any(is_sharded) == (sizes[1] > 1)
    state, others = _take_steps(start, step, mesh, batches)
    for row, other in zip(rows, others, strict=True):
      assert row.keys() == other.keys()
      # Sums of 96 tokens in another order.
      np.testing.assert_allclose(other['loss'], row['loss'], rtol=5e-6)
      np.testing.assert_allclose(other['nll'], row['nll'], rtol=5e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5),
        state.params, expected.params,
    )


def test_parts_are_strided_and_averaged(build):
  model, state, step, mesh = build('autoregressive', parts=2)
  (batch,) = _batches(1)
  _, (row,) = _take_steps(state, step, mesh, [batch])
  key = jax.random.fold_in(jax.random.key(0), 0)
  losses = [
      jax.jit(
          lambda batch, key: objectives.loss(
              model, {'params': state.params}, batch['tokens'],
              batch['labels'], key, objectives.Objective(class_dropout=0.1),
          )[0]
      )(jax.tree.map(lambda x, i=i: x[i::2], batch), key)
      for i, key in enumerate(jax.random.split(key, 2))
  ]
  np.testing.assert_allclose(row['loss'], np.mean(losses), rtol=1e-5)


def test_a_step_that_is_not_finite_leaves_no_trace(build):
  _, start, step, mesh = build('autoregressive')
  good, bad = _batches(2)
  # Tokens outside of the codebook have no embedding.
  bad['tokens'][3] = 6
  before, _ = _take_steps(start, step, mesh, [good])
  after, rows = _take_steps(before, step, mesh, [bad, bad])
  assert not np.isfinite(rows[-1]['loss'])
  assert (int(after.step), int(after.bad_steps), int(after.skipped_steps)) == (
      3, 2, 2
  )
  assert rows[-1]['skipped_steps'] == 2
  for name in ('params', 'ema_params', 'opt_state'):
    jax.tree.map(
        np.testing.assert_array_equal, getattr(after, name),
        getattr(before, name),
    )
  last, rows = _take_steps(after, step, mesh, [good])
  assert np.isfinite(rows[0]['loss'])
  assert (int(last.bad_steps), int(last.skipped_steps)) == (0, 2)
