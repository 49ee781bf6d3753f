"""Classifier-free guidance, u + s (c - u), and schedules of its scale s."""

from collections.abc import Callable
import dataclasses

from einops import rearrange
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.generators import embeddings

SCHEDULES = ('constant', 'linear', 'power_cosine')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
  """Scale of the guidance over the steps of sampling.

  Other forms convert as: s = 1 + w for c + w (c - u) (FSQ paper's alpha,
  MaskBit, VAR); s itself for LlamaGen, RAR and MAR.

  Attributes:
    scale: s at full strength; 1 switches guidance off, 0 is unconditional.
    schedule: 'constant': s; 'linear': 1 + (s - 1) r with r the fraction of
      known tokens (MAR); 'power_cosine': 1 + (s - 1) (1 - cos(pi p^a)) / 2 with
      p = step / number of steps (RAR, MaskBit).
    power: a of 'power_cosine', > 0.
  """

  scale: float = 1.0
  schedule: str = 'constant'
  power: float = 1.0

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(
          f'guidance.schedule is {self.schedule!r}; known: {list(SCHEDULES)}.'
      )
    if not 0 <= self.scale < float('inf') or not self.power > 0:
      raise ValueError(
          f'guidance.scale is {self.scale} and power {self.power}; use a finite'
          ' scale >= 0 and a power > 0.'
      )

  @property
  def is_active(self) -> bool:
    """Whether sampling needs unconditional logits."""
    return self.scale != 1

  def scales(self, known_fraction: np.ndarray) -> np.ndarray:
    """Returns s before each step, [T] float32, computed in float64.

    Args:
      known_fraction: [T] fraction of known tokens before each of the steps.
    """
    known_fraction = np.asarray(known_fraction, np.float64)
    num_steps = len(known_fraction)
    if self.schedule == 'constant':
      strength = np.ones(num_steps)
    elif self.schedule == 'linear':
      strength = known_fraction
    else:
      progress = np.arange(num_steps) / num_steps
      strength = (1 - np.cos(np.pi * progress**self.power)) / 2
    return (1 + (self.scale - 1) * strength).astype(np.float32)


def combine(
    conditional: jax.Array,
    unconditional: jax.Array | None,
    scale: jax.typing.ArrayLike,
) -> jax.Array:
  """Returns u + s (c - u), or c without unconditional logits.

  Args:
    conditional: [..., K] logits c, float32.
    unconditional: logits u, same shape; None without guidance.
    scale: s, scalar.
  """
  if unconditional is None:
    return conditional
  return unconditional + scale * (conditional - unconditional)


def double(x: jax.Array, other: jax.Array) -> jax.Array:
  """Interleaves two batches [B, ...] to [2 B, ...].

  Interleaved and not concatenated, so that the examples of a device stay there.
  """
  return rearrange(jnp.stack([x, other]), 'g b ... -> (b g) ...')


def both_features(
    function: Callable[..., jax.Array],
    rule: Guidance,
    labels: jax.Array,
    *inputs: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns features with and without the class, by one doubled batch.

  Args:
    function: of labels [B] and inputs to features [B, ...].
    rule: guidance; the second result is None if it is not active.
    labels: [B] integers.
    *inputs: arrays [B, ...], equal in both halves.
  """
  if not rule.is_active:
    return function(labels, *inputs), None
  features = function(
      double(labels, jnp.full_like(labels, embeddings.NO_LABEL)),
      *(double(x, x) for x in inputs),
  )
  return tuple(rearrange(features, '(b g) ... -> g b ...', g=2))
