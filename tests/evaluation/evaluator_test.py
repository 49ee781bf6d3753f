"""Tests of evaluation: every image once, honest numbers, clear refusals."""

import errno
import hashlib
import json
import pathlib
import re
import shlex
import shutil
import sys

import jax
from jax import numpy as jnp
import numpy as np
from PIL import Image
import pytest
import skimage

from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.evaluation import image_metrics
from fsq_jax.evaluation import network_metrics
from fsq_jax.evaluation import results as results_lib
from fsq_jax.evaluation import saved_run
from fsq_jax.models import pixels as pixels_lib
from fsq_jax.quantizers import none
from fsq_jax.report import report as reports
from fsq_jax.runtime import partitioning

_DEBUG = pathlib.Path(__file__).parents[2] / 'configs' / 'debug.py'
_NUM_IMAGES = 256  # Of the synthetic evaluation split.
_NUM_TOKENS = 16  # An image.


@pytest.fixture(scope='module')
def config():
  """The debug config."""
  return configuration.load_config(_DEBUG)


@pytest.fixture(scope='module')
def model(config):
  """Its model."""
  return models.build_autoencoder(config.model, config.data.image_size)


@pytest.fixture(scope='module')
def variables(model):
  """Parameters at random, larger than initial ones, so that codes vary."""
  shape = (1, 16, 16, 3)
  params = jax.jit(model.init)(jax.random.key(1), jnp.zeros(shape))
  return jax.device_get(jax.tree.map(lambda x: 2 * x, params))


@pytest.fixture(scope='module')
def run(config, tmp_path_factory):
  """Folder of a finished run."""
  folder = tmp_path_factory.mktemp('run')
  train.train_and_evaluate(config, folder)
  return folder


def _dataset(config, batch_size):
  config = config.copy_and_resolve_references()
  config.data.eval_batch_size = batch_size
  return data.build_dataset(config.data, split='eval', seed=0)


def _evaluate(config, model, variables, *, batch_size=32, num_devices=8,
              num_grid_images=8):
  mesh = partitioning.create_mesh(
      {'data': num_devices, 'fsdp': 1}, jax.devices()[:num_devices]
  )
  evaluator = evaluators.Evaluator(
      model,
      _dataset(config, batch_size),
      mesh,
      num_grid_images=num_grid_images,
  )
  return evaluator.run(jax.device_put(variables, partitioning.replicated(mesh)))


# Builds the model of this file.
@pytest.mark.fast_limit(10)
def test_metrics_match_numpy(config, model, variables):
  evaluation = _evaluate(config, model, variables)
  (batch,) = _dataset(config, _NUM_IMAGES)
  floats = batch['image'].astype(np.float32) / 127.5 - 1
  output = jax.jit(model.apply)(variables, floats)

  pixels = (np.asarray(output.reconstructions, np.float64) + 1) * 127.5
  pixels = np.rint(np.clip(pixels, 0, 255))
  error = (pixels - batch['image']) / 255
  mse = np.mean(error**2, axis=(1, 2, 3))
  assert evaluation.metrics['psnr'] == pytest.approx(
      np.mean(-10 * np.log10(mse)), rel=1e-5
  )
  assert evaluation.metrics['mse'] == pytest.approx(np.mean(mse), rel=1e-5)
  assert evaluation.metrics['l1'] == pytest.approx(
      np.mean(np.abs(error)), rel=1e-5
  )
  counts = np.bincount(np.ravel(output.indices), minlength=512)
  shares = counts[counts > 0] / counts.sum()
  assert counts.sum() == _NUM_IMAGES * _NUM_TOKENS
  assert 20 < np.sum(counts > 0) < 512
  assert evaluation.codebook['num_tokens'] == counts.sum()
  assert evaluation.codebook['usage'] == np.sum(counts > 0) / 512
  assert evaluation.codebook['entropy_bits'] == pytest.approx(
      -np.sum(shares * np.log2(shares)), rel=1e-9
  )
  assert evaluation.scalars().keys() == {
      'psnr', 'ssim', 'ssim_uniform', 'l1', 'mse', 'identical', 'usage',
      'perplexity', 'entropy_bits', 'entropy_share',
  }
  # Evenly spread.
  shown = np.arange(8) * _NUM_IMAGES // 8
  np.testing.assert_array_equal(evaluation.originals, batch['image'][shown])
  np.testing.assert_array_equal(evaluation.reconstructions, pixels[shown])


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'codebook_size', 'indices_a_code', 'num_dims'),
    [
        ('residual_fsq', 512, 2, 3),
        ('vq', 512, 1, 0),
        ('lfq', 512, 1, 9),
    ],
)
def test_tokens_of_every_kind_are_counted(
    config, name, codebook_size, indices_a_code, num_dims
):
  config = config.copy_and_resolve_references()
  config.model.quantizer.name = name
  model = models.build_autoencoder(config.model, config.data.image_size)
  variables = jax.jit(model.init)(
      jax.random.key(1), jnp.zeros((1, 16, 16, 3))
  )
  evaluation = _evaluate(config, model, variables)
  (batch,) = _dataset(config, _NUM_IMAGES)
  indices = jax.jit(
      lambda x: model.apply(variables, pixels_lib.to_float(x)).indices
  )(batch['image'])
  codebook = evaluation.codebook
  assert codebook['codebook_size'] == codebook_size
  assert codebook['num_tokens'] == indices.size
  assert indices.size == _NUM_IMAGES * _NUM_TOKENS * indices_a_code
  assert codebook['num_used_codes'] == len(np.unique(indices))
  # Levels are of quantizers whose indices have digits.
  assert len(codebook.get('level_histograms', ())) == num_dims


@pytest.mark.slow
def test_without_tokens_there_are_no_codebook_statistics(config, tmp_path):
  config = config.copy_and_resolve_references()
  config.model.quantizer.name = 'none'
  model = models.build_autoencoder(config.model, config.data.image_size)
  variables = jax.jit(model.init)(
      jax.random.key(1), jnp.zeros((1, 16, 16, 3))
  )
  evaluation = _evaluate(config, model, variables)
  assert evaluation.codebook == {}
  assert evaluation.scalars() == evaluation.metrics
  assert evaluation.summary() == (
      f'PSNR {evaluation.metrics["psnr"]:.2f} dB, SSIM'
      f' {evaluation.metrics["ssim"]:.3f}'
  )
  (batch,) = _dataset(config, _NUM_IMAGES)
  step = jax.jit(evaluators.build_eval_step(model))
  psnr = step(variables, batch['image']).metrics['psnr']
  assert evaluation.metrics['psnr'] == pytest.approx(
      np.mean(jax.device_get(psnr)), rel=1e-5
  )
  results_lib.write_evaluation(tmp_path, 3, evaluation)
  record = json.loads((tmp_path / workdirs.EVALUATION).read_text())
  assert record['codebook'] == {}
  assert record['protocol']['quantizer'] == model.quantizer.spec()


def test_a_summary_has_the_numbers_of_images_and_codebook(
    config, model, variables
):
  evaluation = _evaluate(config, model, variables)
  numbers = evaluation.scalars()
  assert evaluation.summary() == (
      f'PSNR {numbers["psnr"]:.2f} dB, SSIM {numbers["ssim"]:.3f}, codebook'
      f' usage {numbers["usage"]:.1%} ({evaluation.codebook["num_used_codes"]}'
      f' of {model.quantizer.codebook_size} codes), perplexity'
      f' {numbers["perplexity"]:.1f}'
  )


@pytest.mark.slow
@pytest.mark.parametrize(
    ('batch_size', 'num_devices'),
    [(7, 1), (24, 8)],
)
def test_batches_and_devices_do_not_change_the_numbers(
    config, model, variables, batch_size, num_devices
):
  expected = _evaluate(config, model, variables)
  actual = _evaluate(
      config,
      model,
      variables,
      batch_size=batch_size,
      num_devices=num_devices,
  )
  assert actual.protocol == expected.protocol
  assert actual.protocol['num_images'] == _NUM_IMAGES
  assert actual.codebook == expected.codebook
  assert actual.metrics == pytest.approx(expected.metrics, rel=1e-6, abs=1e-6)
  np.testing.assert_array_equal(actual.originals, expected.originals)
  np.testing.assert_array_equal(
      actual.reconstructions, expected.reconstructions
  )


class _Poisoned:
  """A model whose reconstructions of bright images are not finite."""

  def __init__(self, model, threshold):
    self.quantizer = model.quantizer
    self._model = model
    self._threshold = threshold

  def apply(self, variables, images):
    output = self._model.apply(variables, images)
    bright = jnp.mean(images, axis=(1, 2, 3), keepdims=True) > self._threshold
    return output._replace(
        reconstructions=jnp.where(bright, jnp.inf, output.reconstructions)
    )


def test_nonfinite_reconstructions_are_reported(
    config, model, variables, tmp_path
):
  (batch,) = _dataset(config, _NUM_IMAGES)
  brightness = np.mean(
      batch['image'].astype(np.float64) / 127.5 - 1, axis=(1, 2, 3)
  )
  threshold = np.mean(np.sort(brightness)[-3:-1])  # Two are brighter.
  evaluation = _evaluate(config, _Poisoned(model, threshold), variables)
  assert evaluation.protocol['num_nonfinite_reconstructions'] == 2
  assert evaluation.protocol['num_images'] == _NUM_IMAGES
  assert np.isnan(list(evaluation.metrics.values())).all()
  assert evaluation.codebook['num_tokens'] == _NUM_IMAGES * _NUM_TOKENS

  results_lib.write_evaluation(tmp_path, 3, evaluation)
  record = json.loads((tmp_path / workdirs.EVALUATION).read_text())
  assert set(record['metrics'].values()) == {None}
  assert record['codebook']['usage'] == evaluation.codebook['usage']
  assert record['step'] == 3
  assert [p.name for p in (tmp_path / workdirs.RECONSTRUCTIONS).iterdir()] == [
      'step_00000003.png'
  ]


def test_photographs_are_joined_from_their_tiles(config, tmp_path):
  config = config.copy_and_resolve_references()
  config.data.update(
      {'source': 'photos', 'image_size': (64, 96), 'eval_batch_size': 16}
  )
  dataset = data.build_dataset(config.data, split='eval', seed=0)
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  sums = results_lib.EvaluationSums(
      none.NoQuantizer(code_dim=1),
      network_metrics.NetworkMetrics({}, mesh, images={}),
      dataset,
      num_grid_images=1,
  )
  for batch in dataset:
    inverted = 255 - batch['image']
    ones = np.ones(len(inverted), np.float32)
    metrics = dict.fromkeys(image_metrics.IMAGE_METRICS, ones)
    output = results_lib.EvalOutput(metrics, ones[:0], inverted)
    sums.update(batch, output, batch['image'], inverted)
  result = sums.result()
  folder = pathlib.Path(skimage.__file__).parent / 'data'
  assert list(result.photographs) == ['coffee', 'chelsea']
  for name, pair in result.photographs.items():
    photo = np.asarray(Image.open(folder / f'{name}.png'))
    height, width = np.array(photo.shape[:2]) // (64, 96) * (64, 96)
    photo = photo[:height, :width]
    np.testing.assert_array_equal(pair, [photo, 255 - photo])

  results_lib.write_evaluation(tmp_path, 5, result)
  pictures = tmp_path / workdirs.RECONSTRUCTIONS
  assert {path.name for path in pictures.iterdir()} == {
      'step_00000005.png', 'step_00000005_chelsea.png',
      'step_00000005_coffee.png',
  }
  picture = np.asarray(Image.open(pictures / 'step_00000005_coffee.png'))
  np.testing.assert_array_equal(
      picture[-384:, -576:], result.photographs['coffee'][1]
  )
  record = json.loads((tmp_path / workdirs.EVALUATION).read_text())
  assert list(record) == ['step', 'metrics', 'codebook', 'protocol']


class _Faded:
  """A model of images of any size, which halves their contrast."""

  quantizer = none.NoQuantizer(code_dim=1)

  def apply(self, variables, images):
    del variables
    no_tokens = jnp.zeros((len(images), 0, 0), jnp.int32)
    return models.AutoencoderOutput(images / 2, 0.0, no_tokens, images)


def test_other_sizes_are_evaluated_too(config, tmp_path):
  config = config.copy_and_resolve_references()
  config.data.update(
      {'image_sizes': ((16, 16), (24, 16)), 'eval_batch_size': 64}
  )
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  dataset = _dataset(config, 64)
  result = evaluators.build_evaluator(
      config, _Faded(), dataset, mesh, tmp_path
  ).run({})
  config.data.image_sizes = ()
  config.data.image_size = (24, 16)
  alone = evaluators.build_evaluator(
      config, _Faded(), _dataset(config, 64), mesh, tmp_path
  ).run({})
  assert list(result.at_sizes) == ['24x16']
  other = result.at_sizes['24x16']
  assert (other.metrics, other.protocol) == (alone.metrics, alone.protocol)
  scalars = result.scalars()
  assert scalars['psnr_24x16'] == alone.metrics['psnr'] != scalars['psnr']
  assert result.lines()[-1] == (
      'images at 24x16: 256 measured, 0 unreadable, 0 with a reconstruction'
      ' that is not finite'
  )
  assert f'PSNR {alone.metrics["psnr"]:.2f} dB at 24x16' in result.summary()

  results_lib.write_evaluation(tmp_path, 5, result)
  record = json.loads((tmp_path / workdirs.EVALUATION).read_text())
  assert record['metrics'] == result.metrics
  assert record['protocol']['crop'].startswith('16x16')
  (sized,) = record['image_sizes'].values()
  assert sized['metrics'] == alone.metrics
  assert sized['protocol']['crop'].startswith('24x16')
  pictures = tmp_path / workdirs.RECONSTRUCTIONS
  assert {path.name for path in pictures.iterdir()} == {
      'step_00000005.png', 'step_00000005_24x16.png',
  }
  text = pathlib.Path(reports.write_report(tmp_path)).read_text()
  assert '<th>24x16</th>' in text
  assert '<figcaption>24x16</figcaption>' in text
  assert 'Held-out photographs' not in text


class _SomeDamaged:
  """Two batches of eight grey images, of which some cannot be read."""

  num_examples = 16
  tiles = ()
  protocol = {}  # noqa: RUF012
  fingerprint = {'content': 'grey'}  # noqa: RUF012
  digests = np.zeros((0, 32), np.uint8)

  def __init__(self, damaged):
    self._damaged = list(damaged)
    # As if another process had read them.
    self.damaged = 0

  def __iter__(self):
    for start in (0, 8):
      index = np.arange(start, start + 8)
      images = np.zeros((8, 16, 16, 3), np.uint8) + index[:, None, None, None]
      mask = ~np.isin(index, self._damaged)
      yield {
          'image': images.astype(np.uint8),
          'index': index,
          'mask': mask,
          'upscaled': index % 2 == 0,
      }


@pytest.mark.slow
@pytest.mark.parametrize(
    ('damaged', 'num_grid_images', 'shown'),
    [
        ([], 4, [0, 4, 8, 12]),
        ([0], 1, [1]),
        ([4, 5, 6, 7, 8], 4, [0, 9, 10, 12]),
        ([12, 13, 14, 15], 4, [0, 4, 8]),
        ([], 100, list(range(16))),
    ],
)
def test_grid_skips_unreadable_images(
    model, variables, damaged, num_grid_images, shown
):
  evaluator = evaluators.Evaluator(
      model,
      _SomeDamaged(damaged),
      partitioning.create_mesh({'data': 8, 'fsdp': 1}),
      num_grid_images=num_grid_images,
  )
  evaluation = evaluator.run(variables)
  assert evaluation.originals[:, 0, 0, 0].tolist() == shown
  assert len(evaluation.reconstructions) == len(shown)
  assert evaluation.protocol['num_images'] == 16 - len(damaged)
  assert evaluation.protocol['num_damaged_images'] == len(damaged)
  upscaled = set(range(0, 16, 2)) - set(damaged)
  assert evaluation.protocol['num_upscaled_images'] == len(upscaled)


def test_split_without_readable_images_is_rejected(model, variables):
  evaluator = evaluators.Evaluator(
      model,
      _SomeDamaged(range(16)),
      partitioning.create_mesh({'data': 8, 'fsdp': 1}),
      num_grid_images=4,
  )
  with pytest.raises(ValueError, match='No image of the evaluation split'):
    evaluator.run(variables)


@pytest.mark.slow
def test_evaluation_of_a_run_reproduces_its_metrics(config, run, tmp_path):
  folder = tmp_path / 'copy'
  shutil.copytree(run, folder)
  expected = (run / workdirs.EVALUATION).read_bytes()
  (folder / workdirs.EVALUATION).unlink()
  (folder / workdirs.REPORT).unlink()
  config = config.copy_and_resolve_references()
  config.data.eval_batch_size = 56  # Not a divisor of the split.
  evaluation = saved_run.evaluate_workdir(config, folder)
  actual = json.loads((folder / workdirs.EVALUATION).read_text())
  expected = json.loads(expected)
  assert actual.pop('metrics') == pytest.approx(
      expected.pop('metrics'), rel=1e-6, abs=1e-6
  )
  assert actual == expected
  assert actual['step'] == config.train.num_steps
  assert evaluation.codebook['usage'] == actual['codebook']['usage']
  assert (folder / workdirs.REPORT).is_file()
  # It reads: the other checkpoint and the rows are still there.
  assert sorted(p.name for p in (folder / workdirs.CHECKPOINTS).iterdir()) == [
      '4', '8',
  ]
  name = workdirs.METRICS
  assert (folder / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.slow
def test_the_newest_checkpoint_is_evaluated(config, run, tmp_path):
  folder = tmp_path / 'copy'
  shutil.copytree(run, folder)
  shutil.rmtree(folder / workdirs.CHECKPOINTS / '8')
  saved_run.evaluate_workdir(config, folder)
  rows = [r for r in workdirs.read_metrics(run) if r['split'] == 'eval']
  record = json.loads((folder / workdirs.EVALUATION).read_text())
  assert record['step'] == rows[0]['step'] == 4
  assert record['metrics']['psnr'] == rows[0]['psnr'] != rows[1]['psnr']


@pytest.mark.slow
def test_other_evaluations_keep_the_files_of_the_run(
    config, run, tmp_path
):
  folder = tmp_path / 'copy'
  shutil.copytree(run, folder)
  before = {
      path: path.read_bytes() for path in folder.rglob('*') if path.is_file()
  }
  best = saved_run.evaluate_workdir(config, folder, which='best')
  config = config.copy_and_resolve_references()
  config.data.source = 'photos'
  saved_run.evaluate_workdir(config, folder)
  new = {
      re.sub(
          r'_[0-9a-f]{8}(?=_step_)',
          '_HASH',
          path.relative_to(folder).as_posix(),
      )
      for path in folder.rglob('*')
      if path.is_file() and path not in before
  }
  rows = [r for r in workdirs.read_metrics(run) if r['split'] == 'eval']
  top = max(rows, key=lambda row: row['psnr'])
  assert new == {
      f'evaluation_best_step_{top["step"]:08d}.json',
      f'reconstructions/best_step_{top["step"]:08d}.png',
      'evaluation_photos_validation_HASH_step_00000008.json',
      'reconstructions/photos_validation_HASH_step_00000008.png',
      'reconstructions/photos_validation_HASH_step_00000008_chelsea.png',
      'reconstructions/photos_validation_HASH_step_00000008_coffee.png',
  }
  assert best.metrics['psnr'] == pytest.approx(top['psnr'], rel=1e-6)
  assert all(path.read_bytes() == data for path, data in before.items())


def _folder(root, values):
  """A folder of images, each of one grey value."""
  (root / 'validation').mkdir(parents=True)
  for i, value in enumerate(values):
    image = Image.fromarray(np.full((20, 24, 3), value, np.uint8))
    image.save(root / 'validation' / f'{i:02}.bmp')
  return str(root)


def test_labels_of_evaluations_are_distinct(config, tmp_path, monkeypatch):
  def label(which='newest', **overrides):
    given = config.copy_and_resolve_references()
    given.data.update({'source': 'folder', **overrides})
    return saved_run.evaluation_label(given, config, which)

  for name in ('a', 'b'):
    _folder(tmp_path / name / 'photos', [1])
  first = str(tmp_path / 'a' / 'photos')
  labels = [
      label(data_dir=first),
      label(data_dir=str(tmp_path / 'b' / 'photos')),
      label(data_dir=first, resize_shorter=32),
      label(data_dir=first, resize_shorter=64),
      label(data_dir=first, eval_split='a b'),
      label(data_dir=first, eval_split='a_b'),
      label(data_dir=first, which='best'),
      label(data_dir=first, which='4'),
      label(data_dir=first, image_sizes=((16, 16), (32, 16))),
  ]
  assert len({x.casefold() for x in labels}) == len(labels)
  assert re.fullmatch(r'folder_photos_validation_[0-9a-f]{8}', labels[0])
  # The same images, however they are named.
  monkeypatch.chdir(tmp_path / 'b')
  assert label(data_dir='../a/photos') == label(data_dir=f'{first}/')
  assert label(data_dir='../a/photos') == labels[0]
  assert label(data_dir=first, image_sizes=((32, 16), (16, 16))) == labels[-1]
  for which, own in (('newest', ''), ('best', 'best')):
    assert saved_run.evaluation_label(config, config, which) == own


@pytest.mark.slow
def test_evaluations_of_several_steps_are_kept(tmp_path):
  image = np.zeros((1, 8, 8, 3), np.uint8)
  for label in ('', 'best', 'native'):
    for step in (4, 8):
      evaluation = results_lib.Evaluation({'psnr': step}, {}, {}, image, image)
      results_lib.write_evaluation(tmp_path, step, evaluation, label)
  steps = {
      path.name: json.loads(path.read_text())['metrics']['psnr']
      for path in tmp_path.glob('*.json')
  }
  assert steps == {
      'evaluation.json': 8,
      'evaluation_best_step_00000004.json': 4,
      'evaluation_best_step_00000008.json': 8,
      'evaluation_native_step_00000004.json': 4,
      'evaluation_native_step_00000008.json': 8,
  }
  assert len(list((tmp_path / workdirs.RECONSTRUCTIONS).iterdir())) == 6


@pytest.mark.slow
def test_the_protocol_has_folder_content_and_command(
    config, model, variables, tmp_path
):
  def run(root, batch_size=8):
    given = config.copy_and_resolve_references()
    given.data.update({'source': 'folder', 'data_dir': root})
    return _evaluate(given, model, variables, batch_size=batch_size).protocol

  first = run(_folder(tmp_path / 'a', range(12)))
  assert first['data_dir'] == str(tmp_path / 'a')
  assert first['command'] == shlex.join(sys.argv)
  digests = [
      hashlib.sha256(path.read_bytes()).digest()
      for path in sorted((tmp_path / 'a' / 'validation').iterdir())
  ]
  assert first['content'] == hashlib.sha256(b''.join(digests)).hexdigest()
  # The same files elsewhere, and other ones of the same sizes.
  copy = run(_folder(tmp_path / 'b', range(12)), batch_size=16)
  assert copy['content'] == first['content']
  other = run(_folder(tmp_path / 'c', range(1, 13)))
  assert other['content'] != first['content']
  sizes = [
      [x.stat().st_size for x in sorted((tmp_path / name).rglob('*.bmp'))]
      for name in 'ac'
  ]
  assert sizes[0] == sizes[1]
  # Of images that are not stored encoded the source has the hash.
  dataset = _dataset(config, 32)
  protocol = _evaluate(config, model, variables).protocol
  assert protocol['content'] == dataset.fingerprint['content']


def test_cached_images_keep_their_content(config, model, variables, tmp_path):
  config = config.copy_and_resolve_references()
  config.data.update(
      {'source': 'folder', 'data_dir': _folder(tmp_path, range(12))}
  )
  mesh = partitioning.create_mesh({'data': 8, 'fsdp': 1})
  evaluator = evaluators.Evaluator(
      model, _dataset(config, 8), mesh, num_grid_images=1
  )
  first = evaluator.run(variables).protocol
  for path in (tmp_path / 'validation').iterdir():
    path.unlink()
  assert evaluator.run(variables).protocol == first


def test_the_lines_say_how_many_images_were_measured(model, variables):
  evaluator = evaluators.Evaluator(
      model,
      _SomeDamaged([1, 3]),
      partitioning.create_mesh({'data': 8, 'fsdp': 1}),
      num_grid_images=1,
  )
  result = evaluator.run(variables)
  assert result.lines()[-1] == (
      'images: 14 measured, 2 unreadable, 0 with a reconstruction that is not'
      ' finite'
  )
  result.protocol.update(
      num_skipped_images=1, num_unmeasured_images={'ssim': 3}
  )
  assert result.lines()[-1].endswith('finite, 1 skipped, 3 without ssim')


def _refuse_writing(monkeypatch, folder):
  """Makes a folder read-only, for root too."""
  touch, mkdir = pathlib.Path.touch, pathlib.Path.mkdir
  opened = open

  def check(path, mode):
    path = pathlib.Path(path) if isinstance(path, str | pathlib.Path) else None
    if path and path.is_relative_to(folder) and set(mode) & set('wax+'):
      raise PermissionError(errno.EACCES, 'Permission denied', str(path))

  def checked_open(path, mode='r', *args, **kwargs):
    check(path, mode)
    return opened(path, mode, *args, **kwargs)

  def checked_touch(path, *args, **kwargs):
    check(path, 'w')
    touch(path, *args, **kwargs)

  def checked_mkdir(path, *args, **kwargs):
    if not path.is_dir():
      check(path, 'w')
    mkdir(path, *args, **kwargs)

  monkeypatch.setattr('builtins.open', checked_open)
  monkeypatch.setattr(pathlib.Path, 'touch', checked_touch)
  monkeypatch.setattr(pathlib.Path, 'mkdir', checked_mkdir)


@pytest.fixture
def saved(tmp_path):
  """A copy of a finished run, and its config."""
  folder = pathlib.Path(__file__).parents[1] / 'testdata' / 'run'
  shutil.copytree(folder, tmp_path / 'run')
  text = (tmp_path / 'run' / workdirs.CONFIG).read_text()
  return tmp_path / 'run', configuration.config_from_json(text)


@pytest.mark.slow
def test_read_only_run_is_evaluated_to_an_output_folder(
    saved, tmp_path, monkeypatch
):
  folder, config = saved
  before = {x: x.read_bytes() for x in folder.rglob('*') if x.is_file()}
  _refuse_writing(monkeypatch, folder)
  shown = []
  with pytest.raises(
      ValueError, match=r'run cannot be written .*another folder with --output'
  ):
    saved_run.evaluate_workdir(config, folder, show=shown.append)
  assert not shown
  output = tmp_path / 'new' / 'output'
  result = saved_run.evaluate_workdir(
      config, folder, output=output, show=shown.append
  )
  numbers, paths = shown
  assert numbers[:-1] == result.lines()
  assert re.fullmatch(rf'Step \d+: {re.escape(result.summary())}', numbers[-1])
  assert paths == [output / workdirs.EVALUATION]
  record = json.loads((output / workdirs.EVALUATION).read_text())
  assert record['metrics']['psnr'] == result.metrics['psnr']
  assert sorted(x.name for x in output.iterdir()) == [
      workdirs.EVALUATION, workdirs.RECONSTRUCTIONS, workdirs.REPORT
  ]
  # The page has the new numbers and the run's curves.
  page = (output / workdirs.REPORT).read_text()
  assert f'{record["metrics"]["psnr"]:.2f} dB' in page
  assert '<h1>run</h1>' in page
  assert 'learning_rate' in page
  after = {x: x.read_bytes() for x in folder.rglob('*') if x.is_file()}
  assert after == before


def test_numbers_are_shown_before_they_are_written(saved, monkeypatch):
  folder, config = saved
  shown = []

  def fail(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(results_lib, 'write_evaluation', fail)
  with pytest.raises(RuntimeError, match=r'No space left.*with --output'):
    saved_run.evaluate_workdir(config, folder, show=shown.append)
  (lines,) = shown
  assert any(line.startswith('psnr: ') for line in lines)


@pytest.mark.slow
def test_damaged_checkpoints_are_never_evaluated(config, run, tmp_path):
  folder = shutil.copytree(run, tmp_path / 'copy')
  newest = folder / workdirs.CHECKPOINTS / '8'
  for path in (newest / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(b'')
  # The numbers of another step are not what was asked for.
  with pytest.raises(ValueError, match=r'Step 8: .*STEP takes .* \[4, 8'):
    saved_run.evaluate_workdir(config, folder)
  saved_run.evaluate_workdir(config, folder, which='4')
  path = folder / 'evaluation_checkpoint_step_00000004.json'
  record = json.loads(path.read_text())
  assert record['step'] == 4
  # Without a record it is no step at all.
  (newest / 'record' / 'metadata').unlink()
  saved_run.evaluate_workdir(config, folder)
  record = json.loads((folder / workdirs.EVALUATION).read_text())
  assert record['step'] == 4
  with pytest.raises(ValueError, match=r"no intact checkpoint '8'"):
    saved_run.evaluate_workdir(config, folder, which='8')
  with pytest.raises(ValueError, match=r"is 'last'; allowed: 'newest', 'best'"):
    saved_run.evaluate_workdir(config, folder, which='last')


@pytest.mark.slow
def test_another_model_is_refused(config, run):
  config = config.copy_and_resolve_references()
  config.model.quantizer.fsq.levels = (8, 5, 5)
  config.optim.learning_rate = 0.1
  before = (run / workdirs.EVALUATION).stat()
  with pytest.raises(ValueError, match='another model') as error:
    saved_run.evaluate_workdir(config, run)
  assert str(error.value).splitlines()[1:] == [
      'model.quantizer.fsq.levels: (8, 8, 8) -> (8, 5, 5)'
  ]
  assert (run / workdirs.EVALUATION).stat() == before


def test_a_folder_without_checkpoints_is_refused(config, tmp_path):
  folder = tmp_path / 'none'
  with pytest.raises(ValueError, match='none is not a folder; give the w'):
    saved_run.evaluate_workdir(config, folder)
  assert not folder.exists()
  (folder / workdirs.CHECKPOINTS).mkdir(parents=True)
  with pytest.raises(ValueError, match='has no checkpoint: nothing was tr'):
    saved_run.evaluate_workdir(config, folder)


def test_indivisible_batch_size_is_rejected(config, tmp_path):
  config = config.copy_and_resolve_references()
  config.data.eval_batch_size = 7
  with pytest.raises(
      ValueError, match=r'eval_batch_size is 7, .*; allowed: a multiple of 8'
  ):
    saved_run.evaluate_workdir(config, tmp_path)


def test_the_evaluation_step_scores_uint8_images(config, model, variables):
  (batch,) = _dataset(config, _NUM_IMAGES)
  output = jax.eval_shape(
      evaluators.build_eval_step(model), variables, batch['image'][:4]
  )
  assert output.reconstructions.dtype == jnp.uint8
  assert output.reconstructions.shape == (4, 16, 16, 3)
  assert output.indices.dtype == jnp.int32
  assert output.indices.shape == (4, 4, 4)
  assert {x.shape for x in output.metrics.values()} == {(4,)}
