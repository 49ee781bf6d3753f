"""Parts of the evaluation of generators that need no model."""

import json

import numpy as np
from PIL import Image
import pytest

from fsq_jax.generators import evaluation


def test_copies_are_equal_in_every_token():
  train = np.arange(12).reshape(3, 4)
  copies = evaluation.Copies(train)
  assert copies.num_images == 3
  samples = np.stack([train[2], train[0], train[0] + 1, train[0][::-1]])
  assert copies.count(samples) == 2
  # Whatever the dtype.
  assert copies.count(samples.astype(np.uint16)) == 2


def test_contact_sheets_show_at_most_twenty_classes():
  assert evaluation.choose_classes(0, 3).tolist() == [-1] * 3
  assert evaluation.choose_classes(2, 3).tolist() == [0, 0, 0, 1, 1, 1]
  chosen = evaluation.choose_classes(1000, 1)
  assert chosen.tolist() == list(range(0, 1000, 50))


@pytest.fixture
def result():
  return evaluation.Evaluation(
      metrics={
          'bits_per_token': 3.25, 'bits_per_image': 52.0,
          'train_bits_per_token': 3.0, 'fd_pixel_pca': 1.5,
          'nearest_neighbour_accuracy': 0.875,
      },
      baselines={'uniform': 9.0, 'class_position_unigram': 4.0},
      protocol={'seed': 0},
      sheets={
          'samples': np.full((4, 5, 3), 7, np.uint8),
          'inpainting': np.full((2, 2, 3), 9, np.uint8),
      },
  )


def test_the_summary_names_the_best_baseline(result):
  assert result.summary() == (
      '3.250 bits per token (52.0 per image), training images 3.000;'
      ' class position unigram 4.000; samples: FD (pixel PCA) 1.5,'
      ' class accuracy 87.5%'
  )
  assert 'baseline uniform: 9 bits per token' in result.lines()
  assert result.scalars() == result.metrics


@pytest.mark.parametrize(
    ('label', 'name', 'prefix'),
    [
        ('', 'evaluation.json', ''),
        ('best', 'evaluation_best_step_00000030.json', 'best_'),
    ],
)
def test_files_are_named_for_the_step(result, tmp_path, label, name, prefix):
  assert result.write(tmp_path, 30, label) == tmp_path / name
  content = json.loads((tmp_path / name).read_text())
  assert content == {
      'step': 30, 'metrics': result.metrics, 'baselines': result.baselines,
      'protocol': {'seed': 0},
  }
  pictures = tmp_path / 'samples'
  assert {x.name for x in pictures.iterdir()} == {
      f'{prefix}step_00000030.png', f'{prefix}step_00000030_inpainting.png',
  }
  with Image.open(pictures / f'{prefix}step_00000030.png') as picture:
    np.testing.assert_array_equal(picture, result.sheets['samples'])
