"""The model of tokens: embeddings, trunk and head, masked or autoregressive."""

from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.generators import architecture as architectures
from fsq_jax.generators import attention
from fsq_jax.generators import draws
from fsq_jax.generators import embeddings
from fsq_jax.generators import flat_heads
from fsq_jax.generators import heads
from fsq_jax.generators import level_heads
from fsq_jax.generators import positions
from fsq_jax.generators import trunk
from fsq_jax.generators import vocabulary as vocabularies

_EMBEDDINGS = {
    'levels': embeddings.LevelEmbedding,
    'table': embeddings.TableEmbedding,
}
_HEADS = {
    'levels_autoregressive': level_heads.AutoregressiveLevels,
    'levels_independent': level_heads.IndependentLevels,
    'flat': flat_heads.Flat,
    'flat_tied': flat_heads.TiedFlat,
}
EMBEDDINGS = tuple(_EMBEDDINGS)
HEADS = tuple(_HEADS)


class TokenModel(nn.Module):
  """Distribution of token grids [B, N], N = rows * columns in raster order.

  With a causal architecture p(tokens | class) = prod_n p(token_n | class,
  token_<n). Without, p(token_n | class, known tokens) at every position.

  Attributes:
    architecture: of the transformer.
    vocabulary: of the tokens.
    grid: (rows, columns).
    num_classes: C; 0 for a model without classes, whose labels are all -1.
    embedding: 'levels' or 'table'.
    head: 'levels_autoregressive', 'levels_independent', 'flat', or 'flat_tied'
      to the embedding 'table'.
  """

  architecture: architectures.Architecture
  vocabulary: vocabularies.Vocabulary
  grid: tuple[int, int]
  num_classes: int
  embedding: str
  head: str

  def __post_init__(self):
    has_levels = bool(self.vocabulary.levels)
    for name, value, known in (
        ('embedding', self.embedding, EMBEDDINGS),
        ('head', self.head, HEADS),
    ):
      if value not in known:
        raise ValueError(f'{name} is {value!r}; known: {list(known)}.')
      if value.startswith('levels') and not has_levels:
        raise ValueError(
            f'{name} is {value!r}, but the tokens have no levels; use'
            " 'table' and 'flat'."
        )
    if self.head == 'flat_tied' and self.embedding != 'table':
      raise ValueError(
          "head 'flat_tied' shares the embedding 'table', but embedding is"
          f' {self.embedding!r}.'
      )
    super().__post_init__()

  @property
  def num_tokens(self) -> int:
    """Tokens per image, N."""
    return self.grid[0] * self.grid[1]

  def setup(self):
    a = self.architecture
    self.token_embedding = _EMBEDDINGS[self.embedding](
        self.vocabulary, a.width
    )
    self.class_embedding = embeddings.ClassEmbedding(self.num_classes, a.width)
    stddev = nn.initializers.truncated_normal(0.02)
    if a.positions == 'learned':
      shape = (self.num_tokens, a.width)
      self.position_embedding = self.param(
          'position_embedding', stddev, shape, jnp.float32
      )
    if self._has_start:
      self.start = self.param('start', stddev, (a.width,), jnp.float32)
    self.dropout = nn.Dropout(a.dropout)
    self.trunk = trunk.Trunk(a)
    options = {}
    if self.head == 'flat_tied':
      options['embedding'] = self.token_embedding
    self.output = _HEADS[self.head](
        self.vocabulary, a.width, a.dtype, **options
    )

  def __call__(
      self, tokens: jax.Array, labels: jax.Array, known: jax.Array | None
  ) -> heads.CrossEntropy:
    """Returns the loss of tokens; the call that initializes the parameters."""
    features = self.features(tokens, labels, known)
    return self.output.cross_entropy(features, tokens)

  def features(
      self,
      tokens: jax.Array,
      labels: jax.Array,
      known: jax.Array | None,
      *,
      train: bool = False,
  ) -> jax.Array:
    """Runs the transformer on whole grids.

    Args:
      tokens: [B, N] integers.
      labels: [B] integers in [0, C), -1 for no class.
      known: [B, N] bool, where tokens may be seen; masked models only. None
        for causal models, in which position n sees tokens before n.
      train: whether dropout is applied (rng 'dropout').

    Returns:
      [B, N, w] features of the distribution of each token.
    """
    a = self.architecture
    if a.causal != (known is None):
      raise ValueError(
          f'known is {"None" if known is None else "given"}, but the model is'
          f' {"causal" if a.causal else "masked"}; only masked models have a'
          ' mask of known tokens.'
      )
    if tokens.shape[1:] != (self.num_tokens,):
      raise ValueError(
          f'tokens have shape {tokens.shape}; the grid {self.grid} needs'
          f' [B, {self.num_tokens}].'
      )
    x = self.token_embedding(tokens, known)
    if a.positions == 'learned':
      x += self.position_embedding
    prefix, condition = self._condition(labels)
    if prefix is not None:
      x = jnp.concatenate([prefix[:, None], x], axis=1)
    if a.causal:
      x = x[:, :-1]
    rotation = self._rotation()
    if rotation is not None:
      rotation = positions.Rotation(*(y[: x.shape[1]] for y in rotation))
    x = self.dropout(x, deterministic=not train)
    x, _ = self.trunk(x, condition=condition, rotation=rotation, train=train)
    return x[:, -self.num_tokens :]

  def empty_cache(self, batch_size: int) -> attention.Cache:
    """Returns a key-value cache for N positions of each example."""
    return attention.empty_cache(
        self.architecture, batch_size, self.num_tokens
    )

  def step(
      self,
      previous: jax.Array,
      labels: jax.Array,
      cache: attention.Cache,
      position: jax.Array,
  ) -> tuple[jax.Array, attention.Cache]:
    """Runs a causal transformer on one position, with a key-value cache.

    Args:
      previous: [B] tokens at position - 1; ignored at position 0.
      labels: [B] integers in [0, C), -1 for no class.
      cache: of the positions before.
      position: int32 scalar, raster position of the token to predict.

    Returns:
      [B, 1, w] features of the distribution at the position, and the cache.
    """
    x = self.token_embedding(previous, None)
    if self.architecture.positions == 'learned':
      before = jnp.maximum(position - 1, 0)
      x += jnp.take(self.position_embedding, before, axis=0)
    prefix, condition = self._condition(labels)
    x = jnp.where(position == 0, prefix, x)[:, None]
    rotation = self._rotation()
    if rotation is not None:
      rotation = rotation.at(position)
    return self.trunk(
        x, condition=condition, rotation=rotation, cache=cache,
        position=position,
    )

  def cross_entropy(
      self,
      tokens: jax.Array,
      labels: jax.Array,
      known: jax.Array | None,
      *,
      smoothing: float = 0.0,
      train: bool = False,
  ) -> heads.CrossEntropy:
    """Returns the loss [B, N] of each token, those known included.

    Args:
      tokens: [B, N] integers.
      labels: as in `features`.
      known: as in `features`.
      smoothing: label smoothing, in [0, 1).
      train: whether dropout is applied (rng 'dropout').
    """
    features = self.features(tokens, labels, known, train=train)
    return self.output.cross_entropy(features, tokens, smoothing)

  def log_probabilities(
      self, tokens: jax.Array, labels: jax.Array, known: jax.Array | None
  ) -> jax.Array:
    """Returns log p of every code at every position, [B, N, K]; small K."""
    return self.output.all_log_probabilities(
        self.features(tokens, labels, known)
    )

  def sample(
      self,
      features: jax.Array,
      keys: jax.Array,
      *,
      draw: draws.Draw,
      null_features: jax.Array | None = None,
      scale: jax.typing.ArrayLike = 1.0,
  ) -> tuple[jax.Array, jax.Array]:
    """Draws tokens of features; see `heads.Head.sample`."""
    return self.output.sample(
        features, keys, draw=draw, null_features=null_features, scale=scale
    )

  @property
  def _has_start(self) -> bool:
    """Whether a learned start token stands in for the class token."""
    a = self.architecture
    return a.causal and a.conditioning == 'adaln'

  def _condition(
      self, labels: jax.Array
  ) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns the prefix token and the adaLN condition, [B, w] each or None."""
    embedded = self.class_embedding(labels)
    if self.architecture.conditioning == 'prefix':
      return embedded, None
    if self._has_start:
      return jnp.broadcast_to(self.start, embedded.shape), embedded
    return None, embedded

  def _rotation(self) -> positions.Rotation | None:
    """Returns the RoPE of the prefix, if any, and of all grid cells."""
    a = self.architecture
    if a.positions != 'rope':
      return None
    has_prefix = a.causal or a.conditioning == 'prefix'
    return positions.axial_rotation(self.grid, a.head_dim, int(has_prefix))


def init_variables(model: TokenModel, key: jax.Array) -> dict[str, Any]:
  """Initializes the variables of a model."""
  tokens = jnp.zeros((1, model.num_tokens), jnp.int32)
  known = None if model.architecture.causal else jnp.zeros(tokens.shape, bool)
  return dict(model.init(key, tokens, jnp.full(1, -1, jnp.int32), known))
