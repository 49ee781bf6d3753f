"""The page of a generator shows its files in order, escaped, and no others."""

import base64
import html.parser
import json
import re

import numpy as np
import pytest

from fsq_jax import report as report_lib
from fsq_jax.report import curves

_TIMES = '\N{MULTIPLICATION SIGN}'
_EVIL = '<script>alert("x")</script>'
_BASELINES = {
    'uniform': 9.0,
    'unigram': 6.3125,
    'class_position_unigram': 4.25,
    'left_neighbour': 4.375,
}


class _Page(html.parser.HTMLParser):
  """Checks that tags are balanced; keeps tags, links and text."""

  def __init__(self, page):
    super().__init__()
    self.open, self.tags, self.links, self.text = [], [], [], ''
    self.feed(page)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [x for name, x in attrs if name in ('src', 'href', 'data')]
    if tag not in ('img', 'input', 'meta'):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    self.handle_endtag(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] not in ('style', 'script'):
      self.text += data


def _write(workdir, **files):
  for name, value in files.items():
    (workdir / f'{name}.json').write_text(json.dumps(value))


def _evaluation(**changes):
  return {
      'step': 600,
      'metrics': {
          'bits_per_token': 3.359, 'bits_per_image': 53.74,
          'train_bits_per_token': 3.01, 'generalization_gap': 0.349,
          'fd_pixel_pca': 312.34, 'nearest_neighbour_accuracy': 0.9344,
          'copies': 3, 'fid': None,
      },
      'baselines': _BASELINES,
      'protocol': {
          'num_images': 397, 'num_tokens': 16,
          'sampler': {'order': 'halton'},
          'definitions': {
              'bits_per_token': 'bound & mean', 'unigram': 'frequencies',
          },
      },
  } | changes


@pytest.fixture
def workdir(tmp_path):
  """A finished run with two evaluations."""
  workdir = tmp_path / 'digits_masked'
  workdir.mkdir()
  model = {'kind': 'masked', 'preset': 'tiny', 'class_conditional': True}
  _write(
      workdir,
      config={'tokens': {'tokenizer': 'runs/first'}, 'model': model},
      quantizer={'name': 'fsq', 'levels': [8, 8, 8]},
      run={'command': 'python launch.py --x'},
      evaluation=_evaluation(),
  )
  rows, images = [], np.zeros((4, 4, 4, 3), np.uint8)
  labels, masked = np.array([0, 0, 1, 1]), np.ones((4, 2, 2), bool)
  for step in (300, 600):
    rows.append({'step': step, 'split': 'train', 'loss': 500 / step})
    bits = {'bits_per_token': 3 + 300 / step, 'train_bits_per_token': 3.25}
    rows.append({'step': step, 'split': 'eval', **bits})
    sheets = {
        '': report_lib.contact_sheet(images, labels, ['a', 'b']),
        '_inpainting': report_lib.inpainting_sheet(
            images, masked, images[:, None]
        ),
        '_nearest': report_lib.nearest_sheet(images, images, labels),
    }
    for name, sheet in sheets.items():
      # Told apart by their first pixel.
      sheet[0, 0] = step // 10
      path = workdir / 'samples' / f'step_{step:08}{name}.png'
      report_lib.save_png(path, sheet)
  (workdir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  return workdir


def _read(workdir):
  path = report_lib.write_report(workdir)
  assert path == str(workdir / 'report.html')
  with open(path, encoding='utf-8') as file:
    return file.read()


def _titles(page):
  return re.findall('<h2>(.*?)</h2>', page)


def _shown(workdir, page):
  """Returns the names of the pictures in a page, in their order."""
  places = {
      path.name: page.find(base64.b64encode(path.read_bytes()).decode())
      for path in (workdir / 'samples').iterdir()
  }
  return sorted(
      (name for name, place in places.items() if place >= 0), key=places.get
  )


@pytest.fixture
def no_plots(monkeypatch):
  """Matplotlib takes most of the time of a page."""
  monkeypatch.setattr(curves, 'plot', lambda *args, **kwargs: '')


@pytest.mark.usefixtures('no_plots')
def test_page_shows_the_numbers(workdir):
  text = _Page(_read(workdir)).text
  assert (
      'A class-conditional masked generator of size tiny on tokens of FSQ with'
      f' levels 8 {_TIMES} 8 {_TIMES} 8 (512 codes) predicts held-out tokens at'
      ' 3.36 bits per token (53.7 bits per image) after 600 steps; best'
      f' baseline, class {_TIMES} position unigram: 4.25 bits.'
  ) in text
  for tile in (
      '3.36Bits per tokenheld-out; training 3.01',
      '53.7Bits per image16 tokens, any-order bound',
      f'4.25Best baselinebits per token, class {_TIMES} position unigram',
      '312.3Frechet distancePCA of pixels',
      '93.4 %1-NN accuracy',
      '3Copies',
  ):
    assert tile in text
  for row in (
      'bits_per_token3.36bound & mean',
      'generalization_gap0.35',
      'fid\N{EN DASH}',
      'unigram6.31frequencies',
      'class_position_unigram4.25',
  ):
    assert row in text
  assert 'orderhalton' in text
  assert 'python launch.py --x' in text


@pytest.mark.usefixtures('no_plots')
def test_sections_have_an_order_and_pictures_the_newest_step(workdir):
  page = _read(workdir)
  assert _titles(page) == [
      'Samples',
      'Training curves',
      'Inpainting',
      'Nearest training images',
      'All metrics at step 600',
      'Baselines, bits per token',
      'Evaluation protocol',
      'Quantizer',
      'Configuration',
      'Command, versions and devices',
  ]
  assert _shown(workdir, page) == [
      'step_00000300.png',
      'step_00000600.png',
      'step_00000600_inpainting.png',
      'step_00000600_nearest.png',
  ]
  hidden = [' hidden' in tag for tag in re.findall('<img[^>]*>', page)]
  assert hidden == [True, False, False, False]
  assert 'max="1" value="1"' in page
  assert 'One row per class, <output id="shown">step 600' in page


def test_page_loads_nothing(workdir):
  page = _read(workdir)
  parsed = _Page(page)
  assert parsed.links
  for link in parsed.links:
    assert link.startswith(('data:image/png;base64,', '#')), link[:80]
  assert not re.search(r'@import|url\((?!#)', page)
  # Baselines are in the curves, too.
  assert f'>class {_TIMES} position unigram 4.25</text>' in page


@pytest.mark.usefixtures('no_plots')
def test_texts_are_escaped(workdir, tmp_path):
  workdir = workdir.rename(tmp_path / '<script>alert(1)<')
  (workdir / 'samples' / 'step_00000600.png').write_bytes(b'<script>')
  _write(
      workdir,
      config={
          'tokens': _EVIL,
          'model': {'kind': _EVIL, 'preset': _EVIL},
      },
      quantizer={'name': _EVIL},
      run={_EVIL: _EVIL},
      evaluation=_evaluation(
          baselines={_EVIL: 1.0},
          protocol={'sampler': _EVIL, 'definitions': {_EVIL: _EVIL}},
      ),
  )
  parsed = _Page(_read(workdir))
  assert parsed.tags.count('script') == 1
  # Summary (3, and the quantizer in capitals), tile, baseline and definition,
  # protocol, quantizer, configuration (3), command (2).
  assert parsed.text.count(_EVIL) == 13
  assert _EVIL.upper() in parsed.text


@pytest.mark.usefixtures('no_plots')
def test_pages_of_unfinished_runs(workdir):
  (workdir / 'evaluation.json').unlink()
  text = _Page(_read(workdir)).text
  assert 'held-out tokens at 3.50 bits per token after 600 steps.' in text
  assert 'Best baseline' not in text
  (workdir / 'metrics.jsonl').write_text(
      '{"step": 20, "split": "train", "loss": 5.25}'
  )
  for path in (workdir / 'samples').iterdir():
    path.unlink()
  page = _read(workdir)
  assert 'no evaluation yet; after step 20 the loss is 5.25.' in page
  assert _titles(page) == [
      'Training curves', 'Quantizer', 'Configuration',
      'Command, versions and devices',
  ]
  (workdir / 'metrics.jsonl').unlink()
  for name in ('quantizer', 'run'):
    (workdir / f'{name}.json').unlink()
  page = _read(workdir)
  assert (
      'A class-conditional masked generator of size tiny: no metrics have been'
      ' logged yet.'
  ) in page
  assert _titles(page) == ['Configuration']
  (workdir / 'config.json').write_text('{"tokens": {}}')
  assert 'A generator: no metrics' in _read(workdir)


@pytest.mark.usefixtures('no_plots')
def test_values_that_are_not_finite_are_no_results(workdir):
  metrics = {'bits_per_token': None, 'copies': None}
  baselines = {'uniform': None, 'unigram': 5.0}
  _write(
      workdir, evaluation=_evaluation(metrics=metrics, baselines=baselines)
  )
  text = _Page(_read(workdir)).text
  assert 'the evaluation has no finite bits per token.' in text
  assert '5.00Best baselinebits per token, unigram' in text
  assert 'uniform\N{EN DASH}' in text
  assert 'Copies' not in text


@pytest.mark.usefixtures('no_plots')
def test_corrupted_pictures_are_named(workdir):
  for name in ('step_00000600.png', 'step_00000600_nearest.png'):
    path = workdir / 'samples' / name
    path.write_bytes(path.read_bytes()[:60])
  page = _read(workdir)
  text = _Page(page).text
  assert 'step_00000600.png: ' in text
  assert 'step_00000600_nearest.png: ' in text
  assert _shown(workdir, page) == [
      'step_00000300.png', 'step_00000600_inpainting.png'
  ]
  assert 'Nearest training images' not in _titles(page)


@pytest.mark.usefixtures('no_plots')
@pytest.mark.parametrize(
    ('model', 'name', 'note'),
    [
        ({'kind': 'autoregressive'}, 'An autoregressive', 'exact likelihood'),
        ({'kind': 'masked'}, 'A masked', 'any-order bound'),
        (
            {'kind': 'autoregressive', 'class_conditional': True},
            'A class-conditional autoregressive',
            'exact likelihood',
        ),
    ],
)
def test_kinds_of_models(workdir, model, name, note):
  _write(workdir, config={'tokens': {}, 'model': model})
  text = _Page(_read(workdir)).text
  assert f'{name} generator on tokens of' in text
  assert f'16 tokens, {note}' in text
  caption = 'One row per class' if len(model) == 2 else 'Random samples'
  assert f'{caption}, step 600.' in text


def test_an_autoencoder_has_its_own_page(workdir):
  _write(workdir, config={'data': {}})
  page = _read(workdir)
  assert 'the evaluation has no finite PSNR' in page
  assert not _shown(workdir, page)


def test_baselines_are_lines_at_their_height():
  bits = [8.0, 5.0, 4.0]
  rows = [{'step': i, 'bits_per_token': x} for i, x in enumerate(bits)]
  svg = curves.render({'train': [], 'eval': rows}, {'a $b$': 6.5, '<c>': 6.4})
  marks = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*#3f7fd6', svg)
  y = np.array(marks, float)[:3, 1]
  lines = re.findall(
      r'd="M [\d.]+ ([\d.]+) \nL [\d.]+ ([\d.]+) \n"[^>]*stroke-dasharray', svg
  )
  heights = np.interp([6.4, 6.5], bits[::-1], y[::-1])
  np.testing.assert_allclose(np.array(lines, float)[:, 0], heights, rtol=1e-4)
  np.testing.assert_allclose(np.array(lines, float)[:, 1], heights, rtol=1e-4)
  # Labels do not overlap: 8 points of text.
  low, high = (
      float(re.search(rf'y="([\d.]+)"[^>]*>{label}</text>', svg)[1])
      for label in ('&lt;c&gt; 6.40', r'a \$b\$ 6.50')
  )
  assert low - high > 8


def test_labels_of_lines_stay_beside_the_axes():
  points = {'bits_per_token': np.array([[0.0, 5.0], [1.0, 4.0]])}
  levels = {str(i): 5.0 for i in range(4)} | {'low': 4.0}
  svg = curves.plot(points, 'linear', 'x-', levels=levels)
  y = [float(x) for x in re.findall(r'y="([\d.]+)"[^>]*>\d 5.00</text>', svg)]
  assert len(y) == 4
  assert min(-np.diff(y)) > 8
  assert min(y) > 0
