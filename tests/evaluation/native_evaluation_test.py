"""Evaluation at native size: numbers against scikit-image, counts, files."""

import json
import math
import pathlib
import re

import jax
from jax import numpy as jnp
import numpy as np
from PIL import Image
import pytest
from skimage import metrics as skimage_metrics

from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import saved_model
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.evaluation import native_evaluation
from fsq_jax.evaluation import network_metrics
from fsq_jax.evaluation import saved_run
from fsq_jax.models import native_size
from fsq_jax.models.pretrained import encoder as pretrained_vit
from fsq_jax.runtime import compiled
from fsq_jax.runtime import partitioning

_ROOT = pathlib.Path(__file__).parents[2]
_ENCODER = _ROOT / 'tests/testdata/encoders/dinov2'
# By the order of their files; None is damaged, and the last one grey.
_SIZES = ((49, 33), (11, 40), None, (1, 1), (7, 9), (300, 17), (20, 24))
# What an evaluation writes at step 3.
_FILE = 'evaluation_native_step_00000003.json'
_PATCH = 4  # Pixels a side of a token, of both models.
_KINDS = {
    'tiles': {},
    'whole': {
        'model.encoder.name': 'conv',
        'model.decoder.name': 'conv',
        'model.encoder.conv.filters': 32,
        'model.encoder.conv.channel_multipliers': (1, 1, 1),
        'model.encoder.conv.num_res_blocks': 1,
    },
}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder of images of all sizes."""
  folder = tmp_path_factory.mktemp('images')
  (folder / 'validation').mkdir()
  rng = np.random.default_rng(0)
  for i, size in enumerate(_SIZES):
    path = folder / 'validation' / f'{i}.png'
    if size is None:
      path.write_bytes(b'no image')
      continue
    channels = () if i == len(_SIZES) - 1 else (3,)
    low = rng.uniform(40, 200, (*[-(-x // 8) for x in size], *channels))
    image = low.repeat(8, axis=0).repeat(8, axis=1)[: size[0], : size[1]]
    image = image + rng.normal(0, 15, image.shape)
    Image.fromarray(np.uint8(np.clip(image, 0, 255))).save(path)
  return folder


def _config(root, kind):
  """Of an evaluation of the folder; its model takes (16, 16) pixels."""
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.update_from_flattened_dict(_KINDS[kind])
  config.data.source = 'folder'
  config.data.data_dir = str(root)
  config.eval.native_size = True
  return config


def _model(config):
  """A model of random parameters."""
  model = models.build_autoencoder(config.model, config.data.image_size)
  images = jnp.zeros((1, 16, 16, 3))
  params = jax.jit(model.init)(jax.random.key(1), images)
  return model, jax.device_get(params)


@pytest.fixture(scope='module')
def built(root):
  """Models and variables of both kinds."""
  return {kind: _model(_config(root, kind)) for kind in _KINDS}


class _Runs:
  """Evaluates what stands for a run in a folder of its own."""

  def __init__(self, folder, config, model, variables):
    self.folder = folder
    self.reconstructions = []
    self._config = config
    self._own = config.copy_and_resolve_references()
    self._own.eval.native_size = False
    self._restored = model, variables

  def evaluate(self, **networks):
    """Evaluates by `evaluate_workdir`; records all reconstructions."""
    config = self._config.copy_and_resolve_references()
    config.eval.networks.update(networks)
    found = saved_model.Checkpoint(self.folder, 3, self._own, {})
    call = native_size.Reconstructor.__call__

    def recorded(reconstructor, variables, image):
      output = call(reconstructor, variables, image)
      self.reconstructions.append((image, output))
      return output

    self.reconstructions.clear()
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(native_size.Reconstructor, '__call__', recorded)
      patch.setattr(saved_model, 'find_run', lambda *args: found)
      patch.setattr(saved_model, 'restore', lambda *args: self._restored)
      return saved_run.evaluate_workdir(config, self.folder)

  def record(self):
    return json.loads((self.folder / _FILE).read_text())


@pytest.fixture(
    scope='module',
    params=[
        pytest.param('tiles', marks=pytest.mark.slow),
        pytest.param('whole', marks=pytest.mark.slow),
    ],
)
def runs(request, root, built, tmp_path_factory):
  """An evaluated run of each kind."""
  folder = tmp_path_factory.mktemp('run')
  (folder / workdirs.EVALUATION).write_text('its own')
  runs = _Runs(folder, _config(root, request.param), *built[request.param])
  runs.kind = request.param
  runs.result = runs.evaluate()
  return runs


def _originals(root):
  for i, size in enumerate(_SIZES):
    if size is not None:
      path = root / 'validation' / f'{i}.png'
      yield np.asarray(Image.open(path).convert('RGB'))


def test_every_readable_image_is_taken_whole(runs, root):
  images = list(_originals(root))
  assert [x.shape[:2] for x in images] == [x for x in _SIZES if x is not None]
  for image, (given, output) in zip(images, runs.reconstructions, strict=True):
    np.testing.assert_array_equal(given, image)
    assert output.image.shape == image.shape
  protocol = runs.record()['protocol']
  assert protocol['count'] == 7
  assert protocol['num_images'] == 6
  assert protocol['num_damaged_images'] == 1
  assert protocol['num_nonfinite_reconstructions'] == 0
  assert protocol['crop'] == 'none'
  # Those under 11 and under 7 pixels a side.
  assert protocol['num_unmeasured_images'] == {'ssim': 2, 'ssim_uniform': 1}


def test_numbers_are_those_of_scikit_image(runs):
  psnr, ssim, uniform, mse = [], [], [], []
  for image, (reconstruction, *_) in runs.reconstructions:
    pair = image, reconstruction
    psnr.append(skimage_metrics.peak_signal_noise_ratio(*pair))
    mse.append(np.mean((image / 255 - reconstruction / 255) ** 2))
    if min(image.shape[:2]) >= 11:
      ssim.append(
          skimage_metrics.structural_similarity(
              *pair, channel_axis=2, gaussian_weights=True, sigma=1.5,
              use_sample_covariance=False,
          )
      )
    if min(image.shape[:2]) >= 7:
      uniform.append(
          skimage_metrics.structural_similarity(*pair, channel_axis=2)
      )
  expected = {
      'psnr': psnr, 'ssim': ssim, 'ssim_uniform': uniform, 'mse': mse
  }
  assert [len(x) for x in expected.values()] == [6, 4, 5, 6]
  actual = runs.record()['metrics']
  for name, values in expected.items():
    assert actual[name] == pytest.approx(np.mean(values), rel=1e-5), name


def test_tokens_that_see_the_image_are_counted(runs):
  tokens = []
  for image, output in runs.reconstructions:
    rows, columns = (math.ceil(x / _PATCH) for x in image.shape[:2])
    assert output.indices.shape >= (rows, columns)
    tokens.append(output.indices[:rows, :columns].ravel())
  tokens = np.concatenate(tokens)
  codebook = runs.record()['codebook']
  assert codebook['num_tokens'] == len(tokens)
  assert codebook['num_used_codes'] == len(np.unique(tokens)) > 3
  padded = sum(output.indices.size for _, output in runs.reconstructions)
  assert (padded > len(tokens)) == (runs.kind == 'tiles')


@pytest.mark.slow
def test_the_protocol_says_what_is_done_to_images(runs):
  text = runs.record()['protocol']['native_size']
  sides = {'tiles': '16 x 16', 'whole': '4 x 4'}[runs.kind]
  assert text.startswith(f'sides padded to multiples of {sides} pixels by')
  assert ('in tiles of 16 x 16' in text) == (runs.kind == 'tiles')


def test_evaluation_is_deterministic_and_keeps_the_files_of_the_run(runs):
  path = runs.folder / _FILE
  first = path.read_bytes()
  path.unlink()
  runs.evaluate()
  assert path.read_bytes() == first
  assert (runs.folder / workdirs.EVALUATION).read_text() == 'its own'
  assert {x.name for x in runs.folder.iterdir()} == {
      _FILE, workdirs.EVALUATION, workdirs.RECONSTRUCTIONS
  }
  (grid,) = (runs.folder / workdirs.RECONSTRUCTIONS).iterdir()
  assert grid.name == 'native_step_00000003.png'


def test_the_grid_has_the_middle_of_images_on_white(runs, root):
  images = list(_originals(root))
  # The tallest is cut to 256 rows; the widest has 40 columns.
  assert runs.result.originals.shape == (6, 256, 40, 3)
  # 20 x 24 of 256 x 40, and 300 x 17 cut to 256 x 17.
  small = runs.result.originals[-1]
  np.testing.assert_array_equal(small[118:138, 8:32], images[-1])
  assert (small[:118] == 255).all()
  assert (small[138:] == 255).all()
  np.testing.assert_array_equal(
      runs.result.originals[-2][:, 11:28], images[-2][22:278]
  )
  np.testing.assert_array_equal(
      runs.result.reconstructions[-1][118:138, 8:32],
      runs.reconstructions[-1][1].image,
  )


@pytest.mark.slow
def _evaluator(root, built, num_devices, folder, **networks):
  config = _config(root, 'tiles')
  mesh = partitioning.create_mesh(
      {'data': num_devices, 'fsdp': 1}, jax.devices()[:num_devices]
  )
  dataset = data.build_dataset(config.data, split='eval_native', seed=0)
  return native_evaluation.NativeEvaluator(
      built['tiles'][0], dataset, mesh, (16, 16),
      num_grid_images=4,
      networks=network_metrics.NetworkMetrics(
          networks, mesh, images=dataset.fingerprint, folder=folder
      ),
  )


@pytest.mark.slow
def test_networks_measure_images_as_they_are(root, built, tmp_path):
  run = _Runs(tmp_path, _config(root, 'tiles'), *built['tiles'])
  result = run.evaluate(fd_encoder=str(_ENCODER))
  encoder = models.load_encoder(_ENCODER, final_affine=False)
  apply = jax.jit(encoder.module.apply)

  def moments(images):
    features = [
        np.mean(
            apply(encoder.variables, np.float32(x)[None] / 127.5 - 1),
            axis=(0, 1, 2), dtype=np.float64,
        )
        for x in images
    ]
    return np.mean(features, axis=0), np.cov(features, rowvar=False)

  pairs = [(image, output.image) for image, output in run.reconstructions]
  (m1, s1), (m2, s2) = (moments(x) for x in zip(*pairs, strict=True))
  roots = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real
  distance = np.sum((m1 - m2) ** 2) + np.trace(s1 + s2) - 2 * np.sum(roots)
  assert result.metrics['fd_encoder'] == pytest.approx(distance, rel=1e-4)
  # Now from kept statistics, which are not those of the run's crops.
  path = tmp_path / _FILE
  first = path.read_bytes()
  assert len(list((tmp_path / workdirs.REFERENCES).iterdir())) == 1
  run.evaluate(fd_encoder=str(_ENCODER))
  assert path.read_bytes() == first


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize('num_devices', [1, 2])
def test_devices_do_not_change_the_numbers(root, built, num_devices):
  expected = _evaluator(root, built, 8, None).run(built['tiles'][1])
  actual = _evaluator(root, built, num_devices, None).run(built['tiles'][1])
  assert actual.metrics == pytest.approx(expected.metrics, rel=1e-6)
  assert actual.codebook == expected.codebook
  assert actual.protocol == expected.protocol


@pytest.mark.slow
def test_an_image_that_needs_too_much_memory_is_named_and_skipped(
    root, built, monkeypatch, caplog
):
  reconstruct = native_size.Reconstructor.__call__

  def fails_on_tall(reconstructor, variables, image):
    if len(image) == 300:
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory.')
    return reconstruct(reconstructor, variables, image)

  expected = _evaluator(root, built, 8, None).run(built['tiles'][1])
  monkeypatch.setattr(native_size.Reconstructor, '__call__', fails_on_tall)
  result = _evaluator(root, built, 8, None).run(built['tiles'][1])
  path = str(root / 'validation' / '5.png')
  assert result.protocol['num_images'] == 5
  assert result.protocol['num_skipped_images'] == 1
  reasons = {path: '300 x 17 pixels: RESOURCE_EXHAUSTED: Out of memory.'}
  assert result.protocol['skipped_images'] == reasons
  assert path in caplog.text
  assert np.isfinite(list(result.metrics.values())).all()
  assert expected.protocol['num_skipped_images'] == 0
  # A fault of the code is none of an image.
  def broken(reconstructor, variables, image):
    raise ValueError('broken')

  monkeypatch.setattr(native_size.Reconstructor, '__call__', broken)
  with pytest.raises(ValueError, match='broken'):
    _evaluator(root, built, 8, None).run(built['tiles'][1])


@pytest.mark.slow
@pytest.mark.slow
def test_error_names_the_first_image_if_none_can_be_evaluated(
    root, built, monkeypatch
):
  monkeypatch.setattr(compiled, 'free_bytes', lambda: 1000)
  with pytest.raises(ValueError, match=r'No image .*/0\.png.* GiB of memory'):
    _evaluator(root, built, 8, None).run(built['tiles'][1])


@pytest.mark.slow
def test_network_metric_skips_images_that_exceed_memory(
    root, built, monkeypatch
):
  evaluator = _evaluator(root, built, 8, None, fd_encoder=str(_ENCODER))
  check = compiled.check_memory

  def check_memory(jitted, variables, arrays):
    if arrays[0].shape[1] == 300:
      raise compiled.TooLargeError('too much')
    check(jitted, variables, arrays)

  monkeypatch.setattr(compiled, 'check_memory', check_memory)
  protocol = evaluator.run(built['tiles'][1]).protocol
  assert protocol['num_skipped_images'] == 0
  assert protocol['num_unmeasured_images']['fd_encoder'] == 1
  path = str(root / 'validation' / '5.png')
  assert protocol['unmeasured_images'][path].endswith('fd_encoder too much')


@pytest.mark.slow
def test_nonfinite_reconstructions_are_counted(root, built):
  variables = jax.tree.map(np.array, built['tiles'][1])
  variables['params']['decoder']['pixels']['bias'][0] = np.inf
  result = _evaluator(root, built, 8, None).run(variables)
  assert result.protocol['num_nonfinite_reconstructions'] == 6
  assert np.isnan(list(result.metrics.values())).all()
  assert result.codebook['num_tokens'] > 0


@pytest.mark.slow
def test_images_below_the_minimum_size_are_counted(
    root, built, monkeypatch
):
  monkeypatch.setattr(
      pretrained_vit.PretrainedVit, 'min_side', 17, raising=False
  )
  result = _evaluator(root, built, 8, None, fd_encoder=str(_ENCODER)).run(
      built['tiles'][1]
  )
  assert result.protocol['num_unmeasured_images']['fd_encoder'] == 3
  named = result.protocol['unmeasured_images']
  assert named[str(root / 'validation' / '3.png')] == (
      '1 x 1 pixels: ssim takes 11 pixels a side or more; ssim_uniform takes 7'
      ' pixels a side or more; fd_encoder takes 17 pixels a side or more'
  )
  assert np.isfinite(result.metrics['fd_encoder'])


@pytest.mark.fast_limit(10)
def test_native_size_is_rejected_in_training_and_has_a_label(root, built):
  config = _config(root, 'tiles')
  with pytest.raises(ValueError, match=r'eval\.native_size is True.*--mode='):
    evaluators.build_evaluator(config, built['tiles'][0], None, None, None)
  own = config.copy_and_resolve_references()
  own.data.data_dir = '/other'
  label = saved_run.evaluation_label(config, own, 'best')
  folder = pathlib.Path(config.data.data_dir).name
  assert re.fullmatch(
      f'best_native_folder_{folder}_validation_[0-9a-f]{{8}}', label
  )


def test_grid_images_are_cropped_and_padded_to_one_size():
  images = [
      np.full((height, width, 3), i, np.uint8)
      for i, (height, width) in enumerate([(4, 10), (6, 3), (300, 2)])
  ]
  laid = native_evaluation.lay_on_white(images[:2])
  assert laid.shape == (2, 6, 10, 3)
  np.testing.assert_array_equal(laid[0, 1:5], 0)
  assert np.all(laid[0, [0, 5]] == 255)
  np.testing.assert_array_equal(laid[1, :, 3:6], 1)
  assert np.sum(laid[1] == 1) == 6 * 3 * 3
  # Of large ones the middle is shown.
  cut = [native_evaluation.crop_centre(x) for x in images]
  assert native_evaluation.lay_on_white(cut).shape == (3, 256, 10, 3)
