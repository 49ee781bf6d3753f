"""Sheets hold every pixel of their images, in the row or column they name."""

import numpy as np
import pytest

from fsq_jax import report as report_lib
from fsq_jax.report import grid


def _images(seed, *shape):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 100, (*shape, 3), np.uint8)


def _cells(sheet, tops, lefts, shape, scale):
  """Returns [rows, columns, H, W, 3]: cells of a sheet, reduced again."""
  height, width = shape
  cells = np.stack([
      np.stack([
          sheet[top : top + scale * height, left : left + scale * width]
          for left in lefts
      ])
      for top in tops
  ])
  reduced = cells[..., ::scale, ::scale, :]
  # Enlarged pixels are squares.
  kernel = np.ones((scale, scale, 1), np.uint8)
  np.testing.assert_array_equal(cells, np.kron(reduced, kernel))
  return reduced


def test_rows_of_a_contact_sheet_are_classes():
  images = _images(0, 9, 4, 5)
  labels = np.array([2, 0, 2, -1, 0, 2, 2, -1, 12])
  sheet = report_lib.contact_sheet(
      images, labels, ['cat', 'dog', 'a bird'], max_columns=3, width=90
  )
  assert sheet.dtype == np.uint8
  # Three columns of 5 pixels in 90 minus the names.
  margin = sheet.shape[1] - 3 * (5 * 3 + 3) + 3
  assert 20 < margin < 45
  assert sheet.shape[0] == 4 * (4 * 3 + 3) - 3
  found = _cells(sheet, range(0, 60, 15), range(margin, 90, 18), (4, 5), 3)
  expected = np.full_like(found, 255)
  for row, chosen in enumerate(([1, 4], [0, 2, 5], [8], [3, 7])):
    expected[row, : len(chosen)] = images[chosen]
  np.testing.assert_array_equal(found, expected)
  # Names beside the classes, none beside the images without a class.
  names = [sheet[top : top + 12, :margin].min() < 160 for top in (0, 15, 30)]
  assert names == [True] * 3
  assert (sheet[45:, :margin] == 255).all()


def test_a_pair_has_both_images_under_their_captions():
  pair = _images(0, 2, 100, 251)
  sheet = grid.side_by_side(*pair, captions=('left', 'and right'))
  gap = sheet.shape[1] - 2 * 251
  top = sheet.shape[0] - 100
  assert gap > 5
  for start, image in zip((0, 251 + gap), pair, strict=True):
    np.testing.assert_array_equal(sheet[top:, start : start + 251], image)
    assert sheet[:top, start : start + 251].min() < 160
  assert (sheet[:, 251 : 251 + gap] == 255).all()
  # Small images are enlarged.
  small = grid.side_by_side(*_images(0, 2, 3, 4), captions=('', ''))
  assert small.shape[1] == 2 * 8 * 4 + gap
  with pytest.raises(ValueError, match='side_by_side got images of shapes'):
    grid.side_by_side(pair[0], pair[1, :9], captions=('', ''))


def test_a_sheet_without_classes_is_a_plain_grid():
  images = _images(0, 5, 16, 16)
  labels = np.full(5, -1)
  sheet = report_lib.contact_sheet(images, labels, (), max_columns=2, width=40)
  assert sheet.shape == (3 * 19 - 3, 2 * 19 - 3, 3)
  found = _cells(sheet, (0, 19, 38), (0, 19), (16, 16), 1)
  np.testing.assert_array_equal(found.reshape(6, 16, 16, 3)[:5], images)
  assert (found[2, 1] == 255).all()


def test_names_of_classes_fit_their_margin(monkeypatch):
  drawn = []
  draw = grid.draw_text

  def record(text, height, width):
    drawn.append((text, width))
    return draw(text, height, width)

  monkeypatch.setattr(grid, 'draw_text', record)
  report_lib.contact_sheet(
      _images(0, 3, 16, 16), np.arange(3), ['tench', 'goldfish ' * 20]
  )
  (tench, margin), (goldfish, _), (number, _) = drawn
  assert (tench, number) == ('tench', '2')
  assert goldfish.startswith('goldfish goldfish')
  assert goldfish.endswith('...')
  # At most 160 pixels, with gaps of 3.
  assert 160 - 20 < margin <= 160 + 2 * 3


@pytest.mark.parametrize('cells', [(2, 3), (8, 12)])
def test_columns_of_an_inpainting_sheet_are_examples(cells):
  originals = _images(0, 3, 8, 12)
  completions = _images(1, 3, 2, 8, 12)
  masked = np.random.default_rng(2).random((3, *cells)) < 0.5
  sheet = report_lib.inpainting_sheet(originals, masked, completions)
  height, width = 8 * 8 + 3, 12 * 8 + 3
  assert sheet.shape == (4 * height - 3, 22 + 3 * width - 3, 3)
  found = _cells(
      sheet, range(0, 4 * height, height), range(22, 22 + 3 * width, width),
      (8, 12), 8,
  )
  np.testing.assert_array_equal(found[0], originals)
  np.testing.assert_array_equal(found[2], completions[:, 0])
  np.testing.assert_array_equal(found[3], completions[:, 1])
  block = np.ones((1, 8 // cells[0], 12 // cells[1]), bool)
  unknown = np.kron(masked, block)
  assert (found[1][unknown] == 128).all()
  np.testing.assert_array_equal(found[1][~unknown], originals[~unknown])


def test_samples_stand_above_their_nearest_images():
  samples, neighbours = _images(0, 9, 16, 16), _images(1, 9, 16, 16)
  distances = np.array([0.0, *np.linspace(1, 8, 7), 123.456])
  sheet = report_lib.nearest_sheet(samples, neighbours, distances)
  # Eight columns, then one; captions of 17 pixels.
  block = 2 * 131 - 3 + 17 + 14
  assert sheet.shape == (2 * block - 14, 22 + 8 * 131 - 3, 3)
  lefts = range(22, 22 + 8 * 131, 131)
  found = _cells(sheet, (0, 131, block, block + 131), lefts, (16, 16), 8)
  np.testing.assert_array_equal(found[0], samples[:8])
  np.testing.assert_array_equal(found[1], neighbours[:8])
  np.testing.assert_array_equal(found[2, 0], samples[8])
  np.testing.assert_array_equal(found[3, 0], neighbours[8])
  assert (found[2:, 1:] == 255).all()
  captions = sheet[2 * 131 - 3 : 2 * 131 + 14]
  for left in lefts:
    assert captions[:, left : left + 128].min() < 160
  caption = np.broadcast_to(grid.draw_text('123.46', 17, 128), (17, 128, 3))
  np.testing.assert_array_equal(sheet[-17:, 22:150], caption)


def test_sheets_reject_other_shapes_and_types():
  images = _images(0, 2, 8, 8)
  with pytest.raises(ValueError, match='one label per image'):
    report_lib.contact_sheet(images, np.zeros(3, int), ())
  with pytest.raises(ValueError, match='at least one'):
    report_lib.contact_sheet(images[:0], np.zeros(0, int), ())
  with pytest.raises(ValueError, match='to_uint8'):
    report_lib.contact_sheet(images.astype(float), np.zeros(2, int), ())
  with pytest.raises(ValueError, match='2 samples'):
    report_lib.nearest_sheet(images, images, [1.0])
  with pytest.raises(ValueError, match='equal shapes'):
    report_lib.nearest_sheet(images, images[:, :4], [1.0, 2.0])
  completions = images[:, None]
  for masked in (np.ones((2, 3, 4)), np.ones((1, 4, 4)), np.ones((2, 4))):
    with pytest.raises(ValueError, match='divide H and W'):
      report_lib.inpainting_sheet(images, masked, completions)
  with pytest.raises(ValueError, match='divide H and W'):
    report_lib.inpainting_sheet(images, np.ones((2, 4, 4)), images)
  with pytest.raises(ValueError, match='equal shapes'):
    report_lib.inpainting_sheet(
        images, np.ones((2, 4, 4)), completions[:, :, :4]
    )
