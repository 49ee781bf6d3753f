"""PyTorch side of the benchmarks, run by an interpreter that has PyTorch.

`blocks.TorchPeer` starts this file and exchanges lines of JSON with it: a name
and a number of calls in, their seconds out. It imports neither JAX nor fsq_jax.
The vision transformer is the network of fsq_jax.models.vit: a linear patch
embedding, learned positions, pre-LayerNorm blocks with one kernel for queries,
keys and values, tanh-approximated GELU, and symmetric FSQ as the bottleneck.
"""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional

LEVELS = (8, 8, 8)


class Block(nn.Module):
  """Pre-LayerNorm transformer block."""

  def __init__(self, width: int, num_heads: int, mlp_dim: int):
    super().__init__()
    self.num_heads = num_heads
    self.attention_norm = nn.LayerNorm(width, eps=1e-6)
    self.qkv = nn.Linear(width, 3 * width)
    self.attention_out = nn.Linear(width, width)
    self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
    self.mlp_in = nn.Linear(width, mlp_dim)
    self.mlp_out = nn.Linear(mlp_dim, width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns transformed tokens, [B, N, C]."""
    batch, tokens, width = x.shape
    qkv = self.qkv(self.attention_norm(x))
    qkv = qkv.view(batch, tokens, 3, self.num_heads, width // self.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(q, k, v)
    mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
    x = x + self.attention_out(mixed)
    hidden = functional.gelu(self.mlp_in(self.mlp_norm(x)), approximate='tanh')
    return x + self.mlp_out(hidden)


class Autoencoder(nn.Module):
  """ViT autoencoder with FSQ; half of the blocks in encoder and decoder."""

  def __init__(
      self, image_side: int, patch_size: int, width: int, num_heads: int,
      mlp_dim: int, num_blocks: int,
  ):
    super().__init__()
    self.patch_size = patch_size
    self.grid = image_side // patch_size
    pixels = 3 * patch_size**2

    def blocks() -> nn.Sequential:
      return nn.Sequential(
          *(Block(width, num_heads, mlp_dim) for _ in range(num_blocks // 2))
      )

    self.patches = nn.Linear(pixels, width)
    self.encoder_positions = nn.Parameter(
        0.02 * torch.randn(self.grid**2, width)
    )
    self.encoder = blocks()
    self.projector_in = nn.Linear(width, len(LEVELS))
    self.projector_out = nn.Linear(len(LEVELS), width)
    self.decoder_positions = nn.Parameter(
        0.02 * torch.randn(self.grid**2, width)
    )
    self.decoder = blocks()
    self.pixels = nn.Linear(width, pixels)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """Reconstructs [B, H, W, 3] images."""
    batch, p, grid = images.shape[0], self.patch_size, self.grid
    x = images.view(batch, grid, p, grid, p, 3).permute(0, 1, 3, 2, 4, 5)
    x = self.patches(x.reshape(batch, grid * grid, -1))
    z = self.projector_in(self.encoder(x + self.encoder_positions))
    half = (torch.tensor(LEVELS, device=z.device) - 1) / 2
    bounded = torch.tanh(z) * half
    codes = torch.round(bounded + half) - half
    z_q = bounded + (codes - bounded).detach()
    x = self.projector_out(z_q) + self.decoder_positions
    x = self.pixels(self.decoder(x))
    x = x.view(batch, grid, grid, p, p, 3).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(images.shape)


def build_vit_step(
    batch_size: int, image_side: int, patch_size: int, width: int,
    num_heads: int, mlp_dim: int, num_blocks: int, on_gpu: bool = False,
):
  """Returns a function that runs one training step.

  Eager and in float32 on the CPU; on a GPU compiled, with matmuls in bfloat16.
  """
  device = torch.device('cuda' if on_gpu else 'cpu')
  model = Autoencoder(
      image_side, patch_size, width, num_heads, mlp_dim, num_blocks
  ).to(device)
  reconstruct = torch.compile(model) if on_gpu else model
  optimizer = torch.optim.AdamW(
      model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-4
  )
  shape = (batch_size, image_side, image_side, 3)
  images = torch.randint(256, shape, dtype=torch.uint8, device=device)

  def step() -> None:
    floats = images.float() / 127.5 - 1
    with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
      outputs = reconstruct(floats)
    loss = functional.mse_loss(outputs.float(), floats)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    if on_gpu:
      torch.cuda.synchronize()

  return step


def build_matmuls(
    num_rows: int, dense: list[tuple[int, int]], num_blocks: int
):
  """Returns a function that runs the matmuls of `vit_step.Matmuls`."""
  operands = [
      (
          torch.randn(num_rows, rows),
          torch.randn(columns, rows),
          torch.randn(num_rows, columns),
      )
      for rows, columns in dense
  ]

  def multiply() -> None:
    with torch.no_grad():
      for _ in range(num_blocks):
        for x, weight, grads in operands:
          functional.linear(x, weight)
          grads @ weight
          grads.T @ x

  return multiply


def build_fsq(num_vectors: int, levels: list[int]):
  """Returns a function that quantizes with vector-quantize-pytorch."""
  import vector_quantize_pytorch

  quantizer = vector_quantize_pytorch.FSQ(levels).eval()
  z = torch.randn(1, num_vectors, len(levels))

  def quantize() -> None:
    with torch.no_grad():
      quantizer(z)

  return quantize


def main() -> None:
  """Answers requests until its input ends."""
  builders = {
      'vit_step': build_vit_step, 'matmuls': build_matmuls, 'fsq': build_fsq
  }
  functions = {}
  for line in sys.stdin:
    request = json.loads(line)
    name = request['name']
    if 'build' in request:
      functions[name] = builders[name](**request['build'])
      functions[name]()
      answer = {'torch': torch.__version__, 'threads': torch.get_num_threads()}
    else:
      started = time.perf_counter(), time.process_time()
      for _ in range(request['calls']):
        functions[name]()
      answer = {
          'seconds': time.perf_counter() - started[0],
          'cpu_seconds': time.process_time() - started[1],
      }
    sys.stdout.write(json.dumps(answer) + '\n')
    sys.stdout.flush()


if __name__ == '__main__':
  main()
