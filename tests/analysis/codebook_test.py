"""Tests of --mode=report: its numbers against NumPy, for every quantizer.

The model is one whose tokens and images NumPy computes too: means of patches
are quantized, and codes become patches of one colour, with a little of the
mean of all codes added to every pixel.
"""

import base64
import functools
import io
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

from einops import rearrange
from einops import reduce
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import PIL.Image
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import quantizers
from fsq_jax import report
from fsq_jax.analysis import codebook as codebook_analysis
from fsq_jax.analysis import figures as codebook_figures
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.evaluation import results as results_lib
from fsq_jax.runtime import partitioning

_ROOT = pathlib.Path(__file__).parents[2]
_RUN = _ROOT / 'tests' / 'testdata' / 'run'
_LEVELS = (4, 3, 5)
_NUM_IMAGES = 30
_PATCH = 4
_GRID = (4, 6)
_QUANTIZERS = {
    'fsq': quantizers.FSQ(levels=_LEVELS),
    'paper': quantizers.FSQ(levels=_LEVELS, convention='paper'),
    'lfq': quantizers.LFQ(num_bits=5),
    'vq': quantizers.VectorQuantizer(codebook_size=24, code_dim=3),
    'cosine': quantizers.VectorQuantizer(
        codebook_size=24, code_dim=3, metric='cosine'
    ),
    'simvq': quantizers.SimVQ(codebook_size=24, code_dim=3),
    'grouped_fsq': quantizers.GroupedFSQ(levels=_LEVELS, num_groups=2),
    'residual_fsq': quantizers.ResidualFSQ(levels=_LEVELS, num_stages=2),
}


class _Encoder(nn.Module):
  """Means of patches, repeated to as many channels as a code has."""

  width: int

  @nn.compact
  def __call__(self, images):
    latents = reduce(
        images, 'b (h p) (w q) c -> b h w c', 'mean', p=_PATCH, q=_PATCH
    )
    latents = jnp.tile(latents, -(-self.width // 3))[..., : self.width]
    shift = jnp.linspace(-0.2, 0.3, self.width)
    return (latents + shift) * jnp.linspace(3, 1, self.width)


class _Identity(nn.Module):
  """Nothing."""

  @nn.compact
  def __call__(self, x, *, train=False):
    del train
    return x


class _Decoder(nn.Module):
  """A patch of one colour for each code."""

  @nn.compact
  def __call__(self, codes):
    return _draw(jnp, codes)


def _draw(xp, codes):
  # Factors that put no pixel between two grey levels.
  mean = xp.mean(codes, axis=(1, 2, 3), keepdims=True)
  pixels = codes[..., :3] * 0.29173 + mean * 0.09719
  return pixels.repeat(_PATCH, axis=1).repeat(_PATCH, axis=2)


class _Run:
  """A quantizer's model, images, and what the analysis says of them."""

  def __init__(self, quantizer, batch_size=8):
    self.quantizer = quantizer
    self.model = models.Autoencoder(
        encoder=_Encoder(quantizer.code_dim),
        projector_in=_Identity(),
        quantizer=quantizer,
        projector_out=_Identity(),
        decoder=_Decoder(),
    )
    self.images = _images()
    shape = (1, _GRID[0] * _PATCH, _GRID[1] * _PATCH, 3)
    init = jax.jit(self.model.init)
    self.variables = init(jax.random.key(0), jnp.zeros(shape))
    self._codes = jax.jit(
        lambda variables, indices: self.model.apply(
            variables,
            indices,
            method=lambda model, x: model.quantizer.indices_to_codes(x),
        )
    )
    step = jax.jit(evaluators.build_eval_step(self.model))
    mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
    self.decoder = codebook_figures.Decoder(
        self.model, self.variables, mesh, batch_size
    )
    tally = codebook_analysis.CodebookHistogram(_NUM_IMAGES, self.decoder)
    # The last batch is filled up, as the data set does.
    for start in range(0, _NUM_IMAGES, batch_size):
      index = np.arange(start, start + batch_size)
      mask = index < _NUM_IMAGES
      images = self.images[np.minimum(index, _NUM_IMAGES - 1)]
      batch = {'image': images, 'index': index, 'mask': mask}
      tally.update(batch, jax.device_get(step(self.variables, images)))
    self.result = json.loads(json.dumps(tally.result()))
    output = jax.device_get(step(self.variables, self.images))
    self.tokens, self.reconstructions = output.indices, output.reconstructions

  def codes(self, indices):
    return np.asarray(self._codes(self.variables, np.int32(indices)))

  def draw(self, tokens):
    pixels = _draw(np, self.codes(tokens[None]))[0]
    return np.rint(np.clip((pixels + 1) * 127.5, 0, 255))


def _images():
  """Patches like their neighbours, of one colour and a little noise."""
  rng = np.random.default_rng(0)
  colors = rng.uniform(40, 215, (_NUM_IMAGES, *_GRID, 3))
  colors[:, :, 1:] = 0.6 * colors[:, :, :-1] + 0.4 * colors[:, :, 1:]
  images = colors.repeat(_PATCH, axis=1).repeat(_PATCH, axis=2)
  noise = rng.normal(0, 1, images.shape) * np.arange(_NUM_IMAGES)[
      :, None, None, None
  ]
  return np.clip(images + noise, 0, 255).astype(np.uint8)


@functools.cache
def _run(name):
  return _Run(_QUANTIZERS[name])


def _quantizers(*names):
  """Parameters of a test: 'fsq' and 'vq' stand for all in the fast tier."""
  return [
      name
      if name in ('fsq', 'vq')
      else pytest.param(name, marks=pytest.mark.slow)
      for name in names
  ]


@pytest.fixture(params=_quantizers(*_QUANTIZERS))
def run(request):
  """A run of each quantizer."""
  return _run(request.param)


@pytest.fixture
def fsq():
  """A run of FSQ."""
  return _run('fsq')


def _pixels(data):
  return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))


def _psnr(run):
  error = (run.reconstructions - run.images.astype(float)) / 255
  return -10 * np.log10(np.mean(error**2, axis=(1, 2, 3)))


@pytest.mark.fast_limit(10)
def test_worst_and_best_are_those_of_numpy(run):
  psnr = _psnr(run)
  order = np.argsort(psnr, kind='stable')
  for name, expected in (('worst', order[:8]), ('best', order[::-1][:8])):
    shown = run.result[name]
    assert [image['index'] for image in shown] == expected.tolist()
    np.testing.assert_allclose(
        [image['psnr'] for image in shown], psnr[expected], rtol=1e-5
    )
    for image in shown:
      i = image['index']
      np.testing.assert_array_equal(_pixels(image['original']), run.images[i])
      np.testing.assert_array_equal(
          _pixels(image['reconstruction']), run.reconstructions[i]
      )
  spread = [image['index'] for image in run.result['spread']]
  assert spread == [3, 11, 18, 26]


def test_codes_are_counted_as_by_numpy(run):
  size = run.quantizer.codebook_size
  counts = np.bincount(np.ravel(run.tokens), minlength=size)
  assert np.count_nonzero(counts) >= 12
  order = np.argsort(-counts, kind='stable')
  top = run.result['top_codes']
  assert [code['code'] for code in top] == order[:12].tolist()
  assert [code['count'] for code in top] == counts[order[:12]].tolist()
  ranks = run.result['code_ranks']
  np.testing.assert_array_equal(
      ranks['counts'], counts[order][np.array(ranks['ranks']) - 1]
  )
  assert ranks['ranks'][-1] == np.count_nonzero(counts)
  for share, num in ranks['num_codes_of_share'].items():
    held = np.cumsum(counts[order]) / counts.sum()
    assert held[num - 1] >= float(share)
    assert num == 1 or held[num - 2] < float(share)
  assert run.result['codebook']['num_used_codes'] == np.count_nonzero(counts)


def test_pairs_of_codes_are_counted_as_by_numpy(run):
  size = run.quantizer.codebook_size
  pairs = run.result['code_pairs']
  assert (pairs['num_classes'], pairs['codes_per_class']) == (size, 1)
  shown = pairs['shown']
  assert shown == [code['code'] for code in run.result['top_codes']]
  sides = {
      'right': (run.tokens[:, :, :-1], run.tokens[:, :, 1:]),
      'below': (run.tokens[:, :-1], run.tokens[:, 1:]),
  }
  for name, (first, second) in sides.items():
    joint = np.histogram2d(
        np.ravel(first), np.ravel(second), bins=np.arange(size + 1) - 0.5
    )[0]
    found = pairs['directions'][name]
    assert found['num_pairs'] == joint.sum() == first.size
    np.testing.assert_array_equal(
        found['observed'], joint[shown][:, shown]
    )
    np.testing.assert_allclose(
        found['expected'],
        np.outer(joint.sum(1)[shown], joint.sum(0)[shown]) / joint.sum(),
    )
    entropies = []
    for counts in (joint.sum(1), joint.sum(0), joint):
      shares = counts[counts > 0] / joint.sum()
      entropies.append(-np.sum(shares * np.log2(shares)))
    assert found['bits'] == pytest.approx(
        entropies[0] + entropies[1] - entropies[2]
    )


def test_digits_are_those_of_numpy(fsq):
  digits = np.stack(np.unravel_index(fsq.tokens, _LEVELS), axis=-1)
  found = fsq.result['digits']
  for i, level in enumerate(_LEVELS):
    counts = np.bincount(np.ravel(digits[..., i]), minlength=level)
    assert found['histograms'][i] == counts.tolist()
    shares = counts[counts > 0] / counts.sum()
    entropy = -np.sum(shares * np.log2(shares))
    assert found['entropy_bits'][i] == pytest.approx(entropy)
    # In one token a digit says its entropy about itself.
    bits = found['pairs']['token']['bits'][i][i]
    assert bits == pytest.approx(entropy)
  assert found['pairs']['below']['num_pairs'] == digits[:, 1:, ..., 0].size
  for code in fsq.result['top_codes']:
    expected = np.unravel_index(code['code'], _LEVELS)
    assert code['digits'] == [int(x) for x in expected]


@pytest.mark.parametrize('name', _quantizers('grouped_fsq', 'residual_fsq'))
def test_each_index_of_a_token_has_digits_of_its_own(name):
  run = _run(name)
  found = run.result['digits']
  assert run.result['index_shape'] == [2]
  for slot in range(2):
    digits = np.asarray(
        run.quantizer.indices_to_digits(run.tokens)[..., slot, :]
    )
    for i, level in enumerate(_LEVELS):
      counts = np.bincount(np.ravel(digits[..., i]), minlength=level)
      assert found['histograms'][3 * slot + i] == counts.tolist()
  assert found['histograms'][:3] != found['histograms'][3:]
  # No picture of a code that is not all of a token.
  assert all('swatch' not in code for code in run.result['top_codes'])


def test_swaps_show_what_one_digit_or_code_changes(run):
  height, width = _GRID
  position = height // 2, width // 2
  has_digits = isinstance(run.quantizer, quantizers.DigitQuantizer)
  assert [swap['index'] for swap in run.result['swaps']] == [3, 11, 18]
  for swap in run.result['swaps']:
    tokens = run.tokens[swap['index']]
    plain = run.draw(tokens)
    np.testing.assert_array_equal(_pixels(swap['reconstruction']), plain)
    left, top, *size = swap['box']
    assert (left * 24, top * 16) == (12, 8)
    assert (size[0] * 24, size[1] * 16) == (4, 4)
    for row in swap['rows']:
      total = inside = 0
      assert sum(cell['own'] for cell in row['cells']) == 1
      for cell in row['cells']:
        changed = tokens.copy()
        if has_digits:
          changed[position] = _with_digit(
              run.quantizer, tokens[position], row, cell
          )
        else:
          changed[position] = cell['code']
        assert cell['own'] == np.array_equal(changed, tokens)
        image = run.draw(changed)
        # Two patches on each side, as far as there are any.
        around = np.s_[0:16, 4:24]
        np.testing.assert_array_equal(_pixels(cell['image']), image[around])
        difference = image - plain
        shown = np.clip(np.rint(128 + swap['gain'] * difference), 0, 255)
        np.testing.assert_array_equal(
            _pixels(cell['difference']), shown[around]
        )
        patch = difference[8:12, 12:16]
        assert cell['rms'] == pytest.approx(np.sqrt(np.mean(patch**2)))
        inside += np.sum(patch**2)
        total += np.sum(difference**2)
      assert row['share_in_patch'] == pytest.approx(inside / max(total, 1))


def _with_digit(quantizer, token, row, cell):
  digits = np.array(quantizer.indices_to_digits(token))
  if quantizer.index_shape:
    digits[row['slot'], row['dimension']] = cell['level']
  else:
    digits[row['dimension']] = cell['level']
  return np.asarray(quantizer.digits_to_indices(digits))


def test_every_digit_takes_every_level(fsq):
  for swap in fsq.result['swaps']:
    levels = [[x['level'] for x in row['cells']] for row in swap['rows']]
    assert levels == [list(range(level)) for level in _LEVELS]
    assert swap['num_digits'] == 3


@pytest.mark.parametrize('name', _quantizers('vq', 'cosine', 'simvq'))
def test_codes_without_digits_are_swapped_by_distance(name):
  run = _run(name)
  codes = run.codes(np.arange(24)).astype(np.float64)
  assert run.result['digits'] is None
  assert run.result['dimensions'] == 0
  for swap in run.result['swaps']:
    (row,) = swap['rows']
    distances = np.linalg.norm(codes - codes[swap['token']], axis=-1)
    order = np.argsort(distances, kind='stable')
    assert [cell['rank'] for cell in row['cells']] == [0, 1, 2, 4, 8, 16]
    for cell in row['cells']:
      assert cell['code'] == order[cell['rank']]
      assert cell['distance'] == pytest.approx(
          distances[cell['code']], rel=1e-5, abs=1e-6
      )


@pytest.mark.slow
def test_long_swaps_are_cut():
  quantizer = quantizers.GroupedFSQ(levels=(40, 3), num_groups=8)
  run = _Run(quantizer)
  swap = run.result['swaps'][0]
  assert swap['num_digits'] == 16
  assert len(swap['rows']) == 12
  levels = [cell['level'] for cell in swap['rows'][0]['cells']]
  assert (levels[0], levels[-1]) == (0, 39)
  assert len(levels) <= 10


def test_nearest_are_those_of_numpy(run):
  codes = run.codes(run.tokens).astype(np.float64)
  assert [query['index'] for query in run.result['nearest']] == [3, 11, 18, 26]
  assert run.result['num_grids'] == _NUM_IMAGES
  for query in run.result['nearest']:
    i = query['index']
    distances = np.square(codes - codes[i]).sum(-1).mean(axis=(1, 2))
    distances[i] = np.inf
    np.testing.assert_array_equal(
        _pixels(query['image']), run.draw(run.tokens[i])
    )
    np.testing.assert_allclose(
        [x['distance'] for x in query['nearest']],
        np.sort(distances)[:5],
        rtol=1e-5,
    )
    for near in query['nearest']:
      j = near['index']
      assert distances[j] == pytest.approx(near['distance'], rel=1e-5)
      equal = np.mean(run.tokens[i] == run.tokens[j])
      assert near['equal_tokens'] == pytest.approx(equal)
      np.testing.assert_array_equal(
          _pixels(near['image']), run.draw(run.tokens[j])
      )


def test_swatches_are_codes_alone(fsq):
  for code in fsq.result['top_codes']:
    image = fsq.draw(np.full(_GRID, code['code'], np.int32))
    np.testing.assert_array_equal(
        _pixels(code['swatch']), image[8:12, 12:16]
    )


def test_without_tokens_there_are_images_alone():
  result = _Run(quantizers.NoQuantizer(code_dim=3)).result
  assert result.keys() == {
      'num_images', 'num_nonfinite_reconstructions', 'spread', 'worst', 'best',
  }
  assert len(result['worst']) == 8


@pytest.mark.fast_variants('fsq-index')
@pytest.mark.parametrize(
    ('name', 'order'), [('fsq', 'index'), ('vq', 'first principal component')]
)
def test_large_codebooks_are_counted_in_classes(name, order, monkeypatch):
  monkeypatch.setattr(codebook_analysis, 'MAX_CLASSES', 10)
  run = _Run(_QUANTIZERS[name])
  size = run.quantizer.codebook_size
  pairs = run.result['code_pairs']
  per_class = math.ceil(size / 10)
  assert pairs['codes_per_class'] == per_class
  assert pairs['num_classes'] == math.ceil(size / per_class)
  assert pairs['order'] == order
  ranks = np.arange(size)
  if name == 'vq':
    codes = run.codes(ranks)
    codes = codes - codes.mean(axis=0)
    axis = np.linalg.svd(codes, full_matrices=False)[2][0]
    ranks = np.argsort(np.argsort(codes @ axis))
    # The sign of a component is anyone's.
    alternatives = [ranks, size - 1 - ranks]
  else:
    alternatives = [ranks]
  found = pairs['directions']['right']['observed']
  options = []
  for ranks in alternatives:
    classes = ranks[run.tokens] // per_class
    joint = np.zeros((pairs['num_classes'],) * 2, int)
    np.add.at(joint, (classes[:, :, :-1], classes[:, :, 1:]), 1)
    options.append(joint[pairs['shown']][:, pairs['shown']].tolist())
  assert found in options
  totals = np.bincount(np.ravel(ranks[run.tokens] // per_class))
  assert sum(map(sum, found)) > 0.5 * totals.sum()


def test_batches_change_nothing():
  # Floats of programs of other shapes may differ in the last digit.
  names = ('codebook', 'digits', 'code_pairs', 'top_codes', 'swaps')
  results = [
      _run('fsq').result, _Run(_QUANTIZERS['fsq'], batch_size=7).result
  ]
  for name in names:
    assert results[0][name] == results[1][name]
  for name in ('spread', 'worst', 'best', 'nearest'):
    numbers = [[x['index'] for x in result[name]] for result in results]
    assert numbers[0] == numbers[1]


def test_tokens_that_are_none_and_images_that_are_not_finite(fsq):
  tally = codebook_analysis.CodebookHistogram(3, fsq.decoder)
  tokens = fsq.tokens[:3].copy()
  tokens[0, 2, 3] = -1
  output = results_lib.EvalOutput(
      metrics={'psnr': np.array([np.nan, 20.0, 30.0])},
      indices=tokens,
      reconstructions=fsq.reconstructions[:3],
  )
  batch = {
      'image': fsq.images[:3],
      'index': np.arange(3),
      'mask': np.array([True, True, False]),
  }
  tally.update(batch, output)
  result = tally.result()
  assert result['num_images'] == 2
  assert result['num_nonfinite_reconstructions'] == 1
  assert [image['index'] for image in result['worst']] == [1]
  assert [swap['index'] for swap in result['swaps']] == [1]
  assert result['nearest'] == []
  assert result['codebook']['num_tokens'] == 47
  # The invalid token has four neighbours.
  right = result['code_pairs']['directions']['right']
  assert right['num_pairs'] == 2 * 4 * 5 - 2


def test_memory_does_not_grow_with_the_split(fsq, monkeypatch):
  monkeypatch.setattr(codebook_analysis, 'MAX_GRIDS', 5)
  run = _Run(_QUANTIZERS['fsq'])
  assert run.result['num_grids'] == 5
  assert {x['index'] for q in run.result['nearest'] for x in q['nearest']} <= {
      3, 9, 15, 21, 27,
  }
  assert run.result['codebook'] == fsq.result['codebook']


def test_large_images_are_shrunk():
  image = np.arange(300, dtype=np.uint8).repeat(300 * 3)
  image = rearrange(image, '(h w c) -> h w c', w=300, c=3)
  assert _pixels(codebook_figures.png(image)).shape == (150, 150, 3)
  np.testing.assert_array_equal(
      _pixels(codebook_figures.png(image, 300)), image
  )


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run of an earlier version, looked at."""
  folder = tmp_path_factory.mktemp('runs') / 'run'
  shutil.copytree(_RUN, folder)
  config = configuration.config_from_json((folder / 'config.json').read_text())
  path = codebook_analysis.analyze_workdir(config, folder)
  assert path == str(folder / 'report.html')
  return folder


@pytest.mark.slow
def test_the_mode_writes_the_report_of_a_run(workdir):
  page = (workdir / 'report.html').read_text()
  for title in (
      'Originals and reconstructions', 'Worst and best images',
      'How often each level occurs', 'Codebook usage',
      'Mutual information between dimensions', 'Neighbouring codes',
      'One level index changed', 'Nearest reconstructions',
  ):
    assert f'<h2>{title}</h2>' in page
  analysis = json.loads((workdir / 'codebook.json').read_text())
  assert analysis['step'] == 8
  assert analysis['num_images'] == 256
  # Later reports have it too.
  report.write_report(workdir)
  assert (workdir / 'report.html').read_text() == page


@pytest.mark.slow
def test_images_of_folders_have_their_names(tmp_path):
  shutil.copytree(_RUN, tmp_path / 'run')
  folder = tmp_path / 'images' / 'validation' / 'cat & dog'
  folder.mkdir(parents=True)
  for i in range(8):
    image = np.full((16, 16, 3), 30 * i, np.uint8)
    PIL.Image.fromarray(image).save(folder / f'{i}.png')
  text = (tmp_path / 'run' / 'config.json').read_text()
  config = configuration.config_from_json(text)
  config.data.source = 'folder'
  config.data.data_dir = str(tmp_path / 'images')
  path = codebook_analysis.analyze_workdir(
      config, tmp_path / 'run', output=tmp_path / 'output'
  )
  assert path == str(tmp_path / 'output' / 'report.html')
  page = (tmp_path / 'output' / 'report.html').read_text()
  captions = re.findall('<figcaption>(.*?)</figcaption>', page)
  names = [x for x in captions if re.search(r'cat &amp; dog/\d\.png', x)]
  assert len(names) > 20
  assert not [x for x in captions if re.search(r'#\d', x)]
  assert '# is the number' in page
  assert not (tmp_path / 'run' / 'codebook.json').exists()
  analysis = json.loads((tmp_path / 'output' / 'codebook.json').read_text())
  assert analysis['names']['3'] == 'cat & dog/3.png'


@pytest.mark.slow
def test_other_models_and_native_images_are_refused(workdir):
  config = configuration.config_from_json(
      (workdir / 'config.json').read_text()
  )
  config.eval.native_size = True
  config.data.source = 'folder'
  config.data.data_dir = str(workdir)
  with pytest.raises(ValueError, match='mode report: False'):
    codebook_analysis.analyze_workdir(config, workdir)
  config.eval.native_size = False
  config.data.source = 'synthetic'
  config.model.encoder.width = 32
  with pytest.raises(ValueError, match='another model than the checkpoint'):
    codebook_analysis.analyze_workdir(config, workdir)


@pytest.mark.slow
def test_the_mode_runs_by_launch(tmp_path):
  shutil.copytree(_RUN, tmp_path / 'run')
  args = ['--mode=report', f'--workdir={tmp_path}/run', '--checkpoint=8']
  command = [sys.executable, 'launch.py', *args]
  result = subprocess.run(
      command, cwd=_ROOT, capture_output=True, text=True, check=True
  )
  assert result.stdout == f'{tmp_path}/run/report.html\n'
  page = (tmp_path / 'run' / 'report.html').read_text()
  assert 'One level index changed' in page
