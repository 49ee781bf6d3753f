"""Makes tests/testdata/frozen: outputs of the original frozen networks.

The original weights are not to be had everywhere and are large, so tests fill
both the originals and ours with the same random arrays: shapes by key are in
the files, the values follow from a seed. None of the packages is a dependency
of fsq_jax; in an environment of your own:

  pip install numpy torch torchvision pytorch-fid torch-fidelity
  export PYTHONPATH=.
  python experiments/weights/golden_networks.py tests/testdata/frozen

Each file holds `shapes`, JSON of the shape of every array of the state dict,
and the outputs, for the images of `make_images`.
"""

import argparse
from collections.abc import Mapping
import json
import pathlib
import tempfile

import numpy as np

# Rows are more after the resampling of every network, columns are fewer.
IMAGE_SIZE = (57, 340)


def make_arrays(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Draws a state dict in which no activation vanishes or explodes.

  Args:
    shapes: by key of PyTorch; () and integers are counts of batches.

  Returns:
    Arrays by key, float32; the same ones everywhere.
  """
  # Of NumPy's generators the one whose numbers never change.
  rng = np.random.RandomState(0)
  arrays = {}
  for key in sorted(shapes):
    shape = tuple(shapes[key])
    if not shape:
      arrays[key] = np.array(0)
    elif len(shape) in (2, 4):
      deviation = np.sqrt(2 / np.prod(shape[1:]))
      arrays[key] = np.float32(rng.standard_normal(shape) * deviation)
    elif key.endswith(('weight', 'running_var', 'layer_scale')):
      arrays[key] = np.float32(rng.uniform(0.7, 1.1, shape))
    else:
      arrays[key] = np.float32(rng.uniform(-0.05, 0.05, shape))
  return arrays


def make_images() -> np.ndarray:
  """Draws two images [2, H, W, 3], uint8: noise on a coarse pattern."""
  rng = np.random.RandomState(1)
  coarse = rng.uniform(0, 255, (2, 8, 8, 3))
  rows, columns = (np.arange(side) * 8 // side for side in IMAGE_SIZE)
  smooth = coarse[:, rows][:, :, columns]
  noise = rng.uniform(-40, 40, smooth.shape)
  return np.uint8(np.clip(np.rint(smooth + noise), 0, 255))


def _tensors(network):
  """A random state dict for a network of PyTorch, and its shapes as JSON."""
  import torch  # Here and below, since tests import this module without it.

  shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
  arrays = make_arrays(shapes)
  return {k: torch.tensor(v) for k, v in arrays.items()}, json.dumps(shapes)


def run_inception() -> dict[str, np.ndarray]:
  """Runs Inception-v3 of pytorch-fid and of torch-fidelity."""
  from pytorch_fid import inception
  import torch
  from torch_fidelity import feature_extractor_inceptionv3
  import torchvision

  tensors, shapes = _tensors(
      torchvision.models.inception_v3(
          num_classes=1008, aux_logits=False, init_weights=False
      )
  )
  # In place of the download.
  inception.load_state_dict_from_url = lambda *_, **__: tensors
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / 'weights.pth'
    torch.save(tensors, path)
    tf1 = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        'inception', ['2048'], feature_extractor_weights_path=str(path)
    )
  pytorch_fid = inception.InceptionV3().eval()
  images = torch.tensor(make_images()).permute(0, 3, 1, 2)
  with torch.no_grad():
    return {
        'shapes': np.array(shapes),
        'pytorch_fid': pytorch_fid(images / 255)[0][:, :, 0, 0].numpy(),
        'tf1': tf1(images)[0].numpy(),
    }


def run_classifiers() -> dict[str, dict[str, np.ndarray]]:
  """Runs small classifiers of torchvision, as the loss of TiTok does.

  Returns:
    By the name of the full-size one: logits [2, 10] of a network with fewer
    blocks, and narrower where the class can be; and `full_shapes`, JSON of the
    state dict of the full-size one.
  """
  import torch
  import torchvision
  from torchvision.models import convnext
  from torchvision.models import resnet

  stages = [(8, 16, 1), (16, 24, 1), (24, 32, 2), (32, None, 1)]
  small = {
      'convnext_small': convnext.ConvNeXt(
          [convnext.CNBlockConfig(*stage) for stage in stages], num_classes=10
      ),
      'resnet50': resnet.ResNet(
          resnet.Bottleneck, [1, 2, 1, 1], num_classes=10
      ),
  }  # fmt: skip
  images = torch.tensor(make_images()).permute(0, 3, 1, 2) / 255
  images = torch.nn.functional.interpolate(
      images, size=224, mode='bilinear', align_corners=False, antialias=True
  )
  mean, std = (
      torch.tensor(x)[None, :, None, None]
      for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  )
  results = {}
  for name, network in small.items():
    tensors, shapes = _tensors(network.eval())
    network.load_state_dict(tensors)
    with torch.no_grad():
      logits = network((images - mean) / std).numpy()
    full = getattr(torchvision.models, name)(weights=None)
    full_shapes = {k: tuple(v.shape) for k, v in full.state_dict().items()}
    results[name] = {
        'shapes': np.array(shapes),
        'full_shapes': np.array(json.dumps(full_shapes)),
        'logits': logits,
    }
  return results


def main() -> None:
  """Writes all files to the directory named on the command line."""
  parser = argparse.ArgumentParser(
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('directory', type=pathlib.Path, help='to write to')
  directory = parser.parse_args().directory
  directory.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(directory / 'inception.npz', **run_inception())
  for name, result in run_classifiers().items():
    np.savez_compressed(directory / f'{name}.npz', **result)


if __name__ == '__main__':
  main()
