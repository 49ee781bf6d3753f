"""Figures of decoded tokens: swapped tokens, swatches, nearest neighbours."""

import base64
from collections.abc import Mapping, Sequence
import io
import math
from typing import Any

from einops import rearrange
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.data import pixel_formats
from fsq_jax.models import autoencoder
from fsq_jax.models import pixels
from fsq_jax.quantizers import digits as digits_lib
from fsq_jax.runtime import batching
from fsq_jax.runtime import partitioning

# Limits of a figure of swaps: rows, one per dimension, and images per row.
_MAX_SWAPPED_DIGITS = 12
_MAX_SWAPS = 9
# Number of patches shown on each side of the patch of a swapped token.
_PATCHES_AROUND = 2
_NUM_NEAREST = 5


class Decoder:
  """Decodes any number of token grids, in batches of one shape."""

  def __init__(
      self,
      model: autoencoder.Autoencoder,
      variables: Mapping[str, Any],
      mesh: jax.sharding.Mesh,
      batch_size: int,
  ):
    """Functions are compiled on first call.

    Args:
      model: an autoencoder with tokens.
      variables: variables of the model.
      mesh: from `partitioning.create_mesh`.
      batch_size: number of grids decoded at a time.
    """
    self.quantizer = model.quantizer
    self._variables = variables
    self._batcher = batching.Batcher(
        mesh, batch_size, fill='batch', split=False
    )

    def codes(variables, tokens):
      return model.apply(
          variables,
          tokens,
          method=lambda module, x: module.quantizer.indices_to_codes(x),
      )

    def decode(variables, tokens):
      images = model.apply(variables, tokens, method='decode_from_indices')
      return pixels.to_uint8(images)

    def distances(variables, tokens, queries):
      others = codes(variables, tokens)
      # One query at a time, so that no array is [queries, tokens, h, w, d].
      by_query = jax.lax.map(
          lambda query: jnp.mean(
              jnp.sum(jnp.square(others - query), axis=-1), axis=(1, 2)
          ),
          codes(variables, queries),
      )
      return by_query.T

    # Every process gets the whole result.
    self._codes, self._decode, self._distances = (
        jax.jit(function, out_shardings=partitioning.replicated(mesh))
        for function in (codes, decode, distances)
    )

  def codes(self, indices: np.ndarray) -> np.ndarray:
    """Returns float32 codes [..., code_dim] of int32 indices."""
    indices = self._batcher.put(indices)
    return np.asarray(self._codes(self._variables, indices))

  def decode(self, tokens: np.ndarray) -> np.ndarray:
    """Returns [n, H, W, C] uint8 images of [n, h, w, *index_shape] tokens."""
    return self._batcher.map(
        lambda batch: self._decode(self._variables, batch), tokens
    )

  def distances(self, queries: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns the distances between the codes of token grids.

    Args:
      queries: [q, h, w, *index_shape] int32.
      tokens: [n, h, w, *index_shape] int32.

    Returns:
      [q, n] float32: squared Euclidean distance of the codes, averaged over
      positions; NaN if a token is invalid.
    """
    queries = self._batcher.put(queries)
    by_token = self._batcher.map(
        lambda batch: self._distances(self._variables, batch, queries), tokens
    )
    return by_token.T


def png(image: np.ndarray, max_side: int = 256) -> str:
  """Returns a PNG in base64, for JSON and HTML.

  Args:
    image: [H, W, C] uint8.
    max_side: largest side in pixels; larger images are shrunk by an integer.
  """
  shown = pixel_formats.to_pillow(image)
  shown = shown.reduce(math.ceil(max(shown.size) / max_side))
  file = io.BytesIO()
  shown.save(file, 'png')
  return base64.b64encode(file.getvalue()).decode()


def swatches(
    decoder: Decoder, codes: Sequence[int], grid: tuple[int, int]
) -> list[str]:
  """Returns a PNG per code: the middle patch of a grid with only that code.

  Args:
    decoder: decoder of a model whose tokens have one index.
    codes: indices.
    grid: rows and columns of tokens.
  """
  tokens = np.asarray(codes, np.int32)[:, None, None]
  images = decoder.decode(np.broadcast_to(tokens, (len(codes), *grid)))
  middle = _patch((grid[0] // 2, grid[1] // 2), grid, images.shape[1:3])
  return [png(image[middle]) for image in images]


def swap(
    decoder: Decoder, tokens: np.ndarray, position: tuple[int, int]
) -> dict[str, Any]:
  """Decodes a grid with one token swapped for others.

  If codes have level indices, each of them takes all its levels in turn.
  Otherwise the token becomes the codes at rank 1, 2, 4, ... by Euclidean
  distance from its own code.

  Args:
    decoder: decoder of the model.
    tokens: [h, w, *index_shape] int32, all valid.
    position: row and column of the token.

  Returns:
    JSON values with PNGs; 'rows' has one dict per dimension.
  """
  if isinstance(decoder.quantizer, digits_lib.DigitQuantizer):
    rows = _digit_swaps(decoder.quantizer, tokens[position])
    num_digits = tokens[position].size * len(decoder.quantizer.levels)
  else:
    rows, num_digits = [_code_swaps(decoder, tokens[position])], 0
  grids = [tokens]
  for row in rows:
    for cell in row['cells']:
      grid = tokens.copy()
      grid[position] = cell.pop('token')
      grids.append(grid)
  plain, *images = decoder.decode(np.stack(grids))
  grid, size = tokens.shape[:2], plain.shape[:2]
  around = _patch(position, grid, size, margin=_PATCHES_AROUND)
  patch = _patch(position, grid, size)
  changes = [image.astype(np.int32) - plain for image in images]
  largest = max(int(np.abs(change[around]).max()) for change in changes)
  gain = 127 / max(largest, 1)
  cells = (cell for row in rows for cell in row['cells'])
  for cell, image, change in zip(cells, images, changes, strict=True):
    cell['rms'] = float(np.sqrt(np.mean(np.square(change[patch]))))
    cell['image'] = png(image[around])
    # Without alpha, as which it would hide the rest.
    shown = np.rint(128 + gain * change[around][..., :3]).clip(0, 255)
    cell['difference'] = png(shown.astype(np.uint8))
  ends = np.cumsum([len(row['cells']) for row in rows])
  for row, end in zip(rows, ends, strict=True):
    squares = np.square(changes[end - len(row['cells']) : end])
    inside = sum(int(square[patch].sum()) for square in squares)
    row['share_in_patch'] = inside / max(int(squares.sum()), 1)
  return {
      'position': list(position),
      # Left, top, width and height of the patch, as fractions of the image.
      'box': [
          patch[1].start / size[1],
          patch[0].start / size[0],
          (patch[1].stop - patch[1].start) / size[1],
          (patch[0].stop - patch[0].start) / size[0],
      ],
      'token': tokens[position].tolist(),
      'num_digits': num_digits,
      'gain': gain,
      'rows': rows,
      'reconstruction': png(plain),
  }


def nearest(
    decoder: Decoder, tokens: np.ndarray, index: np.ndarray, num_queries: int
) -> list[dict[str, Any]]:
  """Finds the nearest neighbours of some token grids by the distance of codes.

  Args:
    decoder: decoder of the model.
    tokens: [n, h, w, *index_shape] int32.
    index: [n] numbers of the images.
    num_queries: number of query grids, evenly spaced.

  Returns:
    JSON values per query: its PNG, and its nearest neighbours with distances
    and PNGs; [] if fewer than two grids are valid.
  """
  valid = np.all(tokens >= 0, axis=tuple(range(1, tokens.ndim)))
  tokens, index = tokens[valid], index[valid]
  if len(tokens) < 2:
    return []
  queries = (np.arange(num_queries) + 0.5) * len(tokens) / num_queries
  queries = np.unique(queries.astype(int))
  distances = decoder.distances(tokens[queries], tokens)
  results = []
  for query, row in zip(queries, distances, strict=True):
    order = np.argsort(row, kind='stable')
    order = order[order != query][:_NUM_NEAREST]
    images = decoder.decode(tokens[[query, *order]])
    results.append({
        'index': int(index[query]),
        'image': png(images[0]),
        'nearest': [
            {
                'index': int(index[i]),
                'distance': float(row[i]),
                'equal_tokens': float(np.mean(tokens[i] == tokens[query])),
                'image': png(image),
            }
            for i, image in zip(order, images[1:], strict=True)
        ],
    })
  return results


def _digit_swaps(
    quantizer: digits_lib.DigitQuantizer, token: np.ndarray
) -> list[dict[str, Any]]:
  """Returns rows of a figure; 'token' of a cell is the changed token."""
  digits = np.asarray(quantizer.indices_to_digits(token))
  own = rearrange(digits[None], 'one ... d -> (one ...) d')
  rows = []
  for slot, dimension in list(np.ndindex(own.shape))[:_MAX_SWAPPED_DIGITS]:
    level = quantizer.levels[dimension]
    values = np.linspace(0, level - 1, min(level, _MAX_SWAPS)).round()
    values = np.union1d(values.astype(int), [own[slot, dimension]])
    changed = own[None].repeat(len(values), axis=0)
    changed[:, slot, dimension] = values
    changed = changed.reshape(len(values), *digits.shape)
    swapped = np.asarray(quantizer.digits_to_indices(changed))
    rows.append({
        'slot': slot,
        'dimension': dimension,
        'cells': [
            {
                'level': int(value),
                'own': bool(value == own[slot, dimension]),
                'token': index,
            }
            for value, index in zip(values, swapped, strict=True)
        ],
    })
  return rows


def _code_swaps(decoder: Decoder, token: np.ndarray) -> dict[str, Any]:
  """Returns a row of a figure; 'token' of a cell is the other token."""
  size = decoder.quantizer.codebook_size
  codes = decoder.codes(np.arange(size, dtype=np.int32))
  distances = np.linalg.norm(codes - codes[token], axis=-1)
  order = np.argsort(distances, kind='stable')
  order = np.concatenate([[token], order[order != token]])
  powers = math.floor(math.log2(size - 1)) if size > 1 else -1
  ranks = np.linspace(0, powers, min(powers + 1, _MAX_SWAPS - 1)).round()
  ranks = [0, *(2**ranks.astype(int)).tolist()]
  return {
      'cells': [
          {
              'code': int(order[rank]),
              'rank': rank,
              'distance': float(distances[order[rank]]),
              'own': rank == 0,
              'token': order[rank],
          }
          for rank in ranks
      ]
  }


def _patch(
    position: tuple[int, int],
    grid: tuple[int, ...],
    size: tuple[int, ...],
    *,
    margin: int = 0,
) -> tuple[slice, slice]:
  """Slices of a token's patch, and `margin` patches around it, in an image."""
  return tuple(
      slice(
          max(i - margin, 0) * side // num,
          min(i + 1 + margin, num) * side // num,
      )
      for i, num, side in zip(position, grid, size, strict=True)
  )
