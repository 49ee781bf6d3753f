"""Pixel formats by their channels: 1 is grey, 3 is RGB, 4 is RGBA.

NumPy images are [h, w, channels] uint8, Pillow images of a mode of `MODES`.
Alpha is straight: colours are not multiplied by it.
"""

import numpy as np
from PIL import Image

# Mode of Pillow by the number of channels (data.channels).
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}


def to_pillow(image: np.ndarray) -> Image.Image:
  """Returns a [h, w, channels] uint8 image as an image of Pillow.

  Raises:
    ValueError: another dtype or shape.
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in MODES:
    raise ValueError(
        f'The image is {image.dtype} of shape {image.shape}; allowed: uint8'
        f' [h, w, channels] with {", ".join(map(str, MODES))} channels.'
    )
  height, width, channels = image.shape
  return Image.frombytes(MODES[channels], (width, height), image.tobytes())


def to_array(image: Image.Image) -> np.ndarray:
  """Returns an image of Pillow as [h, w, channels], read-only."""
  pixels = np.frombuffer(image.tobytes(), np.uint8)
  return pixels.reshape(image.height, image.width, -1)


def convert(image: Image.Image, channels: int) -> Image.Image:
  """Converts an image to another number of channels.

  Conversions:
    * Grey to colours repeats it. Colours to grey is Pillow's 'L', the luma of
      ITU-R 601: (19595 R + 38470 G + 7471 B + 32768) >> 16.
    * RGBA to RGB or grey is composed over white. Grey or RGB to RGBA is opaque.
    * In RGBA, pixels with alpha 0 become black: their colours are invisible and
      arbitrary in most files.

  Args:
    image: of a mode of `MODES`.
    channels: 1, 3 or 4.

  Returns:
    An image of mode MODES[channels], perhaps `image` itself.
  """
  mode = MODES[channels]
  if mode == 'RGBA':
    image = image.convert(mode)
    unseen = image.getchannel('A').point(lambda alpha: 255 * (alpha == 0))
    image.paste((0, 0, 0, 0), mask=unseen)
  elif image.mode == 'RGBA':
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image if image.mode == mode else image.convert(mode)
