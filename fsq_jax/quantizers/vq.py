"""Vector quantization: the nearest entry of a learned codebook."""

from collections.abc import Sequence
from typing import Any

from absl import logging
from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.quantizers import base
from fsq_jax.quantizers import checks
from fsq_jax.quantizers import codebook
from fsq_jax.quantizers import ema_codebook
from fsq_jax.quantizers import lookup

_UPDATES = ('ema', 'gradient')
_CODEBOOK_INITS = ('normal', 'kmeans')


class VectorQuantizer(codebook.CodebookQuantizer):
  """Vector quantization (arXiv 1711.00937).

    vq = VectorQuantizer(codebook_size=1024, code_dim=8, codebook_init='kmeans')
    variables = vq.init(key, z)
    out, changed = vq.apply(variables, z, train=True, mutable=['codebook'])

  With codebook_update 'ema' entries are EMAs of the latents assigned to them.
  The collection `codebook` holds them, their statistics (counts and sums, see
  `ema_codebook.EmaCodebook`), a seed drawn at initialization, and the number of
  updates, `step`. Each call with train=True updates the collection, which must
  be mutable; latents are quantized before the update, but after k-means. Sums
  run over the global batch, and random numbers depend on seed and step only:
  results are the same on any number of devices and in a resumed run. This
  holds for arrays that are sharded under jax.jit. Under jax.shard_map, jax.pmap
  or jax.vmap, where each replica has a part of the batch, set `axis_name`, or
  the codebooks of the replicas drift apart.

  With codebook_update 'gradient' the codebook is a parameter, trained by the
  codebook loss mean((code - sg(latents))^2).

  Attributes:
    codebook_update: 'ema' or 'gradient'.
    decay: EMA decay, in [0, 1). Only for 'ema'.
    codebook_init: 'normal', N(0, 1), or 'kmeans': means of the latents of the
      first update. 'kmeans' is only for 'ema'.
    restart: dead-code reset: 'none'; 'batch': to random latents of the batch;
      'split': to halves of the most used codes. Only for 'ema'.
    dead_share: fraction of the mean count, in [0, 1), below which a code is
      dead. An average code becomes dead after about
      ln(1 / dead_share) / (1 - decay) updates without use, 460 with the
      defaults. Only for `restart`.
    entropy_weight: weight of the entropy loss (`lookup.entropy_loss`).
    axis_name: axis of jax.shard_map, jax.pmap or jax.vmap, or a tuple of axes,
      over which replicas hold equal parts of the batch, on its leading axis:
      training then uses the statistics of the whole batch, and the mean of the
      replicas' losses is the loss of the whole batch. Unused in evaluation and
      initialization.
  """

  codebook_update: str = 'ema'
  decay: float = 0.99
  codebook_init: str = 'normal'
  restart: str = 'none'
  dead_share: float = 0.01
  entropy_weight: float = 0.0
  axis_name: str | Sequence[str] | None = None

  def __post_init__(self):
    checks.check_name('codebook_update', self.codebook_update, _UPDATES)
    checks.check_name('codebook_init', self.codebook_init, _CODEBOOK_INITS)
    checks.check_name('restart', self.restart, ema_codebook.RESTARTS)
    checks.set_numbers(self, 'decay', 'dead_share', 'entropy_weight')
    if self.decay >= 1:
      raise ValueError(
          f'decay is {self.decay}; use less than 1: codes never move at 1.'
      )
    if self.dead_share >= 1:
      raise ValueError(
          f'dead_share is {self.dead_share}; use less than 1: at 1, codes of '
          'average use are dead.'
      )
    self.axis_name = checks.validated_axis_name(self.axis_name)
    if self.codebook_update == 'gradient':
      for name, value in (('codebook_init', 'normal'), ('restart', 'none')):
        if getattr(self, name) != value:
          raise ValueError(
              f'{name} is {getattr(self, name)!r}, which sets entries outside '
              f"the optimizer; use codebook_update='ema', or {name}={value!r}."
          )
    super().__post_init__()

  def __call__(
      self, z: jax.Array, *, train: bool = False
  ) -> base.QuantizerOutput:
    z = jnp.asarray(z)
    x = self._to_metric_space(z, 'Latents')
    if self._updates(train):
      table, indices = self._update(x)
    else:
      table = self._codes()
      indices = lookup.nearest(x, table)
    codes = lookup.take(table, indices)
    loss = self.commitment_weight * codebook.commitment_loss(x, codes)
    if self.codebook_update == 'gradient':
      loss += codebook.codebook_loss(x, codes)
    if self.entropy_weight > 0:
      # The axis does not exist in initialization.
      axis_name = (
          self.axis_name if train and not self.is_initializing() else None
      )
      entropy_loss = lookup.entropy_loss(x, table, axis_name)
      loss += self.entropy_weight * entropy_loss
    return base.QuantizerOutput(
        z_q=self._pass_gradient(x, codes).astype(z.dtype),
        loss=loss,
        indices=indices,
    )

  def spec(self) -> dict[str, Any]:
    return {'name': 'vq', **super().spec(), 'code': 'entry'}

  def _updates(self, train: bool) -> bool:
    """Whether this call updates the codebook; raises if it cannot."""
    if (
        not train
        or self.codebook_update != 'ema'
        or self.is_initializing()
    ):
      return False
    if not self.is_mutable_collection('codebook'):
      raise ValueError(
          "train=True updates the codebook, but the collection 'codebook' is"
          " immutable; call apply with mutable=['codebook'] and keep the"
          ' returned variables, or use train=False.'
      )
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual and self.axis_name is None:
      logging.warning(
          'Each replica along %s updates its own codebook; they drift apart'
          ' if batches differ. Set axis_name to share the statistics.',
          manual,
      )
    return True

  def _codes(self) -> jax.Array:
    return self._table(self._entries())

  @nn.compact
  def _entries(self) -> jax.Array:
    """Declares and checks all variables.

    Returns:
      The entries [codebook_size, code_dim].
    """
    shape = (self.codebook_size, self.code_dim)
    normal = nn.initializers.normal(1.0)
    if self.codebook_update == 'gradient':
      return self.param('codebook', normal, shape, jnp.float32)

    def declare(name, make, shape=()):
      value = self.variable('codebook', name, make).value
      codebook.check_shape(name, value, shape)
      return value

    entries = declare(
        'entries',
        lambda: normal(self.make_rng('params'), shape, jnp.float32),
        shape,
    )
    # A copy: donated state must not hold one buffer twice.
    declare('sums', lambda: jnp.copy(ema_codebook.start(entries).sums), shape)
    declare('counts', lambda: ema_codebook.start(entries).counts, shape[:1])
    declare('seed', lambda: jax.random.bits(
        self.make_rng('params'), dtype=jnp.uint32
    ))
    declare('step', lambda: jnp.zeros((), jnp.int32))
    return entries

  def _update(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds the nearest codes, then updates the codebook.

    Args:
      x: [..., code_dim] float32 latents in the space of the metric.

    Returns:
      The codes [codebook_size, code_dim] before the update; indices [...].
    """
    x = jax.lax.stop_gradient(x)
    rows = rearrange(x, '... d -> (...) d')
    self._entries()  # For its checks.
    ema = ema_codebook.EmaCodebook(*(
        self.get_variable('codebook', name)
        for name in ema_codebook.EmaCodebook._fields
    ))
    step = self.get_variable('codebook', 'step')
    key = jax.random.key(self.get_variable('codebook', 'seed'))
    key = jax.random.fold_in(key, step)
    kmeans_key, restart_key = jax.random.split(key)
    if self.codebook_init == 'kmeans':
      ema = jax.lax.cond(
          step == 0,
          lambda: ema_codebook.start(
              ema_codebook.kmeans(
                  ema.entries,
                  rows,
                  kmeans_key,
                  lookup.METRICS[self.metric],
                  self.axis_name,
              )
          ),
          lambda: ema,
      )
    table = self._table(ema.entries)
    indices = lookup.nearest(x, table)
    flat = indices.reshape(rows.shape[:1])
    ema = ema_codebook.update(ema, rows, flat, self.decay, self.axis_name)
    restart = ema_codebook.RESTARTS[self.restart]
    ema = restart(
        ema, rows, flat, restart_key, self.dead_share, self.axis_name
    )
    for name, value in ema._asdict().items():
      self.put_variable('codebook', name, value)
    self.put_variable('codebook', 'step', step + 1)
    return table, indices
