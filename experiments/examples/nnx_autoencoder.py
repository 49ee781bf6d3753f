"""FSQ inside a Flax NNX module: image patches to one token each, and back.

  python experiments/examples/nnx_autoencoder.py

Trains for 100 steps on the 4 x 4 patches of a photograph that comes with
scikit-image and prints the loss; seconds on a CPU.

FSQ is a linen module without variables, so an NNX module can hold it as a
static attribute and call `apply({}, z)`. Quantizers with parameters or state,
such as `VectorQuantizer`, need the bridge: `nnx.bridge.ToNNX(quantizer)`.
"""

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import skimage.data

from fsq_jax.quantizers import FSQ

LEVELS = (8, 5, 5, 5)
NUM_STEPS = 100
BATCH_SIZE = 1024


class Autoencoder(nnx.Module):
  """An MLP autoencoder with FSQ as the bottleneck."""

  def __init__(
      self,
      levels: tuple[int, ...],
      *,
      width: int,
      features: int,
      rngs: nnx.Rngs,
  ):
    """Initializes the weights.

    Args:
      levels: levels of FSQ; the encoder has one output channel per entry.
      width: channels of the hidden layers.
      features: channels of the input vectors.
      rngs: has a stream for parameters.
    """
    self.encoder = nnx.Sequential(
        nnx.Linear(features, width, rngs=rngs),
        nnx.gelu,
        nnx.Linear(width, len(levels), rngs=rngs),
    )
    # tanh bounds the latents, so no commitment loss is needed.
    self.quantizer = FSQ(levels, commitment_weight=0)
    self.decoder = nnx.Sequential(
        nnx.Linear(len(levels), width, rngs=rngs),
        nnx.gelu,
        nnx.Linear(width, features, rngs=rngs),
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the reconstructions of vectors, both [..., features]."""
    z_q, _, _ = self.quantizer.apply({}, self.encoder(x))
    return self.decoder(z_q)

  def encode_to_indices(self, x: jax.Array) -> jax.Array:
    """Returns the int32 indices [...] of vectors [..., features]."""
    return self.quantizer.apply({}, self.encoder(x)).indices

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
  model = Autoencoder(
      LEVELS, width=128, features=patches.shape[-1], rngs=nnx.Rngs(0)
  )
  optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

  @nnx.jit
  def train_step(model, optimizer, x):
    def loss_fn(model):
      return jnp.mean(jnp.square(model(x) - x))

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss

  rng = np.random.default_rng(0)
  for step in range(1, NUM_STEPS + 1):
    batch = patches[rng.integers(len(patches), size=BATCH_SIZE)]
    loss = train_step(model, optimizer, batch)
    if step == 1 or step % 20 == 0:
      print(f'step {step:3}  loss {loss:.4f}')  # noqa: T201

  tokens = model.encode_to_indices(patches)
  error = jnp.mean(jnp.square(model.decode_from_indices(tokens) - patches))
  print(  # noqa: T201
      f'{tokens.size} patches -> tokens -> patches: loss {error:.4f},'
      f' {len(np.unique(tokens))} of {np.prod(LEVELS)} codes used'
  )


if __name__ == '__main__':
  main()
