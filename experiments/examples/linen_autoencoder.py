"""FSQ inside a Flax linen module: image patches to one token each, and back.

  python experiments/examples/linen_autoencoder.py

Trains for 100 steps on the 4 x 4 patches of a photograph that comes with
scikit-image and prints the loss; seconds on a CPU.
"""

from einops import rearrange
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import skimage.data

from fsq_jax.quantizers import FSQ

LEVELS = (8, 5, 5, 5)
NUM_STEPS = 100
BATCH_SIZE = 1024


class Autoencoder(nn.Module):
  """An MLP autoencoder with FSQ as the bottleneck.

  Attributes:
    levels: levels of FSQ; the encoder has one output channel per entry.
    width: channels of the hidden layers.
    features: channels of the input vectors.
  """

  levels: tuple[int, ...]
  width: int
  features: int

  def setup(self):
    self.encoder = nn.Sequential(
        [nn.Dense(self.width), nn.gelu, nn.Dense(len(self.levels))]
    )
    # tanh bounds the latents, so no commitment loss is needed.
    self.quantizer = FSQ(self.levels, commitment_weight=0)
    self.decoder = nn.Sequential(
        [nn.Dense(self.width), nn.gelu, nn.Dense(self.features)]
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the reconstructions of vectors, both [..., features]."""
    z_q, _, _ = self.quantizer(self.encoder(x))
    return self.decoder(z_q)

  def encode_to_indices(self, x: jax.Array) -> jax.Array:
    """Returns the int32 indices [...] of vectors [..., features]."""
    return self.quantizer(self.encoder(x)).indices

  def decode_from_indices(self, indices: jax.Array) -> jax.Array:
    """Returns the vectors [..., features] of indices [...]."""
    return self.decoder(self.quantizer.indices_to_codes(indices))


def image_patches() -> np.ndarray:
  """Returns the 4 x 4 patches of a photograph, [16384, 48] in [-1, 1]."""
  image = np.float32(skimage.data.astronaut()) / 127.5 - 1
  return rearrange(
      image, '(h p) (w q) c -> (h w) (p q c)', p=4, q=4
  )


def main() -> None:
  """Trains on random batches of patches and prints the loss."""
  patches = image_patches()
  model = Autoencoder(LEVELS, width=128, features=patches.shape[-1])
  params = model.init(jax.random.key(0), patches[:1])
  optimizer = optax.adam(3e-3)

  @jax.jit
  def train_step(params, opt_state, x):
    def loss_fn(params):
      return jnp.mean(jnp.square(model.apply(params, x) - x))

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss

  opt_state = optimizer.init(params)
  rng = np.random.default_rng(0)
  for step in range(1, NUM_STEPS + 1):
    batch = patches[rng.integers(len(patches), size=BATCH_SIZE)]
    params, opt_state, loss = train_step(params, opt_state, batch)
    if step == 1 or step % 20 == 0:
      print(f'step {step:3}  loss {loss:.4f}')  # noqa: T201

  tokens = model.apply(params, patches, method='encode_to_indices')
  restored = model.apply(params, tokens, method='decode_from_indices')
  error = jnp.mean(jnp.square(restored - patches))
  print(  # noqa: T201
      f'{tokens.size} patches -> tokens -> patches: loss {error:.4f},'
      f' {len(np.unique(tokens))} of {np.prod(LEVELS)} codes used'
  )


if __name__ == '__main__':
  main()
