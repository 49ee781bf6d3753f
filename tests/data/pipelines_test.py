"""Batches: order, resume, processes, evaluation, fingerprints; transforms."""

import hashlib
import json
import math
import tracemalloc

import grain
import ml_collections
import numpy as np
from PIL import Image
import pytest

from fsq_jax import data
from fsq_jax.data import photos
from fsq_jax.data import pipelines
from fsq_jax.data import transforms

_SIZES = ((8, 8), (12, 8), (8, 16))


def _config(**overrides) -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict({
      'source': 'photos',
      'name': '',
      'data_dir': '',
      'train_split': 'train',
      'eval_split': 'validation',
      'image_size': (8, 8),
      'batch_size': 8,
      'eval_batch_size': 8,
      'resize_shorter': 0,
      'label_names': (),
      'crop_scale': (1.0, 2.0),
      'flip': True,
      'color_jitter': 0.0,
      'max_damaged_share': 0.01,
      'cache_mib': 1,
      'num_threads': 2,
      'prefetch': 16,
  })
  config.update(overrides)
  return config


def _folder(root, num_images: int, split: str = 'train'):
  """Writes 8x8 images whose every pixel is their number; returns root."""
  (root / split).mkdir(parents=True, exist_ok=True)
  for i in range(num_images):
    pixels = np.full((8, 8, 3), i, np.uint8)
    Image.fromarray(pixels).save(root / split / f'{i:03}.png')
  return root


def _folder_config(root, **overrides) -> ml_collections.ConfigDict:
  return _config(source='folder', data_dir=str(root), **overrides)


def _take(batches, num: int) -> list[dict[str, np.ndarray]]:
  iterator = iter(batches)
  return [next(iterator) for _ in range(num)]


def _assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def _noise(height: int, width: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


# Training order.


@pytest.mark.parametrize('source', ['photos', 'synthetic'])
def test_train_batches_repeat_with_their_seed_and_any_threads(source):
  config = _config(source=source)
  first = _take(data.build_dataset(config, split='train', seed=3), 3)
  assert first[0]['image'].shape == (8, 8, 8, 3)
  assert first[0]['image'].dtype == np.uint8
  assert first[0]['index'].shape == (8,)
  assert first[0]['index'].dtype == np.int64
  config.update(num_threads=5, prefetch=1)
  again = _take(data.build_dataset(config, split='train', seed=3), 3)
  _assert_equal(first, again)
  other = _take(data.build_dataset(config, split='train', seed=4), 3)
  assert not np.array_equal(first[0]['index'], other[0]['index'])


def test_neighbouring_seeds_do_not_share_epochs(tmp_path):
  config = _folder_config(_folder(tmp_path, 24))

  def epochs(seed):
    batches = _take(data.build_dataset(config, split='train', seed=seed), 9)
    order = np.concatenate([batch['index'] for batch in batches])
    return order.reshape(3, 24).tolist()

  orders = epochs(0) + epochs(1)
  assert all(sorted(order) == list(range(24)) for order in orders)
  assert len({tuple(order) for order in orders}) == 6


def test_augmentation_differs_between_epochs_and_examples(tmp_path):
  (tmp_path / 'train').mkdir()
  for name in 'ab':
    Image.fromarray(_noise(64, 64)).save(tmp_path / 'train' / f'{name}.png')
  config = _folder_config(tmp_path, batch_size=2)
  batches = _take(data.build_dataset(config, split='train', seed=0), 8)
  crops = {image.tobytes() for batch in batches for image in batch['image']}
  assert len(crops) == 16


@pytest.mark.parametrize('count', [1, 2])
def test_batches_of_one_have_the_order_of_larger_ones(tmp_path, count):
  root = _folder(tmp_path, 5)

  def order(batch_size, num, **share):
    config = _folder_config(root, batch_size=batch_size, crop_scale=(0.5, 1.0))
    return _take(
        data.build_dataset(config, split='train', seed=2, **share), num
    )

  expected = order(4, 3)
  shares = [
      order(count, 12 // count, process_index=i, process_count=count)
      for i in range(count)
  ]
  for step in range(12):
    batch = shares[step % count][step // count]
    for key in ('image', 'index'):
      np.testing.assert_array_equal(
          batch[key], expected[step // 4][key][step % 4 : step % 4 + 1]
      )


def test_a_state_of_batches_of_one_continues(tmp_path):
  config = _folder_config(_folder(tmp_path, 3), batch_size=1)
  iterator = data.build_dataset(config, split='train', seed=0).iterator()
  for _ in range(4):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  restored = data.build_dataset(config, split='train', seed=0).iterator()
  restored.set_state(state)
  for _ in range(4):
    _assert_equal([next(iterator)], [next(restored)])


def test_batches_may_be_larger_than_the_split(tmp_path, caplog):
  root = _folder(tmp_path, 3)
  batches = _take(
      data.build_dataset(
          _folder_config(root, batch_size=4), split='train', seed=0
      ),
      3,
  )
  order = np.concatenate([batch['index'] for batch in batches])
  assert [sorted(x) for x in order.reshape(4, 3).tolist()] == [[0, 1, 2]] * 4
  assert 'batch_size is 4, but the training split has 3' in caplog.text
  (one,) = _take(
      data.build_dataset(
          _folder_config(_folder(tmp_path / 'one', 1), batch_size=4),
          split='train', seed=0,
      ),
      1,
  )
  assert one['index'].tolist() == [0] * 4


def test_an_order_is_longer_than_any_run():
  # And in float64, in which Grain computes, still exact.
  for num in (1, 3, 2**31):
    examples = data.repeat_endlessly(grain.MapDataset.range(num))
    assert 2**51 < len(examples) <= 2**53


def test_restored_state_continues_in_the_middle_of_an_epoch(tmp_path):
  config = _folder_config(_folder(tmp_path, 11), batch_size=4)
  straight = _take(data.build_dataset(config, split='train', seed=0), 9)
  iterator = data.build_dataset(config, split='train', seed=0).iterator()
  for _ in range(4):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  restored = data.build_dataset(config, split='train', seed=0).iterator()
  next(restored)
  restored.set_state(state)
  _assert_equal(straight[4:], [next(restored) for _ in range(5)])


def test_a_saved_state_gives_the_images_of_earlier_versions():
  config = _config(crop_scale=(1.0, 1.0), batch_size=16)
  iterator = data.build_dataset(config, split='train', seed=0).iterator()
  # In the second epoch.
  iterator.set_state({'next_index': 705})
  batch = next(iterator)
  assert batch['index'][:4].tolist() == [2681, 9358, 3133, 1646]
  digest = hashlib.sha256(batch['image']).hexdigest()
  assert digest[:16] == '2f3753dd4cc448d3'


@pytest.mark.parametrize('color_jitter', [0.0, 0.5])
def test_an_image_depends_on_its_position_in_training_alone(color_jitter):
  config = _config(image_sizes=_SIZES, color_jitter=color_jitter)
  dataset = data.build_dataset(
      config, split='train', seed=5, process_index=1, process_count=2
  )
  source = photos.TrainPhotos()
  seed = np.random.SeedSequence(5).generate_state(2)[1]
  key = np.random.Philox(int(seed)).state['state']['key']
  for step, batch in enumerate(_take(dataset, 6)):
    for i, image in enumerate(batch['image']):
      counter = np.array([0, 0, 0, 8 * step + 2 * i + 1], np.uint64)
      photo = source.load(int(batch['index'][i]))
      expected = transforms.augment(
          photo,
          np.random.Generator(np.random.Philox(key=key, counter=counter)),
          size=image.shape[:2], crop_scale=(1.0, 2.0), flip=True,
          color_jitter=color_jitter,
      )
      np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize('count', [2, 4])
@pytest.mark.parametrize('split', ['train', 'eval'])
def test_a_step_has_the_same_examples_for_any_process_count(split, count):
  config = _config(source='synthetic')

  def steps(index, count):
    dataset = data.build_dataset(
        config, split=split, seed=0, process_index=index, process_count=count
    )
    return _take(dataset, 3)

  whole = steps(0, 1)
  parts = [steps(index, count) for index in range(count)]
  for step, expected in enumerate(whole):
    shares = [part[step] for part in parts]
    assert all(len(share['index']) == 8 // count for share in shares)
    merged = {k: np.concatenate([s[k] for s in shares]) for k in expected}
    order = np.argsort(merged['index'])
    expected_order = np.argsort(expected['index'])
    for key in expected:
      np.testing.assert_array_equal(
          merged[key][order], expected[key][expected_order]
      )


def _sizes(batches):
  return [batch['image'].shape[1:3] for batch in batches]


def test_every_batch_has_a_size_of_its_own_number():
  config = _config(source='synthetic', image_sizes=_SIZES, num_threads=3)

  def build(seed=0, **share):
    return data.build_dataset(config, split='train', seed=seed, **share)

  straight = _take(build(), 12)
  assert set(_sizes(straight)) == set(_SIZES)
  # Resumed, by other threads.
  iterator = build().iterator()
  for _ in range(5):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  config.update(num_threads=1, prefetch=1)
  restored = build().iterator()
  restored.set_state(state)
  _assert_equal(straight[5:], [next(restored) for _ in range(7)])
  # In two processes, each with half of the batch.
  parts = [
      _take(build(process_index=i, process_count=2), 12) for i in range(2)
  ]
  for whole, even, odd in zip(straight, *parts, strict=True):
    np.testing.assert_array_equal(even['image'], whole['image'][::2])
    np.testing.assert_array_equal(odd['image'], whole['image'][1::2])
  assert _sizes(_take(build(seed=1), 12)) != _sizes(straight)


def test_sizes_leave_the_order_of_images_as_it_is():
  config = _config(source='photos', crop_scale=(1.0, 1.0), flip=False)
  one = _take(data.build_dataset(config, split='train', seed=0), 4)
  fingerprint = data.build_dataset(config, split='train', seed=0).fingerprint
  assert 'image_sizes' not in fingerprint
  config.update(image_sizes=())
  _assert_equal(
      one, _take(data.build_dataset(config, split='train', seed=0), 4)
  )
  config.update(image_sizes=_SIZES)
  dataset = data.build_dataset(config, split='train', seed=0)
  several = _take(dataset, 4)
  for left, right in zip(one, several, strict=True):
    np.testing.assert_array_equal(left['index'], right['index'])
  changed = {'image_sizes': [[8, 8], [12, 8], [8, 16]]}
  assert dataset.fingerprint == fingerprint | changed
  with pytest.raises(ValueError, match=r'image_sizes: None -> \[\[8, 8\]'):
    data.check_fingerprint(fingerprint, dataset.fingerprint)


def test_unscaled_crops_are_pixels_of_their_photograph():
  config = _config(crop_scale=(1.0, 1.0), flip=False, image_size=(16, 24))
  dataset = data.build_dataset(config, split='train', seed=0)
  (batch,) = _take(dataset, 1)
  source = photos.TrainPhotos()
  for image, index in zip(batch['image'], batch['index'], strict=True):
    windows = np.lib.stride_tricks.sliding_window_view(
        source.load(index), (16, 24), axis=(0, 1)
    )
    found = (windows[..., 0, 0] == image[0, 0]).all(-1)
    candidates = windows[found].transpose(0, 2, 3, 1)
    assert (candidates == image).all((1, 2, 3)).any()


class _Given(data.ImageSource):
  """A source of arrays, made anew by each load."""

  def __init__(self, *images):
    super().__init__('given', 'train', 'given')
    self.images = images

  def __len__(self):
    return len(self.images)

  def load(self, index):
    return self.images[index].copy()

  def describe(self, index):
    return f'image {index}'


def _build(split, source, **overrides):
  build = {'train': pipelines.build_train, 'eval': pipelines.build_eval,
           'eval_native': pipelines.build_native}[split]  # fmt: skip
  return build(_config(**overrides), source, 0, slice(0, None, 1))


@pytest.mark.parametrize('size', [(32, 32), (40, 50)])  # A part, and all.
@pytest.mark.parametrize('split', ['train', 'eval'])
def test_peak_memory_of_a_batch_is_bounded(split, size):
  source = _Given(*[np.full((400, 500, 3), i, np.uint8) for i in range(32)])
  source.load = lambda index: np.full((400, 500, 3), index, np.uint8)
  kwargs = {
      'image_size': size, 'batch_size': 32, 'eval_batch_size': 32,
      'crop_scale': (1.0, 1.0), 'num_threads': 1, 'prefetch': 1,
  }  # fmt: skip
  if size == (40, 50):
    kwargs['crop_scale'] = (2.0, 4.0)
  _take(_build(split, source, **kwargs), 1)
  tracemalloc.start()
  _take(_build(split, source, **kwargs), 1)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  # The batch in parts and whole, and two photographs; not 32, 19 MB.
  assert peak < 2 * 32 * 3 * size[0] * size[1] + 3 * 400 * 500 * 3


@pytest.mark.parametrize('split', ['train', 'eval'])
def test_batches_of_one_are_no_views_of_the_source(split):
  image = _noise(8, 8)
  source = _Given(image)
  source.load = lambda index: image
  (batch,) = _take(_build(split, source, batch_size=1, eval_batch_size=1), 1)
  assert batch['image'].shape == (1, 8, 8, 3)
  assert not np.may_share_memory(batch['image'], image)


@pytest.mark.parametrize('split', ['train', 'eval', 'eval_native'])
@pytest.mark.parametrize(
    'image',
    [
        np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8),
        np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.int32),
    ],
    ids=['float32', 'grey', 'CHW', 'RGBA', 'batch', 'int32'],
)  # fmt: skip
def test_images_of_another_type_or_layout_are_refused(split, image):
  with pytest.raises(ValueError, match=r'image 0 is .*; images are uint8'):
    _take(_build(split, _Given(image)), 1)


@pytest.mark.parametrize('split', ['train', 'eval', 'eval_native'])
@pytest.mark.parametrize('value', [0, 1])
def test_black_images_are_taken(split, value):
  image = np.full((8, 8, 3), value, np.uint8)
  (batch,) = _take(_build(split, _Given(image)), 1)
  assert (batch['image'][0] == value).all()


# Images that are scaled up.


@pytest.mark.parametrize(
    ('size', 'resize_shorter', 'upscaled'),
    [
        ((8, 8), 0, False),
        ((7, 20), 0, True),
        ((20, 7), 0, True),
        ((16, 20), 16, False),
        ((15, 20), 16, True),  # By resizing.
        ((16, 16), 8, False),
        ((9, 40), 7, True),  # By the crop of what was resized.
    ],
)
def test_images_that_are_scaled_up_are_counted(
    tmp_path, caplog, size, resize_shorter, upscaled
):
  for split in ('train', 'validation'):
    (tmp_path / split).mkdir()
    for i, shape in enumerate([size, (30, 30), size]):
      path = tmp_path / split / f'{i}.png'
      Image.fromarray(_noise(*shape)).save(path)
  config = _folder_config(tmp_path, resize_shorter=resize_shorter)
  # 30 x 30 pixels are enough, unless they are resized to 7.
  expected = [upscaled, resize_shorter == 7, upscaled]
  dataset = data.build_dataset(config, split='eval', seed=0)
  for _ in range(2):  # The second time from memory.
    (batch,) = list(dataset)
    assert batch['upscaled'].tolist() == [*expected, *[False] * 5]
  assert dataset.upscaled == sum(expected)
  warnings = [x for x in caplog.messages if 'Scaled up so far: 1 of 3' in x]
  assert len(warnings) == any(expected)
  training = data.build_dataset(config, split='train', seed=0)
  _take(training, 1)
  assert training.upscaled == sum(expected)


def test_whole_images_are_scaled_up_by_resizing_alone(tmp_path):
  (tmp_path / 'validation').mkdir()
  for i, side in enumerate([5, 12]):
    path = tmp_path / 'validation' / f'{i}.png'
    Image.fromarray(_noise(side, side)).save(path)
  for resize_shorter, expected in ((0, [False, False]), (12, [True, False])):
    config = _folder_config(tmp_path, resize_shorter=resize_shorter)
    dataset = data.build_dataset(config, split='eval_native', seed=0)
    assert [bool(batch['upscaled'][0]) for batch in dataset] == expected


def test_every_tenfold_of_upscaled_images_is_a_warning(caplog):
  source = _Given(*[_noise(4, 4)] * 150)
  list(_build('eval', source))
  counts = [text.split(' of ')[0] for text in caplog.messages]
  assert counts == [f'Scaled up so far: {i}' for i in (1, 10, 100)]


# Evaluation.


@pytest.mark.parametrize(('num_images', 'batch_size'), [(1, 4), (8, 4), (9, 4)])
@pytest.mark.parametrize('count', [1, 2])
def test_eval_covers_every_example_once(
    tmp_path, num_images, batch_size, count
):
  root = _folder(tmp_path, num_images, 'validation')
  config = _folder_config(root, eval_batch_size=batch_size)
  seen = []
  for process in range(count):
    dataset = data.build_dataset(
        config, split='eval', seed=0, process_index=process, process_count=count
    )
    batches = list(dataset)
    assert len(batches) == dataset.num_batches
    assert dataset.num_batches == math.ceil(num_images / batch_size)
    for batch in batches:
      assert batch['mask'].dtype == bool
      assert batch['image'].shape == (batch_size // count, 8, 8, 3)
      assert not batch['image'][~batch['mask']].any()
      seen += batch['index'][batch['mask']].tolist()
      np.testing.assert_array_equal(
          batch['image'][batch['mask'], 0, 0, 0],
          batch['index'][batch['mask']],
      )
  assert sorted(seen) == list(range(num_images))
  assert dataset.num_examples == dataset.protocol['count'] == num_images


def test_native_images_come_one_by_one_as_they_are(tmp_path):
  folder = tmp_path / 'validation'
  folder.mkdir()
  images = [_noise(5, 9), _noise(1, 1), None, _noise(12, 8)]
  for i, image in enumerate(images):
    if image is None:
      (folder / f'{i}.png').write_bytes(b'no image')
    else:
      Image.fromarray(image).save(folder / f'{i}.png')
  dataset = data.build_dataset(
      _folder_config(tmp_path), split='eval_native', seed=0
  )
  batches = list(dataset)
  assert len(batches) == dataset.num_batches == dataset.num_examples == 4
  for i, (image, batch) in enumerate(zip(images, batches, strict=True)):
    assert batch['index'].tolist() == [i]
    assert batch['mask'].tolist() == [image is not None]
    assert batch['image'].dtype == np.uint8
    if image is not None:
      np.testing.assert_array_equal(batch['image'], image[None])
  assert dataset.damaged == 1
  assert dataset.protocol['crop'] == 'none'
  small = _folder_config(tmp_path, image_size=(4, 4), resize_shorter=6)
  resized = data.build_dataset(small, split='eval_native', seed=0)
  shapes = [batch['image'].shape for batch in resized]
  assert shapes == [(1, 6, 11, 3), (1, 6, 6, 3), (1, 1, 1, 3), (1, 9, 6, 3)]
  # What statistics of the originals are kept under.
  assert resized.fingerprint != dataset.fingerprint
  crops = data.build_dataset(_folder_config(tmp_path), split='eval', seed=0)
  assert crops.fingerprint['content'] == dataset.fingerprint['content']
  assert crops.fingerprint['crop'] != dataset.fingerprint['crop']


def test_protocol_names_what_numbers_depend_on(tmp_path):
  root = _folder(tmp_path, 3, 'validation')
  config = _folder_config(root, resize_shorter=9)
  protocol = data.build_dataset(config, split='eval', seed=0).protocol
  expected = {
      'data_dir': str(root.resolve()),
      'source': 'folder',
      'split': 'validation',
      'count': 3,
      'crop': '8x8, centre crop, smaller images scaled up',
      'resize': 'shorter side to 9',
      'kernel': 'Pillow bicubic, antialiased',
  }
  assert protocol == expected
  for name in ('a.json', 'b.JSON', 'c.heic'):
    (root / 'validation' / name).write_bytes(b'')
  protocol = data.build_dataset(config, split='eval', seed=0).protocol
  assert protocol == expected | {'skipped_files': {'.json': 2, '.heic': 1}}


# Damaged images.


def test_damaged_images_are_replaced_in_training(tmp_path):
  root = _folder(tmp_path, 12)
  for number in (3, 4, 11):
    (root / 'train' / f'{number:03}.png').write_bytes(b'')
  config = _folder_config(root, batch_size=4, max_damaged_share=0.25)
  dataset = data.build_dataset(config, split='train', seed=0)
  batches = _take(dataset, 3)
  shown = sorted(np.concatenate([batch['index'] for batch in batches]))
  # 3 and 4 give way to 5, and 11 to 0.
  assert shown == [0, 0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10]
  for batch in batches:
    np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['index'])
  assert dataset.damaged == 3
  _assert_equal(batches, _take(dataset, 3))
  assert dataset.damaged == 3


def test_damaged_images_are_masked_in_evaluation(tmp_path):
  root = _folder(tmp_path, 6, 'validation')
  (root / 'validation' / '002.png').write_bytes(b'no image')
  dataset = data.build_dataset(_folder_config(root), split='eval', seed=0)
  (batch,) = list(dataset)
  expected = [True, True, False, True, True, True, False, False]
  assert batch['mask'].tolist() == expected
  assert not batch['image'][2].any()
  assert dataset.damaged == 1


@pytest.mark.parametrize('share', [0.0, 0.1])
def test_more_damage_than_allowed_stops_with_a_list(tmp_path, share):
  root = _folder(tmp_path, 12, 'validation')
  # 0.1 of 12 images rounds up to 2.
  for number in range(1 if share == 0 else 3):
    (root / 'validation' / f'{number:03}.png').write_bytes(b'')
  config = _folder_config(root, max_damaged_share=share, num_threads=1)
  with pytest.raises(ValueError, match='max_damaged_share') as caught:
    list(data.build_dataset(config, split='eval', seed=0))
  assert '000.png' in str(caught.value)


# Configs and fingerprints.


@pytest.mark.slow
@pytest.mark.parametrize('source', ['photos', 'synthetic'])
def test_train_once_is_every_training_image_as_evaluation_takes_it(source):
  config = _config(source=source, batch_size=4, eval_batch_size=40)
  dataset = data.build_dataset(config, split='train_once', seed=0)
  evaluation = data.build_dataset(config, split='eval', seed=0)
  assert dataset.num_examples != evaluation.num_examples
  if source == 'synthetic':
    training = data.build_dataset(config, split='train', seed=0)
    assert dataset.num_examples == training.num_examples
  batches = list(dataset)
  seen = np.concatenate([b['index'][b['mask']] for b in batches])
  assert sorted(seen) == list(range(dataset.num_examples))
  # Training repeats seven photographs, of which it takes random crops.
  images = {x.tobytes() for b in batches for x in b['image'][b['mask']]}
  assert len(images) == dataset.num_examples > 8000
  first, again = (next(iter(dataset))['image'] for _ in range(2))
  np.testing.assert_array_equal(first, again)


def test_unknown_names_and_processes_are_refused():
  for overrides, options, message in (
      ({}, {'split': 'test'},
       r"'test'; known: \['eval', 'eval_native', 'train', 'train_once'\]"),
      ({'source': 'nowhere'}, {},
       r"'nowhere'; known: .*'folder', 'parquet', 'photos'"),
      ({}, {'process_index': 2, 'process_count': 2}, 'process_index is 2 of 2'),
      ({'batch_size': 9}, {'process_count': 2},
       r'batch_size is 9.* share a batch, 2'),
      ({'eval_batch_size': 7}, {'process_count': 2}, 'eval_batch_size is 7'),
  ):
    with pytest.raises(ValueError, match=message):
      data.build_dataset(
          _config(**overrides), **{'split': 'train', 'seed': 0, **options}
      )


@pytest.mark.parametrize(
    ('change', 'line'),
    [
        ({'batch_size': 4}, 'batch_size: 8 -> 4'),
        ({'image_size': (8, 4)}, r'image_size: \[8, 8\] -> \[8, 4\]'),
        ({'crop_scale': (1.0, 1.5)}, r'crop_scale: \[1.0, 2.0\] -> '),
        ({'flip': False}, 'flip: True -> False'),
        ({'resize_shorter': 16}, 'resize_shorter: 0 -> 16'),
        ({'source': 'synthetic'}, "source: 'photos' -> 'synthetic'"),
    ],
)
def test_fingerprint_tells_what_changed(change, line):
  def fingerprint(**overrides):
    config = _config(**overrides)
    return data.build_dataset(config, split='train', seed=0).fingerprint

  saved = json.loads(json.dumps(fingerprint()))
  with pytest.raises(ValueError, match=rf'\n  {line}') as caught:
    data.check_fingerprint(saved, fingerprint(**change))
  if 'source' not in change:
    assert str(caught.value).count(' -> ') == 2  # the heading and one line


def test_fingerprint_ignores_irrelevant_fields():
  saved = data.build_dataset(_config(), split='train', seed=0).fingerprint
  assert saved['process_count'] == 1
  current = data.build_dataset(
      _config(num_threads=3, prefetch=99),
      split='train',
      seed=0,
      process_count=2,
  ).fingerprint
  data.check_fingerprint(json.loads(json.dumps(saved)), current)
  other_seed = data.build_dataset(_config(), split='train', seed=1).fingerprint
  with pytest.raises(ValueError, match='seed: 0 -> 1'):
    data.check_fingerprint(saved, other_seed)
  with pytest.raises(ValueError, match='seed: 0 -> None'):
    data.check_fingerprint(saved, {k: saved[k] for k in saved if k != 'seed'})


@pytest.mark.parametrize('change', ['added', 'renamed', 'rewritten'])
def test_fingerprint_changes_with_the_files(tmp_path, change):
  root = _folder(tmp_path, 8)

  def fingerprint():
    config = _folder_config(root)
    return data.build_dataset(config, split='train', seed=0).fingerprint

  saved = fingerprint()
  assert fingerprint() == saved
  file = root / 'train' / '003.png'
  if change == 'added':
    (root / 'train' / 'x.png').write_bytes(file.read_bytes())
  elif change == 'renamed':
    file.rename(root / 'train' / 'x.png')
  else:
    Image.fromarray(_noise(8, 8)).save(file)
  with pytest.raises(ValueError, match='content: '):
    data.check_fingerprint(saved, fingerprint())
