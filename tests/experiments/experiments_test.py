"""Tests of the experiments: sweeps go on, READMEs show what was measured."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import chex
import jax
from jax import numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest

from experiments import sweep
from experiments.benchmarks import benchmarks
from experiments.codebook_size import codebook_size
from experiments.export import across_versions
from experiments.fault_suite import run as fault_suite
from experiments.fsq_recipe import frozen_codes
from experiments.fsq_recipe import patches
from experiments.fsq_recipe import recipe
from experiments.fsq_recipe import variants
from experiments.generation import cifar10
from experiments.generation import digits
from experiments.generation import sampling_cost
from experiments.onnx import to_onnx
from experiments.perceptual_ablation import perceptual_ablation
from experiments.quantizer_comparison import compare
from experiments.quantizer_comparison import settings
from experiments.vqrae_frozen_vit import vqrae_frozen_vit
from fsq_jax import configuration
from fsq_jax import quantizers
from fsq_jax.models import autoencoder
from fsq_jax.models import builder as model_builder
from fsq_jax.models import projectors
from fsq_jax.quantizers import builder

_ROOT = pathlib.Path(__file__).parents[2]
_DEBUG = 'configs/debug.py'
_SCRIPTS = {
    'codebook_size': codebook_size,
    'fsq_recipe': recipe,
    'perceptual_ablation': perceptual_ablation,
    'quantizer_comparison': compare,
    'vqrae_frozen_vit': vqrae_frozen_vit,
}


def _results(name):
  path = _ROOT / 'experiments' / name / 'results.json'
  return json.loads(path.read_text(encoding='utf-8'))


@pytest.mark.slow
def test_a_sweep_trains_what_is_not_trained_yet(tmp_path, monkeypatch):
  runs = {
      'levels': {'model.quantizer.fsq.levels': (5, 5), 'train.num_steps': 3},
      'vq': {'model.quantizer.name': 'vq', 'train.num_steps': 3},
  }
  sweep.train(_DEBUG, {'levels': runs['levels']}, tmp_path)
  assert sweep.read_numbers(tmp_path / 'levels')['codebook_size'] == 25
  grid = tmp_path / 'grid.png'
  sweep.draw_reconstructions(
      tmp_path, ['levels', 'levels'], grid, num_images=5, enlargement=2
  )
  pixels = np.asarray(PIL.Image.open(grid))
  # Originals over both runs, 16 x 16 pixels each.
  assert pixels.shape == (2 * 3 * 16, 2 * 5 * 16, 3)
  originals, first, second = np.split(pixels, 3)
  np.testing.assert_array_equal(first, second)
  assert np.any(originals != first)
  started = []

  def run(command):
    started.append(command)
    return 75

  monkeypatch.setattr(sweep, '_run', run)
  with pytest.raises(SystemExit) as stopped:
    sweep.train(_DEBUG, runs, tmp_path)
  assert stopped.value.code == 75
  (command,) = started
  assert f'--workdir={tmp_path / "vq"}' in command
  assert '--config.model.quantizer.name=vq' in command
  # A run of other steps is not the one that is asked for.
  runs['levels']['train.num_steps'] = 4
  started.clear()
  with pytest.raises(SystemExit):
    sweep.train(_DEBUG, runs, tmp_path)
  assert '--config.train.num_steps=4' in started[0]
  collected = sweep.collect(tmp_path, ['levels'])
  assert set(collected) == {'made_with', 'runs'}
  assert collected['made_with']['devices']


@pytest.mark.slow
def test_a_sweep_that_is_stopped_has_saved_its_run(tmp_path):
  script = (
      'import pathlib, sys; from experiments import sweep; sweep.train('
      f"'{_DEBUG}', {{'long': {{'train.num_steps': 1000000}}}},"
      ' pathlib.Path(sys.argv[1]))'
  )
  process = subprocess.Popen(
      [sys.executable, '-c', script, str(tmp_path)],
      cwd=_ROOT,
      start_new_session=True,
  )
  checkpoints = tmp_path / 'long' / 'checkpoints'
  deadline = time.monotonic() + 300
  while not list(checkpoints.glob('[1-9]*')):
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.1)
  # To the sweep alone; Ctrl-C in a terminal reaches both.
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=120) == 75
  # The run is over, and its last step is on disk, where it would go on.
  steps = [int(path.name) for path in checkpoints.glob('[0-9]*')]
  rows = (tmp_path / 'long' / 'metrics.jsonl').read_text().splitlines()
  assert max(steps) >= max(json.loads(row)['step'] for row in rows)
  size = (tmp_path / 'long' / 'metrics.jsonl').stat().st_size
  time.sleep(1)
  assert (tmp_path / 'long' / 'metrics.jsonl').stat().st_size == size


def test_every_run_has_a_config_that_can_be_used(tmp_path):
  runs = settings.tuning_runs('')
  for bits in (4, 6, 8, 9, 10, 11, 12, 14, 16):
    for quantizer in settings.LABELS:
      name = settings.run_name(quantizer, bits, 0)
      runs[name] = settings.final_run(quantizer, bits, 0, '')
  runs |= {**recipe.screening_runs(''), **recipe.final_runs('')}
  runs |= recipe.photo_runs(str(tmp_path))
  for fields in runs.values():
    configuration.check_config(sweep.make_config(settings.CONFIG, fields))


@pytest.mark.parametrize(
    'name', [x for x in variants.QUANTIZERS if x != 'latent_codebook']
)
def test_variants_of_fsq_change_training_alone(name, monkeypatch):
  monkeypatch.setattr(builder, 'QUANTIZERS', dict(builder.QUANTIZERS))
  plain = quantizers.FSQ((8, 5), commitment_weight=0.0)
  variants.install(name)
  variant = builder.build_quantizer({
      'name': 'fsq', 'levels': (8, 5), 'commitment_weight': 0.0
  })  # fmt: skip
  assert variant.spec() == plain.spec()
  z = jax.random.normal(jax.random.key(0), (16, 10, 2))

  def apply(fsq, train):
    def total(z):
      out, _ = fsq.apply(
          fsq.init({}, z), z, train=train, mutable=['batch_stats'],
          rngs={'quantizer': jax.random.key(1)},
      )
      return out.z_q.sum(), out

    (_, out), gradient = jax.value_and_grad(total, has_aux=True)(z)
    return out, gradient

  expected, gradient = apply(plain, train=True)
  chex.assert_trees_all_equal(apply(variant, train=False), (expected, gradient))
  out, changed = apply(variant, train=True)
  np.testing.assert_array_equal(out.indices, expected.indices)
  differs = np.any(out.z_q != expected.z_q, axis=-1)
  if name == 'unrounded_dimensions_25':
    dimensions = np.any(out.z_q != expected.z_q, axis=1)
    assert set(np.asarray(dimensions.sum(axis=1))) == {0, 1, 2}
  elif name.startswith('unrounded'):
    # Whole images, at about this rate.
    assert set(np.mean(np.asarray(differs), axis=1)) == {0, 1}
  elif name.startswith('noise'):
    assert differs.all()
    np.testing.assert_array_equal(changed, gradient)
  elif name.startswith('dithered'):
    assert 0 < differs.mean() < 1
    np.testing.assert_array_equal(changed, gradient)
  else:
    assert not differs.any()
    assert np.abs(changed - gradient).max() > 0.1


def test_annealed_variants_end_as_fsq(monkeypatch):
  monkeypatch.setattr(builder, 'QUANTIZERS', dict(builder.QUANTIZERS))
  variants.install('noise_annealed_50')
  fsq = builder.build_quantizer({'name': 'fsq', 'levels': (8, 5)})
  z = jax.random.normal(jax.random.key(0), (16, 10, 2))
  expected = quantizers.FSQ((8, 5)).apply({}, z).z_q

  def error(step):
    out, state = fsq.apply(
        {'batch_stats': {'step': step}}, z, train=True, mutable=['batch_stats'],
        rngs={'quantizer': jax.random.key(1)},
    )
    assert state['batch_stats']['step'] == step + 1
    return np.abs(out.z_q - expected).max()

  np.testing.assert_allclose(error(0.0) / error(375.0), 2, rtol=1e-5)
  assert error(750.0) == 0


def _variant_model(name, monkeypatch):
  """Returns the model of a variant, small, with its variables and images."""
  for module, attribute in (
      (builder, 'QUANTIZERS'), (autoencoder, 'Autoencoder'),
      *((projectors, x) for x, _ in variants.PROJECTORS.values()),
  ):
    value = getattr(module, attribute)
    value = dict(value) if isinstance(value, dict) else value
    monkeypatch.setattr(module, attribute, value)
  variants.install(name)
  fields = {
      'model.quantizer.fsq.commitment_weight': 0.0, **recipe.VARIANTS[name]
  }
  config = sweep.make_config(_DEBUG, fields)
  model = model_builder.build_autoencoder(config.model, (16, 16))
  images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1)
  return model, model.init(jax.random.key(1), images), images


@pytest.mark.parametrize('name', ['latent_codebook', *variants.PROJECTORS])
def test_variants_of_parts_decode_their_indices(name, monkeypatch):
  model, weights, images = _variant_model(name, monkeypatch)
  out = model.apply(weights, images)
  decoded = model.apply(weights, out.indices, method='decode_from_indices')
  np.testing.assert_allclose(decoded, out.reconstructions, atol=1e-5)


def test_gradients_are_differences_between_codes(monkeypatch):
  model, weights, _ = _variant_model('mlp_differences', monkeypatch)
  bound = model.bind(weights)
  fsq, project = bound.quantizer, bound.projector_out
  indices = np.ravel_multi_index([1] * len(fsq.levels), fsq.levels)
  digits = np.asarray(fsq.indices_to_digits(jnp.int32(indices)))
  steps = np.asarray(fsq.code_steps)
  for i in range(len(digits)):
    around = digits + np.outer([1, -1], np.eye(len(digits), dtype=int)[i])
    after, before = project(fsq.digits_to_codes(around))
    slope = jax.jvp(
        project, (fsq.digits_to_codes(digits),),
        (jnp.asarray(np.eye(len(digits))[i] * steps, jnp.float32),),
    )[1]
    np.testing.assert_allclose(slope, (after - before) / 2, atol=1e-6)


@pytest.mark.slow
def test_the_encoder_learns_from_latents_before_rounding(monkeypatch):
  model, weights, images = _variant_model(variants.UNROUNDED, monkeypatch)

  def loss(params, name):
    out = model.apply({'params': params}, images, train=True)
    error = jnp.mean(jnp.square(out.reconstructions - images))
    return {'rounded': error, 'unrounded': out.quantizer_loss}[name]

  for name, trained in (
      ('rounded', {'projector_out', 'decoder'}),
      ('unrounded', {'encoder', 'projector_in'}),
  ):
    gradients = jax.grad(loss)(weights['params'], name)
    assert trained == {x for x, y in gradients.items() if optax.tree.norm(y)}


@pytest.mark.slow
def test_networks_on_patches_learn():
  rng = np.random.default_rng(0)
  factors, basis = rng.normal(size=(2048, 2)), rng.normal(size=(2, 6))
  samples = (factors @ basis).astype(np.float32)
  model = patches.PatchAutoencoder(16, 16, num_features=6, levels=(8, 8))
  (first, _), (last, nearest) = (
      patches.train_network(model, samples, samples, x) for x in (1, 200)
  )
  assert nearest < last < 0.1 * first


@pytest.mark.slow
def test_decoders_learn_from_frozen_codes(tmp_path):
  fields = {'train.num_steps': 3, 'optim.ema_decay': 0.5}
  sweep.train(_DEBUG, {'run': fields}, tmp_path)
  before, after = (
      frozen_codes.measure(tmp_path / 'run', num_steps=x)
      for x in (1, 60)
  )
  assert after > before + 0.1


def test_runs_on_a_frozen_encoder_have_configs_that_can_be_used(tmp_path):
  runs = vqrae_frozen_vit.settings(tmp_path, str(tmp_path), str(tmp_path))
  assert runs.keys() == vqrae_frozen_vit.LABELS.keys()
  for fields in runs.values():
    config = sweep.make_config(vqrae_frozen_vit.CONFIG, fields)
    configuration.check_config(config)


def test_runs_with_networks_have_configs_that_can_be_used(tmp_path):
  runs = perceptual_ablation.settings(tmp_path, str(tmp_path), 'a', 'b')
  assert runs.keys() - {perceptual_ablation.START} == (
      perceptual_ablation.LABELS.keys()
  )
  for fields in runs.values():
    config = sweep.make_config(perceptual_ablation.CONFIG, fields)
    configuration.check_config(config)


def test_generators_of_every_codebook_size_have_configs_that_can_be_used(
    tmp_path
):
  runs = cifar10.generator_runs(tmp_path)
  assert len(runs) == len(cifar10.BITS) * len(cifar10.CURVES)
  for fields in runs.values():
    configuration.check_config(sweep.make_config(cifar10.CONFIG, fields))
    tokenizer = pathlib.Path(fields['tokens.tokenizer']).name
    assert tokenizer in cifar10.tokenizer_runs('')


def test_samples_are_measured_again_only_if_something_differs(tmp_path):
  calls = []

  class Evaluator:

    def run(self, images):
      calls.append(images)
      metrics = 'fd_vgg16 fd_pixel_pca precision_vgg16 recall_vgg16 copies'
      names = *metrics.split(), 'nearest_neighbour_accuracy', 'another'
      return dict.fromkeys(names, float(len(calls))), {}

  def measure(seed):
    return cifar10.measure_once(
        tmp_path, {'seed': seed}, lambda: 'images', Evaluator
    )

  assert [measure(x)['fd_vgg16'] for x in (0, 0, 1, 1)] == [1, 1, 2, 2]
  assert calls == [['images'], ['images']]
  # As written without the protocol.
  (tmp_path / 'measured.json').write_text('{"metrics": {"fd_vgg16": 5}}')
  assert 'another' not in measure(1)
  assert len(calls) == 3


def test_a_finished_run_may_be_found_elsewhere(tmp_path, monkeypatch):
  fields = {'train.num_steps': 2, 'eval.networks.fd_vgg16': 'here'}
  config = sweep.make_config(_DEBUG, fields)
  (tmp_path / 'run').mkdir()
  # As an earlier version wrote it.
  values = json.loads(configuration.config_to_json(config))
  values['model']['remat'] = False
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(values))
  (tmp_path / 'run' / 'evaluation.json').write_text('{"step": 2}')
  started = []
  monkeypatch.setattr(sweep, '_run', lambda command: started.append(command))
  sweep.train(
      _DEBUG, {'run': fields | {'eval.networks.fd_vgg16': 'there'}}, tmp_path
  )
  assert not started
  sweep.train(_DEBUG, {'run': fields | {'optim.b1': 0.8}}, tmp_path)
  assert len(started) == 1


def test_the_settings_are_those_that_tuning_chose():
  for quantizer, rows in _results('quantizer_comparison')['tuning'].items():
    best = max(rows, key=lambda name: rows[name]['psnr'])
    assert settings.CHOSEN[quantizer] == best


@pytest.mark.parametrize('name', _SCRIPTS)
def test_readmes_show_the_tables_of_the_results(name, capsys):
  _SCRIPTS[name].print_tables(_results(name))
  tables = capsys.readouterr().out.strip().split('\n\n')
  readme = (_ROOT / 'experiments' / name / 'README.md').read_text()
  for table in tables:
    assert table in readme


def test_the_table_of_faults_is_that_of_the_results():
  results = _results('fault_suite')
  readme = (_ROOT / 'experiments/fault_suite/README.md').read_text()
  assert fault_suite.table(results) in readme
  assert list(results) == list(fault_suite.FAULTS)
  for name, result in results.items():
    fault = fault_suite.FAULTS[name]
    assert result['injected'] == fault.injected
    assert result['required'] == fault.required


def test_the_readme_of_the_benchmarks_shows_their_results(capsys):
  benchmarks.print_tables(_results('benchmarks'))
  tables = capsys.readouterr().out.strip().split('\n\n')
  readme = (_ROOT / 'experiments' / 'benchmarks' / 'README.md').read_text()
  for table in tables:
    assert table in readme


@pytest.mark.parametrize(
    ('path', 'print_tables'),
    [
        (digits.RESULTS, digits.print_tables),
        (cifar10.HERE / 'cifar10.json', cifar10.print_tables),
        (sampling_cost.RESULTS, sampling_cost.print_table),
    ],
)
def test_the_readme_of_generators_shows_their_results(
    path, print_tables, capsys
):
  print_tables(json.loads(path.read_text()))
  readme = (_ROOT / 'experiments' / 'generation' / 'README.md').read_text()
  for table in capsys.readouterr().out.strip().split('\n\n'):
    assert table in readme


@pytest.mark.parametrize(
    ('name', 'table'),
    [('export', across_versions.table), ('onnx', to_onnx.table)],
)
def test_readmes_of_exports_show_their_results(name, table):
  readme = (_ROOT / 'experiments' / name / 'README.md').read_text()
  assert table(_results(name)) in readme


@pytest.mark.slow
@pytest.mark.parametrize(
    ('script', 'path'),
    [
        *((x, x.HERE / 'results.json') for x in _SCRIPTS.values()),
        (cifar10, cifar10.HERE / 'cifar10.json'),
    ],
)
def test_plots_are_drawn_from_the_results(script, path, tmp_path):
  script.plot(json.loads(path.read_text()), tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')
