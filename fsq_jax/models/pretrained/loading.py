"""Loads pretrained encoders and decoders from published checkpoints."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import numbers
import os
import pathlib
import re
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.models import resampling
from fsq_jax.models.pretrained import descriptions
from fsq_jax.models.pretrained import encoder as pretrained_vit
from fsq_jax.models.pretrained import files as weight_files
from fsq_jax.models.pretrained import layouts
from fsq_jax.models.pretrained import mae_decoder
from fsq_jax.models.pretrained import parameters

# Arrays of vision towers that the encoder does not use: pooling, classifier
# heads, mask tokens, and buffers.
_UNUSED = re.compile(
    r'(head|MAPHead_0|pooler|rope_embeddings)[./]'
    r'|embeddings\.(mask_token|position_ids)$'
)
Shardings = Callable[[Any], Any]


class PretrainedEncoder(NamedTuple):
  """An encoder and its weights.

  Attributes:
    module: `module.apply(variables, images)` maps images in [-1, 1] to latents;
      with method='tokens', normalized images to all tokens.
    variables: float32 parameters; parameters of blocks are stacked.
  """

  module: pretrained_vit.PretrainedVit
  variables: Mapping[str, Any]


class PretrainedDecoder(NamedTuple):
  """A decoder and its weights.

  Attributes:
    module: `module.apply(variables, latents)` maps latents to images in
      [-1, 1]; with method='logits', to normalized pixels of patches.
    variables: float32 parameters, stacked over blocks, and the fixed positions
      in the collection `constants`.
  """

  module: mae_decoder.MaeDecoder
  variables: Mapping[str, Any]


def load_encoder(
    path: str | os.PathLike[str],
    image_size: int | tuple[int, int] | None = None,
    final_affine: bool = True,
    *,
    shardings: Shardings | None = None,
) -> PretrainedEncoder:
  """Loads SigLIP, DINO, DINOv2 with or without registers, DINOv3 or MAE.

  Args:
    path: a Hugging Face directory (config.json, and model.safetensors or
      model.safetensors.index.json) or a big_vision SigLIP .npz file.
    image_size: side, or (height, width), of the encoder's images in pixels;
      position embeddings are resampled with the family's kernel. By default
      the size of the checkpoint.
    final_affine: whether the last LayerNorm keeps its scale and bias.
    shardings: maps the variables as `jax.ShapeDtypeStruct` to a tree of
      shardings, such as `partitioning.state_shardings` with a mesh and rules.
      Each device then receives only its shards; the host holds one parameter
      at a time.

  Returns:
    The module and its variables.

  Raises:
    ValueError: files that are missing, corrupted, or of another model; keys
      that are missing, unexpected, or of another shape are listed.
  """
  path = pathlib.Path(path).expanduser()
  with weight_files.open_weights(path) as weights:
    description = _describe(path, weights)
    module = _build_encoder(description, image_size, final_affine)
    # Scale and bias of the last LayerNorm must be there even if not used.
    trained = _build_encoder(description, None, final_affine=True)
    variables = _load_variables(
        module, trained, description, weights, shardings,
        part='vision tower', unused=_UNUSED,
    )
  return PretrainedEncoder(module, variables)


def load_decoder(
    path: str | os.PathLike[str],
    normalization: str = 'none',
    *,
    shardings: Shardings | None = None,
) -> PretrainedDecoder:
  """Loads a decoder of RAE (github.com/bytetriper/RAE).

  Args:
    path: a directory with a config.json of ViT-MAE, whose hidden_size is the
      number of latent channels, and model.safetensors or
      model.safetensors.index.json.
    normalization: encoder family whose mean and std denormalize the pixels, a
      key of `mae_decoder.NORMALIZATIONS`. RAE takes them from the encoder; no
      file of the decoder has them.
    shardings: as in `load_encoder`.

  Returns:
    The module and its variables.

  Raises:
    ValueError: as in `load_encoder`.
  """
  path = pathlib.Path(path).expanduser()
  with weight_files.open_weights(path) as weights:
    description = _describe_decoder(path)
    module = _build_decoder(description, normalization)
    variables = _load_variables(
        module, module, description, weights, shardings, part='decoder',
        unused=None,
    )
  return PretrainedDecoder(module, variables)


def build_decoder(
    path: str | os.PathLike[str], normalization: str = 'none'
) -> mae_decoder.MaeDecoder:
  """Builds the module of `load_decoder` without reading weights.

  Args:
    path: as in `load_decoder`; only config.json is read.
    normalization: as in `load_decoder`.

  Raises:
    ValueError: config.json describes no such decoder.
  """
  path = pathlib.Path(path).expanduser()
  return _build_decoder(_describe_decoder(path), normalization)


def build_encoder(
    path: str | os.PathLike[str],
    image_size: int | tuple[int, int] | None = None,
    final_affine: bool = True,
) -> pretrained_vit.PretrainedVit:
  """Builds the module of `load_encoder` without reading weights.

  Args:
    path: as in `load_encoder`; only config.json, or the headers of an .npz
      file, are read.
    image_size: as in `load_encoder`.
    final_affine: as in `load_encoder`.

  Raises:
    ValueError: the files describe no known encoder.
  """
  path = pathlib.Path(path).expanduser()
  if os.path.isdir(path):
    return _build_encoder(_describe(path, None), image_size, final_affine)
  with weight_files.open_weights(path) as weights:
    description = _describe(path, weights)
  return _build_encoder(description, image_size, final_affine)


def _describe(path, weights) -> descriptions.Description:
  if os.path.isdir(path):
    config = path / 'config.json'
    description = descriptions.describe_config(
        weight_files.read_json(config), str(config)
    )
    if description.family == 'dino':
      _check_normalization(path / 'preprocessor_config.json', description)
    return description
  return descriptions.describe_big_vision(weights)


def _check_normalization(path, description) -> None:
  """Checks that a model of type 'vit' is DINO, by its normalization."""
  if not path.exists():
    return
  config = weight_files.read_json(path)
  for name in ('mean', 'std'):
    expected = list(getattr(description.architecture, name))
    given = config.get(f'image_{name}', expected)
    if given != expected:
      raise ValueError(
          f'image_{name} of {path} is {given!r}. Models of model_type \'vit\''
          f' are read as DINO, which is trained with {expected}; this is'
          ' another model.'
      )


def _describe_decoder(path) -> descriptions.Description:
  config = path / 'config.json'
  return descriptions.describe_decoder(
      weight_files.read_json(config), str(config)
  )


def _build_decoder(description, normalization) -> mae_decoder.MaeDecoder:
  if normalization not in list(mae_decoder.NORMALIZATIONS):
    raise ValueError(
        f'normalization is {normalization!r}; known:'
        f' {sorted(mae_decoder.NORMALIZATIONS)}.'
    )
  arch = description.architecture
  side = description.image_size // arch.patch_size
  return mae_decoder.MaeDecoder(
      architecture=dataclasses.replace(
          arch, **mae_decoder.NORMALIZATIONS[normalization]
      ),
      input_width=description.input_width,
      grid_size=(side, side),
  )


def _build_encoder(
    description, image_size, final_affine
) -> pretrained_vit.PretrainedVit:
  if image_size is None:
    image_size = description.image_size
  sides = image_size
  if not isinstance(sides, Sequence):
    sides = (sides, sides)
  if len(sides) != 2 or not all(isinstance(x, numbers.Integral) for x in sides):
    raise ValueError(
        f'image_size is {image_size!r}; give one or two integers, in pixels.'
    )
  image_size = (int(sides[0]), int(sides[1]))
  descriptions.check_image_size(image_size, description.architecture)
  return pretrained_vit.PretrainedVit(
      architecture=description.architecture,
      image_size=image_size,
      final_affine=final_affine,
  )


def _abstract_variables(module: nn.Module) -> Any:
  if isinstance(module, mae_decoder.MaeDecoder):
    shape = (1, *module.grid_size, module.input_width)
  else:
    shape = (1, *module.image_size, 3)
  inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), inputs)


def _load_variables(
    module: nn.Module,
    trained: nn.Module,
    description: descriptions.Description,
    weights: weight_files.WeightFiles,
    shardings: Shardings | None,
    *,
    part: str,
    unused: re.Pattern[str] | None,
) -> Any:
  """Reads the variables of a module, one at a time, and puts them on devices.

  Args:
    module: has the variables to load; its positions are resampled.
    trained: has the variables that must be in the checkpoint.
    description: of the checkpoint.
    weights: the checkpoint.
    shardings: as in `load_encoder`.
    part: name of the module, for messages.
    unused: further keys, without prefix, that the checkpoint may have; None for
      no further keys with the same prefix.
  """
  shapes = {
      name.partition('/')[2]: leaf.shape
      for name, leaf in _flatten(_abstract_variables(trained)).items()
  }
  places, prefix = layouts.find_places(description, shapes, weights)
  # Without a prefix, a text tower and others may stand beside these.
  roots = {re.split('[./]', place.key)[0] for place in places.values()}
  has_others = not prefix and unused is not None

  def is_unexpected(key: str) -> bool:
    if not key.startswith(prefix):
      return False
    if has_others and re.split('[./]', key)[0] not in roots:
      return False
    return unused is None or not unused.match(key.removeprefix(prefix))

  parameters.check_arrays(
      weights, places, shapes, part=part, is_unexpected=is_unexpected,
      advice='The file is corrupted, or of another model.',
  )
  variables = {}
  for path, sharding in _flatten(_targets(module, shardings)).items():
    name = path.partition('/')[2]
    value = parameters.read_parameter(weights, places[name], shapes[name])
    if name == 'positions':
      value = resampling.resize_grid(
          value, module.grid_size, module.architecture.position_kernel
      )
    variables[path] = _put(value, sharding)
  return traverse_util.unflatten_dict(variables, sep='/')


def _flatten(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')


def _targets(module: nn.Module, shardings: Shardings | None) -> Any:
  """Returns the sharding of each variable; None for the default device."""
  abstract = _abstract_variables(module)
  if shardings is None:
    return jax.tree.map(lambda _: None, abstract)
  targets = shardings(abstract)
  if jax.tree.structure(targets) != jax.tree.structure(abstract):
    raise ValueError(
        'shardings must return a tree of shardings like the variables that it'
        f' is called with, not {jax.tree.structure(targets)}.'
    )
  return targets


def _put(
    value: np.ndarray, sharding: jax.sharding.Sharding | None
) -> jax.Array:
  """Puts an array on the default device, or each shard on its own."""
  if sharding is None:
    return jnp.asarray(value)
  return jax.make_array_from_callback(
      value.shape, sharding, lambda index: value[index]
  )
