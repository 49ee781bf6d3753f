"""Generators: samples, completions, likelihoods, saved folders."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from fsq_jax import tokenizer as tokenizers
from fsq_jax.generators import builder
from fsq_jax.generators import generator as generators
from fsq_jax.generators import likelihood
from fsq_jax.generators import saved_generator
from fsq_jax.runtime import partitioning

# The first test makes the run that all use.
pytestmark = pytest.mark.fast_limit(15)

_KINDS = pytest.mark.parametrize('kind', ['masked', 'autoregressive'])
_NAMES = 'cat', 'dog', 'a/b c'


@pytest.fixture(scope='session')
def load(untrained_run):
  """Loads the generator of a run, once for each kind."""
  loaded = {}

  def get(kind):
    if kind not in loaded:
      loaded[kind] = generators.Generator.from_workdir(
          untrained_run(kind), mesh=_one_device(), batch_size=8
      )
    return loaded[kind]

  return get


@pytest.fixture(scope='session')
def folder(load, tmp_path_factory):
  """A saved masked generator; not to be changed."""
  path = tmp_path_factory.mktemp('saved') / 'generator'
  return load('masked').save_pretrained(path)


@pytest.fixture
def copied(folder, tmp_path):
  path = tmp_path / 'copied'
  shutil.copytree(folder, path)
  return path


def _one_device():
  return partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])


def _grids(num, seed=0):
  return np.random.default_rng(seed).integers(0, 512, (num, 4, 4))


@pytest.mark.slow
@_KINDS
def test_samples_are_decoded_and_depend_on_label_number_and_seed(load, kind):
  generator = load(kind)
  result = generator.sample()
  assert result.tokens.shape == result.log_probs.shape == (3, 4, 4)
  assert result.labels.tolist() == [0, 1, 2]
  assert result.log_probs.max() < 0
  np.testing.assert_array_equal(
      result.images, generator.tokenizer.decode(result.tokens)
  )
  # Two batches of eight, of which the last is filled up.
  more = generator.sample(num_images=11)
  assert more.labels.tolist() == [0, 1, 2] * 3 + [0, 1]
  np.testing.assert_array_equal(more.tokens[:3], result.tokens)
  assert len({x.tobytes() for x in more.tokens}) == 11
  other = generator.sample([0, 2, 2], seed=1)
  assert not np.array_equal(other.tokens[0], result.tokens[0])
  mixed = generator.sample([-1, 1, 0])
  np.testing.assert_array_equal(mixed.tokens[1], result.tokens[1])


@pytest.mark.slow
def test_given_tokens_are_kept_and_others_ignored(load):
  generator = load('masked')
  tokens = _grids(5)
  known = np.random.default_rng(1).random((5, 4, 4)) < 0.5
  known[3], known[4] = True, False
  result = generator.inpaint(tokens, known, labels=[0, 1, 2, 0, -1])
  np.testing.assert_array_equal(result.tokens[known], tokens[known])
  assert np.all((result.log_probs == 0) == known)
  assert np.any(result.tokens[~known] != tokens[~known])
  noise = np.random.default_rng(2).integers(-(2**40), 2**40, tokens.shape)
  again = generator.inpaint(
      np.where(known, tokens, noise), known, labels=[0, 1, 2, 0, -1]
  )
  np.testing.assert_array_equal(again.tokens, result.tokens)
  # Nothing given is sampling.
  sampled = generator.sample([0, 1, 2, 0, -1])
  np.testing.assert_array_equal(again.tokens[4], sampled.tokens[4])


@pytest.mark.slow
def test_prefixes_are_kept_and_other_masks_rejected(load):
  generator = load('autoregressive')
  tokens = _grids(5)
  lengths = np.array([0, 1, 7, 15, 16])
  known = (np.arange(16) < lengths[:, None]).reshape(5, 4, 4)
  result = generator.inpaint(tokens, known, labels=1)
  np.testing.assert_array_equal(result.tokens[known], tokens[known])
  assert np.all((result.log_probs == 0) == known)
  again = generator.inpaint(np.where(known, tokens, -9), known, labels=1)
  np.testing.assert_array_equal(again.tokens, result.tokens)
  known[2, 0, 0] = False
  with pytest.raises(ValueError, match='first tokens in raster order'):
    generator.inpaint(tokens, known)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'num_step': 3}, r'num_step.* are not of the section sample'),
        ({'guidance': {'strength': 1.0}}, 'are not of the section sample'),
        ({'temperature': 'hot'}, 'temperature'),
        ({'num_steps': 17}, r'^sample: .*17'),
        ({'num_steps': 0}, r'sample\.num_steps is 0'),
        ({'order': 'spiral'}, r"^sample: .*'spiral'"),
        ({'top_p': 0.0}, '^sample: .*top_p'),
        ({'classes': [3]}, 'labels contain 3; allowed are 0 to 2'),
        ({'classes': [-2]}, 'labels contain -2'),
        ({'classes': [0.5]}, 'labels are float64'),
        ({'classes': []}, 'classes is .*; give a sequence'),
        ({'classes': 3}, 'classes is 3; give a sequence'),
        ({'num_images': 0}, 'num_images is 0; give an integer >= 1'),
        ({'num_images': -1}, 'num_images is -1; give an integer >= 1'),
        ({'seed': 1.5}, 'seed is 1.5; give an integer'),
        ({'guidance': 2.0}, 'are not of the section sample'),
    ],
)
def test_wrong_options_and_classes_are_rejected(load, options, message):
  with pytest.raises(ValueError, match=message):
    load('masked').sample(**options)


@pytest.mark.parametrize(
    ('tokens', 'known', 'message'),
    [
        (np.zeros((1, 4, 4)), np.zeros((4, 4), bool), 'tokens are float64'),
        (np.zeros((4, 4), int), np.zeros((4, 4), bool), 'tokens are int64'),
        (_grids(1), np.zeros((4, 4)), 'known is float64'),
        (_grids(1), np.zeros((2, 8), bool), 'known is bool'),
        (_grids(1) + 512, np.ones((4, 4), bool), 'outside of the codebook'),
        (_grids(0), np.ones((4, 4), bool), 'B at least 1'),
    ],
)
def test_wrong_grids_are_rejected(load, tokens, known, message):
  with pytest.raises(ValueError, match=message):
    load('masked').inpaint(tokens, known, labels=-1)


@pytest.mark.parametrize('method', ['inpaint', 'nll'])
def test_classes_are_not_forgotten(load, method):
  known = () if method == 'nll' else (np.ones((4, 4), bool),)
  with pytest.raises(ValueError, match='labels are missing'):
    getattr(load('masked'), method)(_grids(1), *known)


def test_likelihoods_of_wrong_tokens_are_rejected(load):
  generator = load('autoregressive')
  for tokens, labels, message in (
      (_grids(2) - 512, 0, 'outside of the codebook'),
      (_grids(2), 3, 'labels contain 3'),
      (_grids(2).astype(float), 0, 'tokens are float64'),
      (_grids(0), 0, 'B at least 1'),
      (_grids(2), [0, 1, 2], r'shape \(3,\); give one label, or 2'),
      (_grids(2), [[0, 1]], r'shape \(1, 2\); give one label'),
  ):
    with pytest.raises(ValueError, match=message):
      generator.nll(tokens, labels)


def _tiny(kind, make_config, draw_variables):
  """A generator with 4 codes and 3 positions, without a tokenizer."""
  config = make_config(kind)
  config.tokens.tokenizer = ''
  config.eval.num_samples = 0
  config.eval.num_draws = 3
  form = builder.TokenFormat(
      quantizer={
          'name': 'fsq', 'levels': [2, 2], 'index_order': 'last fastest'
      },
      codebook_size=4, grid=(1, 3), label_names=_NAMES, model_hash='ab' * 32,
  )
  model = builder.build_model(config, form)
  known = None if kind == 'autoregressive' else np.zeros((1, 3), bool)
  variables = draw_variables(
      model, np.zeros((1, 3), np.int32), np.zeros(1, np.int32), known
  )
  mesh = _one_device()
  variables = jax.device_put(variables, partitioning.replicated(mesh))
  saved = saved_generator.SavedGenerator(
      config, model, variables, form, 0, None
  )
  return generators.Generator(saved, None, mesh, batch_size=32)


_ALL = np.array(list(itertools.product(range(4), repeat=3))).reshape(-1, 1, 3)


@pytest.mark.slow
def test_probabilities_of_all_grids_sum_to_1(make_config, draw_variables):
  generator = _tiny('autoregressive', make_config, draw_variables)
  nll = generator.nll(_ALL, 1)
  assert nll.shape == (64,)
  np.testing.assert_allclose(np.exp(-np.float64(nll)).sum(), 1, rtol=1e-5)
  assert np.abs(nll - generator.nll(_ALL, 2)).max() > 1e-3
  # Drawn tokens have the log-probabilities of the likelihood.
  sampled = generator.sample([1, 1, 2, 0], num_images=12)
  assert sampled.images is None
  np.testing.assert_allclose(
      -sampled.log_probs.sum((1, 2)),
      generator.nll(sampled.tokens, sampled.labels),
      rtol=1e-5,
  )


@pytest.mark.slow
def test_the_bound_is_that_of_the_likelihood(make_config, draw_variables):
  generator = _tiny('masked', make_config, draw_variables)
  labels = np.arange(64) % 3
  expected = likelihood.any_order_bits(
      generator.model, generator.variables, _ALL.reshape(64, 3), labels,
      jax.random.key(0), num_draws=3,
  )
  np.testing.assert_allclose(
      generator.nll(_ALL, labels), np.log(2) * np.asarray(expected), rtol=1e-5
  )


def test_another_tokenizer_is_rejected(load, other_tokenizer, untrained_run):
  with pytest.raises(ValueError, match=r'other tokens .*\n  model_hash: '):
    generators.Generator.from_workdir(
        untrained_run('masked'), tokenizer=other_tokenizer
    )


def test_checkpoints_are_chosen(untrained_run):
  folder = untrained_run('masked')
  newest, best = (
      generators.Generator.from_workdir(folder, which)
      for which in ('newest', 'best')
  )
  assert (newest.step, best.step) == (4, 2)
  for x, y in zip(
      jax.tree.leaves(newest.variables), jax.tree.leaves(best.variables),
      strict=True,
  ):
    assert not np.array_equal(x, y)
  with pytest.raises(ValueError, match='run of a tokenizer'):
    generators.Generator.from_workdir(best.config.tokens.tokenizer)
  with pytest.raises(ValueError, match='run of a generator'):
    tokenizers.Tokenizer.from_workdir(folder)


@pytest.mark.slow
def test_a_saved_folder_gives_the_same_samples(load, folder):
  saved = load('masked')
  loaded = generators.Generator.from_pretrained(
      folder, mesh=_one_device(), batch_size=8
  )
  assert loaded.tokens == saved.tokens
  assert loaded.step == saved.step
  options = {'num_images': 5, 'seed': 3, 'num_steps': 2, 'order': 'random'}
  for x, y in zip(
      loaded.sample(**options), saved.sample(**options), strict=True
  ):
    np.testing.assert_array_equal(x, y)
  # No path of the machine that wrote it.
  assert '/' not in loaded.config.tokens.tokenizer
  assert '/tmp' not in (folder / 'config.json').read_text()


@pytest.mark.slow
def test_a_saved_folder_may_have_no_tokenizer(
    make_config, draw_variables, tmp_path
):
  saved = _tiny('masked', make_config, draw_variables)
  folder = saved.save_pretrained(tmp_path / 'x')
  loaded = generators.Generator.from_pretrained(folder)
  assert loaded.tokenizer is None
  np.testing.assert_array_equal(
      loaded.sample([0, 1]).tokens, saved.sample([0, 1]).tokens
  )
  again = loaded.save_pretrained(tmp_path / 'y')
  assert {x.name for x in again.iterdir()} == {
      'README.md', 'config.json', 'model.safetensors',
  }


def test_the_card_says_what_it_holds(folder):
  card = (folder / 'README.md').read_text()
  assert '# Masked generator on 4 x 4 tokens of 512 codes' in card
  assert '3 classes. 4 training steps.' in card
  code = card.partition('```python\n')[2].partition('```')[0]
  code = code.replace('FOLDER', repr(str(folder))).partition('images =')[0]
  names = {}
  exec(code, names)
  assert names['generator'].step == 4


def test_nothing_is_overwritten(load, folder):
  with pytest.raises(ValueError, match='is not empty; give a new folder'):
    load('masked').save_pretrained(folder)


def _flip(path, at=-5):
  content = bytearray(path.read_bytes())
  content[at] ^= 1
  path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('model.safetensors', 'is corrupted'),
        ('tokenizer/model.safetensors', 'is corrupted'),
        ('config.json', r'cannot be read|is corrupted'),
    ],
)
def test_corrupted_files_are_rejected(copied, name, message):
  _flip(copied / name)
  with pytest.raises(ValueError, match=message):
    generators.Generator.from_pretrained(copied)
  (copied / name).unlink()
  with pytest.raises(ValueError, match=r'missing|cannot be read'):
    generators.Generator.from_pretrained(copied)


def _change(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda x: x['config']['model'].update(depth=2), 'was changed'),
        (lambda x: x['tokens'].update(codebook_size=8), 'was changed'),
        (lambda x: x.update(format='fsq_jax tokenizer'), 'has the format'),
    ],
)
def test_changed_configs_are_rejected(copied, change, message):
  _change(copied / 'config.json', change)
  with pytest.raises(ValueError, match=message):
    generators.Generator.from_pretrained(copied)


def test_the_tokenizer_of_another_generator_is_rejected(
    copied, other_tokenizer
):
  shutil.rmtree(copied / 'tokenizer')
  shutil.copytree(other_tokenizer, copied / 'tokenizer')
  with pytest.raises(ValueError, match='model_hash: '):
    generators.Generator.from_pretrained(copied)


@pytest.mark.slow
@_KINDS
def test_samples_depend_neither_on_devices_nor_on_the_batch_size(
    untrained_run, kind
):
  labels = np.arange(20) % 4 - 1
  tokens, known = _grids(20), np.zeros((4, 4), bool)
  known[:2] = True
  results = []
  for num_devices, batch_size in ((1, 3), (1, 64), (8, 8)):
    mesh = partitioning.create_mesh(
        {'data': num_devices, 'fsdp': 1}, jax.devices()[:num_devices]
    )
    generator = generators.Generator.from_workdir(
        untrained_run(kind), mesh=mesh, batch_size=batch_size
    )
    options = {'seed': 5, 'guidance': {'scale': 2.0}}
    results.append((
        generator.sample(labels, **options),
        generator.inpaint(tokens, known, labels, **options),
        generator.nll(tokens, labels),
    ))
  for result in results[1:]:
    for x, y in zip(
        jax.tree.leaves(result[:2]), jax.tree.leaves(results[0][:2]),
        strict=True,
    ):
      if x.dtype == np.float32:
        np.testing.assert_allclose(x, y, rtol=1e-4)
      else:
        np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(result[2], results[0][2], rtol=1e-5)
