"""Files of generated images: NumPy reads them."""

import numpy as np
import pytest

from fsq_jax.evaluation import neighbours
from fsq_jax.evaluation import sample_files
from fsq_jax.evaluation import sample_metrics


def _image_set(n=23, height=4, width=5):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (n, height, width, 3), np.uint8)
  return sample_metrics.ImageSet(images, np.arange(n) // 4)


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'samples.npz'


@pytest.mark.parametrize('max_rows', [7, 2048])
def test_numpy_reads_the_images_in_shuffled_order(path, max_rows, monkeypatch):
  images, labels = _image_set()
  monkeypatch.setattr(neighbours, 'MAX_ROWS', max_rows)
  sample_files.write_npz(path, images, labels, seed=1)
  with np.load(path, allow_pickle=False) as arrays:
    assert sorted(arrays) == ['arr_0', 'labels']
    stored, stored_labels = arrays['arr_0'], arrays['labels']
  assert stored.dtype == np.uint8
  assert stored.shape == images.shape
  assert stored_labels.dtype == np.int64
  # Each image is found once, with its label.
  found = (stored[:, None] == images).all(axis=(2, 3, 4))
  order = found.argmax(axis=1)
  assert (found.sum(axis=0) == 1).all()
  np.testing.assert_array_equal(labels[order], stored_labels)
  # Almost no image stays next to its neighbour.
  assert np.mean(np.diff(order) == 1) < 0.3


def test_the_order_depends_on_the_seed_alone(path, tmp_path):
  for seed in (1, 1, 2):
    sample_files.write_npz(
        tmp_path / f'{len(list(tmp_path.iterdir()))}.npz', *_image_set(), seed
    )
  first, second, third = (
      (tmp_path / f'{i}.npz').read_bytes() for i in range(3)
  )
  assert first == second
  assert first != third


def test_images_may_be_a_memory_map(path):
  images, labels = _image_set()
  source = path.with_suffix('.npy')
  mapped = np.lib.format.open_memmap(source, 'w+', np.uint8, images.shape)
  mapped[:] = images
  sample_files.write_npz(path, mapped, labels, seed=1)
  content = path.read_bytes()
  sample_files.write_npz(path, images, labels, seed=1)
  assert path.read_bytes() == content


class _Failing(np.ndarray):
  """Images that cannot be read any more after a few blocks."""

  num_reads = 0

  def __getitem__(self, key):
    self.num_reads += 1
    if self.num_reads > 2:
      raise OSError('disk failed')
    return super().__getitem__(key)


def test_a_partial_file_never_appears(path, monkeypatch):
  images, labels = _image_set()
  sample_files.write_npz(path, images, labels, seed=1)
  before = path.read_bytes()
  monkeypatch.setattr(neighbours, 'MAX_ROWS', 7)
  with pytest.raises(OSError, match='disk failed'):
    sample_files.write_npz(path, images.view(_Failing), labels, seed=2)
  assert path.read_bytes() == before
  path.unlink()
  with pytest.raises(OSError, match='disk failed'):
    sample_files.write_npz(path, images.view(_Failing), labels, seed=2)
  assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ('images', 'labels', 'message'),
    [
        (np.zeros((3, 4, 4, 3)), np.arange(3), 'the file are float64'),
        (np.zeros((0, 4, 4, 3), np.uint8), np.arange(0), r'uint8 \[0, 4, 4, 3'),
        (np.zeros((3, 4, 4, 3), np.uint8), np.arange(2), 'array of 3 integers'),
    ],
)
def test_wrong_images_are_not_written(path, images, labels, message):
  with pytest.raises(ValueError, match=message):
    sample_files.write_npz(path, images, labels, seed=0)
  assert not path.exists()


@pytest.mark.parametrize('num_images', [1, 7, 10, 1003])
def test_labels_are_balanced_and_shuffled(num_images):
  labels = sample_files.balanced_labels(num_images, 10, seed=0)
  assert labels.dtype == np.int64
  counts = np.bincount(labels, minlength=10)
  assert len(counts) == 10
  assert counts.sum() == num_images
  assert np.ptp(counts) <= 1
  again = sample_files.balanced_labels(num_images, 10, seed=0)
  np.testing.assert_array_equal(again, labels)


def test_labels_have_no_order():
  labels = sample_files.balanced_labels(10_000, 10, seed=0)
  for step in (1, 10):
    # Independent labels agree in a tenth of the pairs, within 4 deviations.
    assert abs(np.mean(labels[step:] == labels[:-step]) - 0.1) < 0.012
  # Each class is at times among those with one image more.
  extra = {
      int(sample_files.balanced_labels(11, 10, seed=s)[0]) for s in range(60)
  }
  assert len(extra) == 10


def test_labels_need_images_and_classes():
  for arguments in ((0, 10), (10, 0)):
    with pytest.raises(ValueError, match='use 1 or more of both'):
      sample_files.balanced_labels(*arguments, seed=0)
