"""Tokenizer: encodes images and decodes tokens with a trained model."""

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

from fsq_jax.checkpoints import saved_model
from fsq_jax.data import image_files
from fsq_jax.data import transforms
from fsq_jax.models import autoencoder
from fsq_jax.models import image_sizes
from fsq_jax.models import pixels as pixels_lib
from fsq_jax.models import tiles as tiles_lib
from fsq_jax.quantizers import specs
from fsq_jax.runtime import batching
from fsq_jax.runtime import compiled
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import files as tokenizer_files
from fsq_jax.tokenizer import published
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import urls

FITS = ('crop', 'pad')


class Tokenizer:
  """Encodes uint8 images to int32 tokens, and decodes tokens to images.

  Functions are compiled once per batch shape, and there are few shapes:
  `batch_size` with the last batch filled up, or, for fewer images, the next
  power of 2. Results of an image do not depend on the other images of its
  batch; with another batch size, rounding may differ in the last bits, which
  can change the token of a latent halfway between two levels, or a pixel
  halfway between two values.

  A tokenizer can be pickled, for worker processes. Unpickling places it on the
  local devices of the process, whatever its mesh was; start workers with
  'spawn' or 'forkserver', since JAX does not survive a fork.

  Attributes:
    config: of the run that trained the model.
    model: the autoencoder, for images of C = model.channels: 1 is grey, 3 is
      RGB, 4 is RGBA. Image files are converted (`pixel_formats.convert`).
    variables: its EMA parameters and its other collections.
    mesh: the devices.
    step: training steps taken; None if unknown.
    evaluation: content of the run's evaluation.json for that step, or None.
    decoder_only: whether the encoder is missing.
  """

  def __init__(
      self,
      saved: tokenizer_files.SavedModel,
      mesh: jax.sharding.Mesh,
      *,
      batch_size: int = 64,
  ):
    """Functions are compiled on first call.

    Args:
      saved: the model, with its variables on `mesh`.
      mesh: from `partitioning.create_mesh`, of devices of this process.
      batch_size: largest number of images in a batch; rounded up to a multiple
        of the devices.

    Raises:
      ValueError: a model without tokens, or devices of other processes.
    """
    self.config, self.model, self.variables, metadata = saved
    if not self.model.quantizer.codebook_size:
      raise ValueError(
          f'The quantizer {self.config.model.quantizer.name!r} has no tokens; a'
          ' tokenizer needs a model with another quantizer.'
      )
    self.mesh = mesh
    self.step = metadata.step
    self.evaluation = metadata.evaluation
    self.decoder_only = metadata.decoder_only
    self._saved = saved
    self._batch_size = batch_size
    self._image_size = tuple(self.config.data.image_size)
    self._batcher = batching.Batcher(mesh, batch_size)
    self._sizes = image_sizes.ImageSizes(self.model, self._image_size)
    self._encode = _compile(self.model, images_to_tokens)
    self._decode = _compile(self.model, tokens_to_images)

  def __getstate__(self) -> dict[str, Any]:
    """Returns all arguments of `__init__` but the mesh, arrays on the host."""
    saved = self._saved._replace(variables=jax.device_get(self.variables))
    return {'saved': saved, 'batch_size': self._batch_size}

  def __setstate__(self, state: dict[str, Any]) -> None:
    mesh, saved = partitioning.create_local_mesh(), state['saved']
    variables = jax.device_put(saved.variables, partitioning.replicated(mesh))
    self.__init__(
        saved._replace(variables=variables), mesh,
        batch_size=state['batch_size'],
    )

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
    """Loads the EMA parameters of a run.

    Args:
      workdir: the run's folder.
      checkpoint: 'newest', 'best' (highest PSNR), or a step number.
      mesh: see `__init__`; by default images are sharded over the devices of
        this process and parameters are replicated.
      batch_size: see `__init__`.
      dtype: that the model computes in, 'float32' or 'bfloat16'; by default the
        config's. The quantizer always computes in float32.

    Raises:
      ValueError: no such checkpoint, or a corrupted one.
    """
    found = saved_model.find_run(workdir, checkpoint)
    read_on = mesh or partitioning.create_mesh({'data': -1, 'fsdp': 1})
    model, variables = saved_model.restore(found, read_on)
    if mesh is None:
      mesh = partitioning.create_local_mesh()
      variables = jax.device_put(
          jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), variables),
          partitioning.replicated(mesh),
      )
    if dtype is not None:
      model = tokenizer_files.build_model(found.config, dtype)
    metadata = tokenizer_files.Metadata(
        step=found.step, evaluation=saved_model.read_evaluation(found)
    )
    saved = tokenizer_files.SavedModel(found.config, model, variables, metadata)
    return cls(saved, mesh, batch_size=batch_size)

  @classmethod
  def from_pretrained(
      cls,
      name: str | os.PathLike[str],
      *,
      mesh: jax.sharding.Mesh | None = None,
      batch_size: int = 64,
      dtype: str | None = None,
  ) -> 'Tokenizer':
    """Loads a tokenizer by its name, or from a folder of `save_pretrained`.

    Args:
      name: 'photos', a small tokenizer of photographs that ships with the
        package; a folder, such as './photos'; or 'owner/name' of a repository
        of the Hugging Face Hub, which needs the extra `hub`.
      mesh: as in `from_workdir`.
      batch_size: see `__init__`.
      dtype: as in `from_workdir`.

    Raises:
      ValueError: no such folder, 'photos' in a folder with a run or a saved
        tokenizer ./photos, corrupted files, or weights and tokens of different
        conventions.
    """
    mesh = mesh or partitioning.create_local_mesh()
    folder = tokenizer_files.find(name)
    saved = tokenizer_files.read(folder, mesh, dtype)
    return cls(saved, mesh, batch_size=batch_size)

  @classmethod
  def from_maskgit(
      cls,
      path: str | os.PathLike[str],
      config: ml_collections.ConfigDict,
      *,
      mesh: jax.sharding.Mesh | None = None,
      batch_size: int = 64,
      dtype: str | None = None,
  ) -> 'Tokenizer':
    """Loads published weights of MaskGIT's VQGAN; see `published.read_maskgit`.

    Args:
      path: a Flax checkpoint of github.com/google-research/maskgit, or the
        safetensors of its PyTorch port in github.com/huggingface/open-muse.
      config: of the same model, such as configs/imagenet256_vq_1024.py.
      mesh: as in `from_workdir`.
      batch_size: see `__init__`.
      dtype: as in `from_workdir`.

    Raises:
      ValueError: a file that is missing, corrupted, a pickle, or of another
        model than the config; the differences are listed.
    """
    mesh = mesh or partitioning.create_local_mesh()
    saved = published.read_maskgit(path, config, mesh, dtype)
    return cls(saved, mesh, batch_size=batch_size)

  def save_pretrained(
      self, folder: str | os.PathLike[str], *, decoder_only: bool = False
  ) -> pathlib.Path:
    """Writes a folder that `from_pretrained` loads.

    It holds model.safetensors, config.json (the run's config, with paths cut to
    their last part), quantizer.json, and README.md, a model card with the
    results of the run's evaluation.json.

    Args:
      folder: a new or empty folder, or gs://BUCKET/X.
      decoder_only: leaves out the parts that only `encode` uses.

    Returns:
      Its absolute path.

    Raises:
      ValueError: the folder is not empty, or cannot be written.
    """
    return tokenizer_files.write(
        folder, self._with_hashes(), decoder_only=decoder_only
    )

  def without_encoder(self) -> 'Tokenizer':
    """Returns a tokenizer of the same `model_hash` that can only decode.

    The arrays of the encoder are freed with the last tokenizer that has them.
    """
    return Tokenizer(
        self._with_hashes().without_encoder(), self.mesh,
        batch_size=self._batch_size,
    )

  def at_size(self, image_size: tuple[int, int]) -> 'Tokenizer':
    """Returns a tokenizer of the same weights for another training size.

    Its config.data.image_size, and with it crops, tiles of a ViT, token grid
    and `model_hash`, is the size given.

    Args:
      image_size: (height, width) in pixels, of config.data.image_sizes.

    Raises:
      ValueError: a size that the model was not trained with.
    """
    return Tokenizer(
        self._saved.at_size(_check_size(image_size)), self.mesh,
        batch_size=self._batch_size,
    )

  def push_to_hub(self, name: str, *, decoder_only: bool = False) -> str:
    """Saves to a repository 'owner/name' of the Hugging Face Hub.

    Returns its URL.
    """
    return tokenizer_files.upload(
        name, lambda x: self.save_pretrained(x, decoder_only=decoder_only)
    )

  @property
  def spec(self) -> dict[str, Any]:
    """The quantizer's `spec()`, which defines the meaning of tokens."""
    return self.model.quantizer.spec()

  @functools.cached_property
  def model_hash(self) -> str:
    """sha256 of the weights, the image size and the spec."""
    return self._with_hashes().model_hash

  @property
  def grid_size(self) -> tuple[int, int]:
    """Token grid (h, w) of an image of config.data.image_size."""
    return self.tokens_of(self._image_size)

  def tokens_of(self, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the token grid (h, w) of an (H, W) image under fit='pad'."""
    size = _check_size(size)
    return tuple(
        math.ceil(side / multiple) * num
        for side, multiple, num in zip(
            size, self._sizes.multiples, self._sizes.grid, strict=True
        )
    )

  def num_tokens(self, size: tuple[int, int], tiles: str = 'disjoint') -> int:
    """Returns the number of tokens of an (H, W) image under fit='pad'.

    Where a code has several indices, each counts.

    Args:
      size: (H, W) in pixels.
      tiles: as in `reconstruct`.
    """
    tiles_lib.check_tiles(tiles)
    num = math.prod(self.tokens_of(size))
    if tiles == 'overlapping' and not self._sizes.whole:
      tile = self._sizes.multiples
      padded = np.maximum(_check_size(size), tile).tolist()
      num = tiles_lib.num_overlapping(padded, tile) * math.prod(self.grid_size)
    return num * math.prod(self.model.quantizer.index_shape)

  def encode(self, images: np.ndarray, fit: str = 'crop') -> np.ndarray:
    """Encodes images of any size.

    Args:
      images: [B, H, W, C] uint8.
      fit: 'crop' crops as evaluation does: the shorter side is resized to
        config.data.resize_shorter if that is set, then the centre is cropped;
        images of config.data.image_size are not changed. 'pad' keeps all
        pixels: the bottom and right are padded by mirroring, and `decode` can
        crop them away. A ViT then encodes tiles of its training size, a
        convolutional model whole images, compiled for few sizes
        (`image_sizes`).

    Returns:
      [B, h, w, *index_shape] int32, -1 where a latent was NaN; index_shape is
      the quantizer's, () for most.

    Raises:
      ValueError: arrays of another shape or dtype, or a model without an
        encoder.
    """
    self.check_encoder()
    images = self._fit(self._check_images(images), fit)
    return self._sizes.map(
        functools.partial(self._encode, self.variables), images,
        self._sizes.multiples, self._batcher,
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
      tokens: [B, h, w, *index_shape] of any integer dtype, from `encode`.
      size: (H, W) to crop padded images to, at most the decoded size.
      spec: of the quantizer that made the tokens, as stored next to them.

    Returns:
      [B, H, W, C] uint8.

    Raises:
      ValueError: tokens of another convention, shape, dtype or range, or an
        invalid size.
    """
    if spec is not None:
      specs.check_same_spec(spec, self.spec)
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
            f'Images of {tokens.shape[1:3]} tokens have {largest} pixels and'
            f' cannot be cropped to {size}; give a size of at most {largest}.'
        )
    images = self._sizes.map(
        functools.partial(self._decode, self.variables), tokens,
        self._sizes.grid, self._batcher,
    )
    return images if size is None else images[:, : size[0], : size[1]]

  def reconstruct(
      self,
      images: np.ndarray | str | os.PathLike[str],
      fit: str | None = None,
      *,
      tiles: str = 'disjoint',
  ) -> np.ndarray:
    """Encodes and decodes images.

    Args:
      images: [B, H, W, C] uint8, or the path of an image file.
      fit: as in `encode`; by default 'crop' for arrays, and 'pad', the whole
        image, for a path.
      tiles: of a ViT under fit='pad'; other models take whole images.
        'disjoint': tiles side by side, each by itself, which leaves visible
        seams. 'overlapping': tiles of the image that overlap by half are
        encoded, decoded and blended; they have up to four times as many tokens
        (`num_tokens`), which are no grid that `decode` takes. It needs
        fit='pad'.

    Returns:
      uint8 images, of the same size under 'pad', else of
      config.data.image_size: [B, H, W, C], or [H, W, C] for a path.

    Raises:
      ValueError: as by `encode`, a file that cannot be read, other `tiles`, or
        overlapping ones with another fit than 'pad'.
    """
    if isinstance(images, (str, os.PathLike)):
      path = urls.local_path(images, 'images')
      image = image_files.read_image(path, self.model.channels)
      fit = 'pad' if fit is None else fit
      return self.reconstruct(image[None], fit, tiles=tiles)[0]
    fit = 'crop' if fit is None else fit
    tiles_lib.check_tiles(tiles)
    if tiles == 'overlapping' and fit != 'pad':
      raise ValueError(
          f"tiles is 'overlapping' with fit {fit!r}, which has no tiles; give"
          " fit='pad'."
      )
    images = self._check_images(images)
    if tiles == 'overlapping' and not self._sizes.whole:
      return self._reconstruct_overlapping(images)
    size = images.shape[1:3] if fit == 'pad' else None
    return self.decode(self.encode(images, fit), size)

  def _reconstruct_overlapping(self, images: np.ndarray) -> np.ndarray:
    self.check_encoder()
    tile = self._sizes.multiples
    height, width = images.shape[1:3]
    # Only sides shorter than a tile are padded.
    multiples = [
        y if x < y else 1 for x, y in zip((height, width), tile, strict=True)
    ]
    padded = np.stack([transforms.pad(x, multiples) for x in images])

    def reconstruct(batch: jax.Array) -> jax.Array:
      return self._decode(self.variables, self._encode(self.variables, batch))

    blended = tiles_lib.blend(reconstruct, padded, tile, self._batcher)
    return blended[:, :height, :width]

  def check_encoder(self) -> None:
    """Raises ValueError for a tokenizer that can only decode."""
    if self.decoder_only:
      raise ValueError(
          'This tokenizer has no encoder (without_encoder, or saved with'
          ' decoder_only=True);'
          ' load a complete tokenizer.'
      )

  def _with_hashes(self) -> tokenizer_files.SavedModel:
    """Returns the model with hashes, which are computed once."""
    self._saved = self._saved.with_hashes()
    return self._saved

  def _fit(self, images: np.ndarray, fit: str) -> np.ndarray:
    if fit not in FITS:
      raise ValueError(f'fit is {fit!r}; allowed: {list(FITS)}.')
    if fit == 'pad':
      return np.stack([self._sizes.pad(x) for x in images])
    if images.shape[1:3] == self._image_size:
      return images
    length = self.config.data.resize_shorter
    return np.stack([
        transforms.centre_crop(
            transforms.resize_shorter(x, length), self._image_size
        )
        for x in images
    ])

  def _check_images(self, images: np.ndarray) -> np.ndarray:
    images = _to_array(images, 'Images')
    channels = self.model.channels
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[-1] != channels
        or not images.size
    ):
      raise ValueError(
          f'Images are {images.dtype}{list(images.shape)}; give uint8'
          f' [B, H, W, {channels}] with at least one pixel.'
      )
    return images

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
          f' multiples of {self._sizes.grid}, and no dimension 0.'
      )
    limit = self.model.quantizer.codebook_size
    if tokens.min() < 0 or tokens.max() >= limit:
      raise ValueError(
          f'Tokens hold {tokens.min()} ... {tokens.max()}; allowed: 0 ...'
          f' {limit - 1}. -1 marks NaN latents, which cannot be decoded.'
      )
    return tokens.astype(np.int32)


def images_to_tokens(
    model: autoencoder.Autoencoder,
    images: jax.Array,
    size: jax.Array | None = None,
) -> jax.Array:
  """Encodes [B, H, W, C] uint8 to [B, h, w, *index_shape] int32.

  size: see `Autoencoder.encode`.
  """
  return model.encode_to_indices(pixels_lib.to_float(images), size=size)


def tokens_to_images(
    model: autoencoder.Autoencoder,
    tokens: jax.Array,
    size: jax.Array | None = None,
) -> jax.Array:
  """Decodes [B, h, w, *index_shape] int32 to [B, H, W, C] uint8.

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
        f'{name} of a list have different shapes: {error} Use one call per'
        ' shape.'
    ) from error


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
  """Returns (height, width) as ints, or raises ValueError."""
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


def load_tokenizer(
    workdir: str | os.PathLike[str], which: str, batch_size: int = 64
) -> Tokenizer:
  """Loads the tokenizer of a run or of a folder of `save_pretrained`.

  Args:
    workdir: the folder.
    which: checkpoint of a run; 'newest' for a saved tokenizer, which has one.
    batch_size: see `Tokenizer`.

  Returns:
    The tokenizer, on the devices of this process.

  Raises:
    ValueError: as by `from_workdir` and `from_pretrained`, or another
      checkpoint of a saved tokenizer.
  """
  folder = workdirs.run_folder(workdir)
  if workdirs.is_file(folder / tokenizer_files.WEIGHTS):
    if which != 'newest':
      raise ValueError(
          f'{folder} is a saved tokenizer, which has no checkpoint {which!r};'
          " leave out --checkpoint, or set tokens.checkpoint to 'newest'."
      )
    return Tokenizer.from_pretrained(folder, batch_size=batch_size)
  return Tokenizer.from_workdir(workdir, which, batch_size=batch_size)
