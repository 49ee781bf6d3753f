"""Images to tokens and back, with a trained model."""

from collections.abc import Callable, Mapping
import functools
import math
import numbers
import os
import pathlib
from typing import Any

from flax import linen as nn
import jax
import ml_collections
import numpy as np

from fsq_jax import data
from fsq_jax import models
from fsq_jax.checkpoints import saved_model
from fsq_jax.data import transforms
from fsq_jax.models import image_sizes
from fsq_jax.models import pixels as pixels_lib
from fsq_jax.quantizers import convert
from fsq_jax.runtime import compiled
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import batching
from fsq_jax.tokenizer import files as tokenizer_files

FITS = ('crop', 'pad')


class Tokenizer:
  """Turns uint8 images into int32 tokens, and tokens into images.

  Programs are compiled once for each shape of a batch, and there are few of
  these: batches of `batch_size`, the last one filled up, or, where there are
  fewer images, of the next power of 2. What becomes of an image in a batch does
  not depend on the others; in a batch of another size, arithmetic may differ in
  the last bits, so that a latent between two levels, or a pixel between two
  values, falls otherwise.

  A tokenizer can be pickled, for worker processes. It is loaded onto the local
  devices of the process that unpickles it, whatever its mesh was; start workers
  by 'spawn' or 'forkserver', since JAX does not survive a fork.

  Attributes:
    config: of the run that the model comes from.
    model: the autoencoder.
    variables: its averaged parameters and its other collections.
    mesh: the devices.
    step: training steps taken; None where it is not known.
    evaluation: content of the run's evaluation.json for that step, or None.
    stored: of a folder that it was loaded from: hashes and parts; else None.
  """

  def __init__(
      self,
      config: ml_collections.ConfigDict,
      variables: Mapping[str, Any],
      mesh: jax.sharding.Mesh,
      *,
      batch_size: int = 64,
      dtype: str | None = None,
      step: int | None = None,
      evaluation: Mapping[str, Any] | None = None,
      stored: tokenizer_files.Stored | None = None,
  ):
    """Compiles nothing yet.

    Args:
      config: the whole config of the run.
      variables: params and the model's other collections, on `mesh`.
      mesh: from `partitioning.create_mesh`, of devices of this process.
      batch_size: images that devices take together, at most; rounded up to what
        the devices divide.
      dtype: that the model computes in, 'float32' or 'bfloat16'; None is the
        config's. The quantizer computes in float32 always.
      step: training steps taken.
      evaluation: content of evaluation.json for that step.
      stored: see the attribute.

    Raises:
      ValueError: a model without tokens, or devices of other processes.
    """
    self.config = config
    self.variables = variables
    self.mesh = mesh
    self.step = step
    self.evaluation = evaluation
    self.stored = stored
    self._options = {'batch_size': batch_size, 'dtype': dtype}
    self.model = tokenizer_files.build_model(config, dtype)
    self._image_size = tuple(config.data.image_size)
    self._batcher = batching.Batcher(mesh, batch_size)
    self._sizes = image_sizes.ImageSizes(self.model, self._image_size)
    self._encode = _compile(self.model, images_to_tokens)
    self._decode = _compile(self.model, tokens_to_images)

  def __getstate__(self) -> dict[str, Any]:
    """Returns all arguments of `__init__` but the mesh, arrays on the host."""
    return {
        'config': self.config, 'variables': jax.device_get(self.variables),
        'step': self.step, 'evaluation': self.evaluation,
        'stored': self.stored, **self._options,
    }

  def __setstate__(self, state: dict[str, Any]) -> None:
    mesh = _local_mesh()
    variables = jax.device_put(
        state['variables'], partitioning.replicated(mesh)
    )
    self.__init__(mesh=mesh, **{**state, 'variables': variables})

  @classmethod
  def from_workdir(
      cls,
      workdir: str | os.PathLike[str],
      checkpoint: str = 'newest',
      *,
      mesh: jax.sharding.Mesh | None = None,
      batch_size: int = 64,
      dtype: str | None = None,
  ) -> 'Tokenizer':
    """Loads the averaged parameters of a run.

    Args:
      workdir: the run's folder.
      checkpoint: 'newest', 'best' (of the highest PSNR), or the number of a
        step.
      mesh: see `__init__`; by default images are split over this process's
        devices and parameters are whole on each.
      batch_size: see `__init__`.
      dtype: see `__init__`.

    Raises:
      ValueError: no such checkpoint, or a damaged one.
    """
    found = saved_model.find_run(workdir, checkpoint)
    read_on = mesh or partitioning.create_mesh(_WHOLE)
    _, variables = saved_model.restore(found, read_on)
    if mesh is None:
      mesh = _local_mesh()
      variables = jax.device_put(
          jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), variables),
          partitioning.replicated(mesh),
      )
    return cls(
        found.config, variables, mesh, batch_size=batch_size, dtype=dtype,
        step=found.step, evaluation=saved_model.read_evaluation(found),
    )

  @classmethod
  def from_pretrained(
      cls,
      name: str | os.PathLike[str],
      *,
      mesh: jax.sharding.Mesh | None = None,
      batch_size: int = 64,
      dtype: str | None = None,
  ) -> 'Tokenizer':
    """Loads what `save_pretrained` wrote.

    Args:
      name: a folder, or 'owner/name' of a repository of the Hugging Face Hub,
        which needs the extra `hub`.
      mesh: as in `from_workdir`.
      batch_size: see `__init__`.
      dtype: see `__init__`.

    Raises:
      ValueError: no such folder, or one that is damaged or of another dialect
        than its weights; the message says of what.
    """
    mesh = mesh or _local_mesh()
    folder = tokenizer_files.find(name)
    config, variables, stored = tokenizer_files.read(folder, mesh)
    return cls(
        config, variables, mesh, batch_size=batch_size, dtype=dtype,
        step=stored.step, evaluation=stored.evaluation, stored=stored,
    )

  def save_pretrained(
      self, folder: str | os.PathLike[str], *, decoder_only: bool = False
  ) -> pathlib.Path:
    """Writes a folder that `from_pretrained` loads.

    It holds model.safetensors, config.json (the run's, without the folders of
    its paths), quantizer.json, and README.md, a model card with what the run's
    evaluation.json says.

    Args:
      folder: a new or empty folder.
      decoder_only: leaves out what `decode` does without.

    Returns:
      Its absolute path.

    Raises:
      ValueError: the folder holds something, or cannot be written.
    """
    return tokenizer_files.write(
        folder, self.config, self.variables, stored=self._stored(),
        decoder_only=decoder_only,
    )

  def push_to_hub(self, name: str, *, decoder_only: bool = False) -> str:
    """Saves to a repository 'owner/name' of the Hugging Face Hub.

    Returns its address.
    """
    return tokenizer_files.upload(
        name, lambda x: self.save_pretrained(x, decoder_only=decoder_only)
    )

  @property
  def spec(self) -> dict[str, Any]:
    """What fixes the meaning of a token: the quantizer's `spec()`."""
    return self.model.quantizer.spec()

  @functools.cached_property
  def model_hash(self) -> str:
    """sha256 of the weights, the image size and the spec."""
    return self._stored().model_hash

  @property
  def grid_size(self) -> tuple[int, int]:
    """(h, w) of the tokens of an image of config.data.image_size."""
    return self.tokens_of(self._image_size)

  def tokens_of(self, size: tuple[int, int]) -> tuple[int, int]:
    """Returns (h, w) of the tokens of an image of (H, W) pixels under 'pad'."""
    size = _check_size(size)
    return tuple(
        math.ceil(side / multiple) * num
        for side, multiple, num in zip(
            size, self._sizes.multiples, self._sizes.grid, strict=True
        )
    )

  def encode(self, images: np.ndarray, fit: str = 'crop') -> np.ndarray:
    """Encodes images of any size.

    Args:
      images: [B, H, W, 3] uint8.
      fit: 'crop' makes of them what evaluation makes of them: the shorter side
        is resized to config.data.resize_shorter if that is set, and the centre
        cropped; images of config.data.image_size stay as they are. 'pad' keeps
        all pixels: bottom and right are mirrored to what the model takes, and
        `decode` crops them away. A ViT then takes tiles of the size that it was
        trained with, a convolutional model whole images; of these, few sizes
        are compiled (`image_sizes`).

    Returns:
      [B, h, w, *index_shape] int32, -1 where a latent was NaN; index_shape, of
      the quantizer, is () for most.

    Raises:
      ValueError: other arrays, or a model without an encoder.
    """
    if self.stored and self.stored.decoder_only:
      raise ValueError(
          'This tokenizer was saved with decoder_only=True and cannot encode;'
          ' load the whole one.'
      )
    images = self._fit(_check_images(images), fit)
    if self._sizes.whole or images.shape[1:3] == self._image_size:
      return self._map(
          self._encode, images, self._sizes.multiples, self._image_size
      )
    return self._batcher.map_tiles(
        self._encode, self.variables, images, self._image_size
    )

  def decode(
      self,
      tokens: np.ndarray,
      size: tuple[int, int] | None = None,
      *,
      spec: Mapping[str, Any] | None = None,
  ) -> np.ndarray:
    """Decodes tokens.

    Args:
      tokens: [B, h, w, *index_shape] of any integer dtype, what `encode`
        returned.
      size: (H, W) to crop to, where images were padded; integers from 1 to the
        sides that the tokens decode to.
      spec: of the quantizer that made the tokens, as kept beside them.

    Returns:
      [B, H, W, 3] uint8.

    Raises:
      ValueError: tokens of another dialect, shape, dtype or range, or another
        size.
    """
    if spec is not None:
      convert.check_same_dialect(spec, self.spec)
    tokens = self._check_tokens(tokens)
    if size is not None:
      size = _check_size(size)
      largest = tuple(
          num // latents * pixels
          for num, latents, pixels in zip(
              tokens.shape[1:3], self._sizes.grid, self._sizes.multiples,
              strict=True,
          )
      )
      if np.any(np.greater(size, largest)):
        raise ValueError(
            f'Images of {tokens.shape[1:3]} tokens have {largest} pixels; they'
            f' cannot be cropped to {size}. Give a size of at most that.'
        )
    if self._sizes.whole or tokens.shape[1:3] == self._sizes.grid:
      images = self._map(
          self._decode, tokens, self._sizes.grid, self.grid_size
      )
    else:
      images = self._batcher.map_tiles(
          self._decode, self.variables, tokens, self._sizes.grid
      )
    return images if size is None else images[:, : size[0], : size[1]]

  def reconstruct(self, images: np.ndarray, fit: str = 'crop') -> np.ndarray:
    """Encodes and decodes images.

    Args:
      images: [B, H, W, 3] uint8.
      fit: as in `encode`.

    Returns:
      uint8 images, of the size of `images` under 'pad', else of
      config.data.image_size.
    """
    images = _check_images(images)
    size = images.shape[1:3] if fit == 'pad' else None
    return self.decode(self.encode(images, fit), size)

  def _map(
      self,
      function: Callable[..., jax.Array],
      x: np.ndarray,
      cell: tuple[int, int],
      usual_size: tuple[int, int],
  ) -> np.ndarray:
    """Applies a compiled function to images or tokens that are not cut."""

    def call(x, size):
      # Tiles are compiled without a size, too.
      sizes = () if size is None else (size,)
      return self._batcher.map(
          lambda variables, batch: function(variables, batch, *sizes),
          self.variables, x, usual_size,
      )

    return self._sizes.call(call, x, cell)

  def _stored(self) -> tokenizer_files.Stored:
    if self.stored is None:
      self.stored = tokenizer_files.describe(
          self.config, self.variables, spec=self.spec, step=self.step,
          evaluation=self.evaluation,
      )
    return self.stored

  def _fit(self, images: np.ndarray, fit: str) -> np.ndarray:
    if fit not in FITS:
      raise ValueError(f'fit is {fit!r}; known: {list(FITS)}.')
    if fit == 'pad':
      return np.stack([self._sizes.pad(x) for x in images])
    if images.shape[1:3] == self._image_size:
      return images
    length = self.config.data.resize_shorter
    return np.stack([
        data.centre_crop(
            transforms.resize_shorter(x, length), self._image_size
        )
        for x in images
    ])

  def _check_tokens(self, tokens: np.ndarray) -> np.ndarray:
    tokens = _to_array(tokens, 'Tokens')
    shape = self.model.quantizer.index_shape
    if (
        tokens.dtype.kind not in 'iu'
        or tokens.ndim != 3 + len(shape)
        or tokens.shape[3:] != shape
        or not tokens.size
        or np.any(np.mod(tokens.shape[1:3], self._sizes.grid))
    ):
      raise ValueError(
          f'Tokens are {tokens.dtype}{list(tokens.shape)}; give integers'
          f' [{", ".join(["B", "h", "w", *map(str, shape)])}], with h and w'
          f' multiples of {self._sizes.grid}, and none of these 0.'
      )
    limit = self.model.quantizer.codebook_size
    if tokens.min() < 0 or tokens.max() >= limit:
      raise ValueError(
          f'Tokens hold {tokens.min()} ... {tokens.max()}; allowed: 0 ...'
          f' {limit - 1}. -1 marks latents that were NaN, which have no code.'
      )
    return tokens.astype(np.int32)


# Parameters whole on every device, images split over all.
_WHOLE = {'data': -1, 'fsdp': 1}


def _local_mesh() -> jax.sharding.Mesh:
  return partitioning.create_mesh(_WHOLE, jax.local_devices())


def images_to_tokens(
    model: models.Autoencoder,
    images: jax.Array,
    size: jax.Array | None = None,
) -> jax.Array:
  """Encodes [B, H, W, 3] uint8 to [B, h, w, *index_shape] int32.

  size: see `Autoencoder.encode`.
  """
  return model.encode_to_indices(pixels_lib.to_float(images), size=size)


def tokens_to_images(
    model: models.Autoencoder,
    tokens: jax.Array,
    size: jax.Array | None = None,
) -> jax.Array:
  """Decodes [B, h, w, *index_shape] int32 to [B, H, W, 3] uint8.

  size: see `Autoencoder.decode`.
  """
  return pixels_lib.to_uint8(model.decode_from_indices(tokens, size=size))


def _compile(
    model: nn.Module, method: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
  def function(variables, x, size=None):
    return model.apply(variables, x, size, method=method)

  return compiled.Compiled(function, max_shapes=image_sizes.MAX_SHAPES)


def _to_array(x: np.ndarray, name: str) -> np.ndarray:
  try:
    return np.asarray(x)
  except ValueError as error:
    raise ValueError(
        f'{name} of a list have different shapes: {error} Give those of each'
        ' shape in a call of their own.'
    ) from error


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
  """Returns a (height, width) as ints, or raises ValueError."""
  if (
      not isinstance(size, (list, tuple, np.ndarray))
      or len(size) != 2
      or not all(
          isinstance(side, numbers.Integral)
          and not isinstance(side, bool)
          and side > 0
          for side in size
      )
  ):
    raise ValueError(
        f'size is {size!r}; give (height, width), two integers of at least 1.'
    )
  return int(size[0]), int(size[1])


def _check_images(images: np.ndarray) -> np.ndarray:
  images = _to_array(images, 'Images')
  if (
      images.dtype != np.uint8
      or images.ndim != 4
      or images.shape[-1] != 3
      or not images.size
  ):
    raise ValueError(
        f'Images are {images.dtype}{list(images.shape)}; give uint8'
        ' [B, H, W, 3] with at least one pixel.'
    )
  return images


def load_tokenizer(
    workdir: str | os.PathLike[str], which: str, batch_size: int = 64
) -> Tokenizer:
  """Loads the tokenizer of a run, or one that was saved as a folder.

  Args:
    workdir: folder of either.
    which: checkpoint of a run; a saved tokenizer has but one.
    batch_size: images that devices take together.

  Returns:
    The tokenizer, on the devices of this process.
  """
  if (pathlib.Path(workdir).expanduser() / 'model.safetensors').exists():
    return Tokenizer.from_pretrained(workdir, batch_size=batch_size)
  return Tokenizer.from_workdir(
      workdir, which, batch_size=batch_size
  )
