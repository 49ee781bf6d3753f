"""Codes of single patches: scalar against vector codes.

4 x 4 patches of CIFAR-10 are coded by scalar quantization of their principal
components (transform coding), with the same levels as FSQ, and by k-means with
as many codes. Both quantizers are fitted to the same patches by Lloyd's
algorithm, so the difference is what independent levels cost. FSQ between two
networks shows how much of it a trained encoder and decoder regain.
"""

import math

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import optax

from fsq_jax import quantizers
from fsq_jax.data import tfds_source

NUM_IMAGES = 6000
NUM_TEST_IMAGES = 1000
NUM_FITTED = 120_000
NUM_ITERATIONS = 15
NUM_STEPS = 4000
BATCH_SIZE = 1024
LEVELS = (
    (8, 5, 5, 5), (10, 10, 10), (4, 4, 4, 4, 4), (12, 7, 4, 3),
    (8, 4, 4, 2, 2, 2), (16, 4, 4, 4), (8, 8, 8, 6, 5),
)  # fmt: skip


def measure(data_dir: str) -> dict[str, float]:
  """Returns PSNR in dB by name of the code; 'k-means' has 1,024 codes."""
  train = _patches(data_dir, 'train', NUM_IMAGES)
  test = _patches(data_dir, 'test', NUM_TEST_IMAGES)
  rng = np.random.default_rng(0)
  fitted = train[rng.permutation(len(train))[:NUM_FITTED]]
  mean = fitted.mean(axis=0)
  _, basis = np.linalg.eigh(np.cov((fitted - mean).T))
  basis = basis[:, ::-1]
  components, tested = (fitted - mean) @ basis, (test - mean) @ basis
  results = {
      str(levels): _psnr(_scalar_error(components, tested, levels))
      for levels in LEVELS
  }
  results['k-means'] = _psnr(_vector_error(fitted, test, 1024, rng))
  for name, model in NETWORKS.items():
    own, nearest = train_network(model, fitted, test, NUM_STEPS)
    results[f'FSQ, {name}'] = _psnr(own)
  # Of the last model.
  return results | {"the same, decoder's nearest code": _psnr(nearest)}


class _Network(nn.Module):
  """A linear map, with `width` plus an MLP of two hidden layers."""

  features: int
  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.Dense(self.features, name='linear')(x)
    if self.width:
      for i in range(2):
        x = nn.gelu(nn.Dense(self.width, name=f'hidden_{i}')(x))
      y += nn.Dense(
          self.features, kernel_init=nn.initializers.zeros, name='output'
      )(x)
    return y


class PatchAutoencoder(nn.Module):
  """FSQ between two networks."""

  encoder_width: int
  decoder_width: int
  num_features: int = 48
  levels: tuple[int, ...] = LEVELS[0]

  def setup(self):
    self.encoder = _Network(len(self.levels), self.encoder_width)
    self.fsq = quantizers.FSQ(self.levels, commitment_weight=0.0)
    self.decoder = _Network(self.num_features, self.decoder_width)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Reconstructs [n, num_features] patches."""
    return self.decoder(self.fsq(self.encoder(x)).z_q)

  def codebook(self) -> jax.Array:
    """Returns the reconstruction of each code."""
    indices = jnp.arange(self.fsq.codebook_size)
    return self.decoder(self.fsq.indices_to_codes(indices))


NETWORKS = {
    'linear encoder and decoder': PatchAutoencoder(0, 0),
    'linear encoder, MLP decoder': PatchAutoencoder(0, 256),
    'MLP encoder and decoder': PatchAutoencoder(256, 256),
}


def train_network(
    model: PatchAutoencoder,
    train: np.ndarray,
    test: np.ndarray,
    num_steps: int,
) -> tuple[float, float]:
  """Trains on patches and returns mean squared errors of others.

  Args:
    model: of patches with as many features.
    train: patches [N, num_features] float32.
    test: patches to measure.
    num_steps: steps of Adam with `BATCH_SIZE` patches.

  Returns:
    The error, and the error if each patch has the code whose reconstruction is
    nearest, and not the encoder's.
  """
  mean, deviation = train.mean(axis=0), train.std()
  train, test = ((x - mean) / deviation for x in (train, test))
  params = model.init(jax.random.key(0), train[:1])
  optimizer = optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adam(optax.cosine_decay_schedule(2e-3, num_steps)),
  )

  def loss(params, x):
    return jnp.mean(jnp.square(model.apply(params, x) - x))

  @jax.jit
  def step(params, state, x):
    updates, state = optimizer.update(jax.grad(loss)(params, x), state)
    return optax.apply_updates(params, updates), state

  state, rng = optimizer.init(params), np.random.default_rng(0)
  for _ in range(num_steps):
    x = train[rng.integers(len(train), size=BATCH_SIZE)]
    params, state = step(params, state, x)
  table = np.asarray(model.apply(params, method='codebook'))
  nearest = np.square(test - table[_nearest(test, table)]).mean()
  own = float(jax.jit(loss)(params, test))
  return own * deviation**2, nearest * deviation**2


def _patches(data_dir: str, split: str, num: int) -> np.ndarray:
  """Returns patches [num * 64, 48] float32 in [0, 1]."""
  source = tfds_source.PreparedSource('cifar10', data_dir, split)
  images = np.stack([source.load(i) for i in range(num)])
  return rearrange(
      images.astype(np.float32) / 255,
      'n (h p) (w q) c -> (n h w) (p q c)', p=4, q=4,
  )  # fmt: skip


def _scalar_error(train, test, levels) -> float:
  """Mean squared error of test components, the others set to their mean."""
  total = np.square(test).sum(axis=1).mean()
  for i, num_levels in enumerate(levels):
    codes = _lloyd(train[:, i], num_levels)
    nearest = codes[np.searchsorted((codes[1:] + codes[:-1]) / 2, test[:, i])]
    total += np.square(test[:, i] - nearest).mean()
    total -= np.square(test[:, i]).mean()
  return total / test.shape[1]


def _lloyd(x: np.ndarray, num_levels: int) -> np.ndarray:
  codes = np.quantile(x, (np.arange(num_levels) + 0.5) / num_levels)
  for _ in range(4 * NUM_ITERATIONS):
    rows = np.searchsorted((codes[1:] + codes[:-1]) / 2, x)
    counts = np.bincount(rows, minlength=num_levels)
    sums = np.bincount(rows, x, num_levels)
    codes = np.where(counts > 0, sums / np.maximum(counts, 1), codes)
  return codes


def _vector_error(train, test, num_codes, rng) -> float:
  """Mean squared error of test patches under k-means of training patches."""
  codes = train[rng.choice(len(train), num_codes, replace=False)]
  for _ in range(NUM_ITERATIONS):
    rows = _nearest(train, codes)
    counts = np.bincount(rows, minlength=num_codes)
    sums = np.stack([np.bincount(rows, x, num_codes) for x in train.T], axis=1)
    unused = counts == 0
    codes = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    codes[unused] = train[rng.choice(len(train), unused.sum())]
  return np.square(test - codes[_nearest(test, codes)]).mean()


def _nearest(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
  norms = np.square(codes).sum(axis=1)
  chunks = np.array_split(x, max(len(x) // 20_000, 1))
  rows = [np.argmin(norms - 2 * chunk @ codes.T, axis=1) for chunk in chunks]
  return np.concatenate(rows)


def _psnr(mse: float) -> float:
  return -10 * math.log10(mse)
