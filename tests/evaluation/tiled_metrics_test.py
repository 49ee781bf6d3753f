"""Metrics in tiles: equal to those of the whole image, in few shapes."""

import jax
import numpy as np
import pytest
import skimage.metrics

from fsq_jax.evaluation import image_metrics
from fsq_jax.evaluation import tiled_metrics


def _pair(height, width):
  rng = np.random.default_rng(height + 1000 * width)
  original = rng.integers(0, 256, (height, width, 3), np.uint8)
  noise = rng.normal(0, 20, original.shape)
  return original, np.uint8(np.clip(original + noise, 0, 255))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('max_tile', 'size'),
    [
        (256, (6, 9)), (256, (10, 300)), (32, (23, 54)),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (
                (256, (1, 1)), (256, (7, 30)), (256, (11, 11)),
                (256, (246, 247)), (256, (257, 500)), (32, (70, 93)),
                (32, (22, 33)),
            )
        ),
    ],
)
def test_tiles_give_the_metrics_of_the_whole_image(
    monkeypatch, max_tile, size
):
  monkeypatch.setattr(tiled_metrics, 'MAX_TILE', max_tile)
  pair = _pair(*size)
  actual = tiled_metrics.image_metrics(*pair)
  expected = jax.jit(image_metrics.image_metrics)(
      pair[0][None], pair[1][None] / np.float32(127.5) - 1
  )
  assert actual.keys() == expected.keys()
  for name, value in actual.items():
    assert value == pytest.approx(float(expected[name][0]), abs=2e-6, rel=1e-6)


def test_tiled_metrics_match_scikit_image():
  pair = _pair(40, 900)
  actual = tiled_metrics.image_metrics(*pair)
  similarity = skimage.metrics.structural_similarity
  assert actual['ssim'] == pytest.approx(
      similarity(
          *pair, channel_axis=2, gaussian_weights=True, sigma=1.5,
          use_sample_covariance=False,
      ),
      abs=1e-6,
  )
  assert actual['ssim_uniform'] == pytest.approx(
      similarity(*pair, channel_axis=2), abs=1e-6
  )
  assert actual['psnr'] == pytest.approx(
      skimage.metrics.peak_signal_noise_ratio(*pair), rel=1e-12
  )


@pytest.mark.slow
def test_identical_images_are_detected():
  image, _ = _pair(300, 20)
  same = tiled_metrics.image_metrics(image, image.copy())
  assert (same['identical'], same['psnr'], same['ssim']) == (1, 100, 1)
  other = image.copy()
  other[-1, -1, -1] ^= 1
  assert tiled_metrics.image_metrics(image, other)['identical'] == 0


@pytest.mark.slow
def test_images_of_all_sizes_need_few_compiled_functions(caplog):
  with jax.log_compiles():
    for side in (1, 3, 12, 17, 29, 40, 64, 99, 130):
      for other in (2, 13, 31, 55, 100, 246, 300):
        tiled_metrics.image_metrics(*_pair(side, other))
  compiled = [x for x in caplog.messages if 'Finished XLA compilation' in x]
  assert 0 < len(compiled) <= 5 * 5
