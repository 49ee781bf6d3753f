"""One data set in each of the formats: the same training."""

import io
import json
import pathlib

import chex
import jax
import numpy as np
from PIL import Image
import pyarrow
from pyarrow import parquet
import pytest
import tensorflow_datasets as tfds
import webdataset

from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import train

_ROOT = pathlib.Path(__file__).parents[2]
_CLASSES = ('n01440764', 'n01443537')
_SPLITS = {'train': 13, 'validation': 9}
_SOURCES = ('folder', 'tfds', 'webdataset', 'parquet')


def _examples(split):
  """Yields name, JPEG and label of each image, in the order of the names."""
  num = _SPLITS[split]
  for i in range(num):
    rng = np.random.default_rng(i + len(split))
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((24 + i, 20), Image.Resampling.BICUBIC).save(buffer, 'JPEG')
    yield f'{split}_{i:03}.JPEG', buffer.getvalue(), 2 * i // num


def _write_folder(root):
  for split in _SPLITS:
    for name, image, label in _examples(split):
      path = root / split / _CLASSES[label] / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(image)


def _write_tfds(root):

  class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    __module__ = 'fsq_jax.tiny'  # TFDS looks for metadata in the package.
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict({
              'image': tfds.features.Image(),
              'label': tfds.features.ClassLabel(names=_CLASSES),
          }),
          disable_shuffling=True,
      )

    def _split_generators(self, download_manager):
      del download_manager
      return {
          split: (
              (i, {'image': io.BytesIO(image), 'label': label})
              for i, (_, image, label) in enumerate(_examples(split))
          )
          for split in _SPLITS
      }

    def _generate_examples(self):
      raise NotImplementedError

  Tiny(data_dir=str(root), file_format='array_record').download_and_prepare()


def _write_webdataset(root):
  root.mkdir()
  for split in _SPLITS:
    pattern = str(root / f'{split}-%03d.tar')
    with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as shards:
      for name, image, label in _examples(split):
        key, extension = name.split('.')
        shards.write({'__key__': key, extension: image, 'cls': label})


def _write_parquet(root):
  root.mkdir()
  image = pyarrow.struct({'bytes': pyarrow.binary(), 'path': pyarrow.string()})
  features = (
      '{"info": {"features": {"image": {"_type": "Image"}, "label": {"names":'
      ' ["n01440764", "n01443537"], "_type": "ClassLabel"}}}}'
  )
  for split in _SPLITS:
    names, images, labels = zip(*_examples(split), strict=True)
    table = pyarrow.table(
        {
            'image': pyarrow.array(
                [
                    {'bytes': x, 'path': name}
                    for x, name in zip(images, names, strict=True)
                ],
                image,
            ),
            'label': labels,
        },
        metadata={'huggingface': features},
    )
    for k in range(2):
      path = root / f'{split}-{k:05}-of-00002.parquet'
      parquet.write_table(table.slice(7 * k, 7), path, row_group_size=3)


def _write_arrays(root):
  """Writes NumPy files, and a folder of the same images, of one size."""
  for split in _SPLITS:
    images, labels = [], []
    for name, image, label in _examples(split):
      image = Image.open(io.BytesIO(image)).resize((24, 20))
      path = root / split / _CLASSES[label] / name.replace('JPEG', 'png')
      path.parent.mkdir(parents=True, exist_ok=True)
      image.save(path)
      images.append(np.asarray(image))
      labels.append(label)
    np.save(root / f'{split}.npy', images)
    np.save(root / f'{split}_labels.npy', labels)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder with each of the formats."""
  root = tmp_path_factory.mktemp('formats')
  _write_folder(root / 'folder')
  _write_tfds(root / 'tfds')
  _write_webdataset(root / 'webdataset')
  _write_parquet(root / 'parquet')
  _write_arrays(root / 'arrays')
  return root


def _config(root, source, form=None):
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.data.update({
      'source': source, 'data_dir': str(root / (form or source)),
      'resize_shorter': 16, 'name': 'tiny' if source == 'tfds' else '',
      'label_names': _CLASSES if source in ('webdataset', 'arrays') else (),
  })  # fmt: skip
  config.train.num_steps = 2
  config.optim.warmup_steps = 1
  configuration.check_config(config)
  return config


@pytest.mark.parametrize('source', _SOURCES[1:])
def test_batches_labels_and_content_are_those_of_the_folder(root, source):
  def read(source, split):
    config = _config(root, source).data
    dataset = data.build_dataset(config, split=split, seed=3)
    num = 2 * len(list(_examples('train'))) // config.batch_size
    return [batch for batch, _ in zip(dataset, range(num), strict=False)]

  for split in ('train', 'eval'):
    batches, expected = read(source, split), read('folder', split)
    assert len(batches) == len(expected) >= 2
    for batch, same in zip(batches, expected, strict=True):
      chex.assert_trees_all_equal(batch, same)
    images, others = (
        data.open_source(_config(root, x).data, split)
        for x in (source, 'folder')
    )
    assert len(images) == len(others)
    assert images.label_names == others.label_names == _CLASSES
    for i in range(len(images)):
      assert images.metadata(i).label == others.metadata(i).label
      images.load(i)
      others.load(i)
    hashes = [data.content_hash(x.digests) for x in (images, others)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize('source', _SOURCES[2:])
def test_batches_are_those_of_the_folder_after_a_resume_and_in_shares(
    root, source
):
  def build(source=source, **process):
    config = _config(root, source).data
    config.batch_size = 4
    return data.build_dataset(config, split='train', seed=1, **process)

  expected = [x for x, _ in zip(build('folder'), range(7), strict=False)]
  first, restored = build().iterator(), build().iterator()
  for _ in range(3):
    next(first)
  restored.set_state(json.loads(json.dumps(first.get_state())))
  for batch in expected[3:]:
    chex.assert_trees_all_equal(next(restored), batch)
  shares = [build(process_index=i, process_count=2).iterator() for i in (0, 1)]
  for batch in expected[:3]:
    for i, share in enumerate(shares):
      np.testing.assert_array_equal(next(share)['image'], batch['image'][i::2])


@pytest.mark.parametrize('split', ['train', 'eval'])
def test_batches_and_labels_of_arrays_are_those_of_a_folder(root, split):
  arrays, images = (
      _config(root, x, 'arrays').data for x in ('arrays', 'folder')
  )
  datasets = [
      data.build_dataset(x, split=split, seed=3) for x in (arrays, images)
  ]
  batches = list(zip(*datasets, range(2), strict=False))
  assert len(batches) == 2
  for batch, same, _ in batches:
    chex.assert_trees_all_equal(batch, same)
  sources = [data.open_source(x, split) for x in (arrays, images)]
  labels = [[x.metadata(i).label for i in range(len(x))] for x in sources]
  assert labels[0] == labels[1]
  assert set(labels[0]) == {0, 1}


@pytest.mark.slow
def test_trained_parameters_are_those_of_the_folder(root, tmp_path):
  def train_on(source, form=None):
    folder = tmp_path / f'{source}_{form}'
    config = _config(root, source, form)
    return jax.device_get(train.train_and_evaluate(config, folder))

  states = {source: train_on(source) for source in _SOURCES}
  assert states['folder'].step == 2
  for source in _SOURCES[1:]:
    chex.assert_trees_all_equal(states[source], states['folder'])
  chex.assert_trees_all_equal(
      train_on('arrays'), train_on('folder', 'arrays')
  )
