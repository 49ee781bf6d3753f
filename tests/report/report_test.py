"""The report shows the numbers of a workdir, escaped, and nothing foreign."""

import base64
import html.parser
import io
import json
import os
import re

import numpy as np
import PIL.Image
import pytest

from fsq_jax import report as report_lib
from fsq_jax.evaluation import network_metrics
from fsq_jax.report import curves
from fsq_jax.report import elements
from fsq_jax.report import report

# Pixels of a grid: margin of its labels, gaps between rows and between blocks.
_MARGIN, _GAP, _BLOCK_GAP = 22, 3, 14
_VOID = {'br', 'img', 'input', 'meta'}
_EVIL = '<script>alert("x")</script>'


class _Page(html.parser.HTMLParser):
  """Checks that tags are balanced, and keeps attributes, ids and text."""

  def __init__(self, page):
    super().__init__()
    self.open, self.tags, self.links, self.ids = [], [], [], []
    self.text = ''
    self.feed(page)
    self.close()
    assert not self.open, f'never closed: {self.open}'
    assert len(self.ids) == len(set(self.ids))

  def handle_starttag(self, tag, attrs):
    self.handle_startendtag(tag, attrs)
    if tag not in _VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    for name, value in attrs:
      if name in ('src', 'href', 'xlink:href', 'srcset', 'data', 'action'):
        self.links.append(value)
      if name == 'id':
        self.ids.append(value)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] not in ('style', 'script'):
      self.text += data


def _write(workdir, **files):
  for name, value in files.items():
    (workdir / f'{name}.json').write_text(json.dumps(value))


def _read(workdir):
  path = report_lib.write_report(workdir)
  assert path == str(workdir / 'report.html')
  with open(path, encoding='utf-8') as file:
    return file.read()


def _images(seed, num, height=8, width=10):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (num, height, width, 3), np.uint8)


@pytest.fixture
def workdir(tmp_path):
  """A finished run of three evaluations."""
  workdir = tmp_path / 'photos_888'
  workdir.mkdir()
  _write(
      workdir,
      config={'data': {'image_size': [16, 32]}, 'optim': {'b1': 0.875}},
      quantizer={'name': 'fsq', 'levels': [4, 2]},
      run={'command': 'python launch.py --x', 'git': None},
      evaluation={
          'step': 1500,
          'metrics': {'psnr': 27.1234567, 'ssim': 0.81239, 'lpips': None},
          'codebook': {
              'codebook_size': 8,
              'num_tokens': 1600,
              'num_used_codes': 6,
              'usage': 0.75,
              'perplexity': 5.2784,
              'entropy_bits': 2.4001,
              'level_histograms': [[400, 0, 800, 400], [1000, 600]],
              'level_entropy_bits': [1.5, 0.954],
              'dead_levels': [1, 0],
          },
          'protocol': {
              'source': 'photos',
              'num_images': 100,
              'definitions': {'psnr': 'in dB', 'ssim': 'like & unlike'},
          },
      },
  )
  rows = []
  for step in range(500, 2000, 500):
    loss = {'loss': 1 / step, 'learning_rate': 0.1, 'gradient_norm': None}
    rows.append({'step': step, 'split': 'train', **loss})
    rows.append({'step': step, 'split': 'eval', 'psnr': 20 + step / 500})
    grid = report_lib.reconstruction_grid(_images(0, 4), _images(step, 4))
    path = workdir / 'reconstructions' / f'step_{step:08}.png'
    report_lib.save_png(path, grid)
  lines = [json.dumps(row) for row in rows]
  (workdir / 'metrics.jsonl').write_text('\n'.join(lines))
  return workdir


def test_page_is_balanced_and_loads_nothing(workdir):
  page = _read(workdir)
  links = _Page(page).links
  assert links
  for link in links:
    assert link.startswith(('data:image/png;base64,', '#')), link[:80]
  assert not re.search(r'@import|url\((?!#)', page)
  assert set(re.findall(r'https?://[^"\s]+', page)) <= {
      'http://www.w3.org/2000/svg',
      'http://www.w3.org/1999/xlink',
  }


def test_page_shows_the_numbers(workdir):
  text = _Page(_read(workdir)).text
  assert (
      'FSQ with levels 4 \N{MULTIPLICATION SIGN} 2 (8 codes) reconstructs 100'
      ' images of photos at 27.12 dB PSNR and 0.812 SSIM, using 75.0 % of its'
      ' codes, after 1,500 steps.'
  ) in text
  # 16 tokens of 3 bits for 16 x 32 pixels.
  for tile in (
      '27.12 dBPSNR',
      '0.812SSIM',
      '75.0 %Codebook usage6 of 8 codes',
      '5.3Perplexityof 8 codes',
      '2.40Bits per tokenentropy, of 3.00',
      '0.094Bits per pixel16 tokens per image',
  ):
    assert tile in text
  for cells in ('psnr27.12in dB', 'ssim0.812like & unlike'):
    assert cells in text
  assert 'lpips\N{EN DASH}' in text
  assert 'num_tokens1,600' in text
  assert 'perplexity5.3' in text
  assert 'level_entropy_bits1.50, 0.95' in text
  assert 'Dimension 1: 1.50 of 2.00 bits, 1 dead' in text
  assert 'b10.875' in text
  assert 'python launch.py --x' in text


def test_without_tokens_the_page_has_no_codebook(workdir):
  evaluation = json.loads((workdir / 'evaluation.json').read_text())
  evaluation['codebook'] = {}
  spec = {'name': 'none', 'code_dim': 8, 'code': 'latent'}
  _write(workdir, quantizer=spec, evaluation=evaluation)
  text = _Page(_read(workdir)).text
  assert (
      'A continuous autoencoder reconstructs 100 images of photos at 27.12 dB'
      ' PSNR and 0.812 SSIM, after 1,500 steps.'
  ) in text
  for word in ('usage', 'Perplexity', 'Bits', 'each level', 'num_tokens'):
    assert word not in text
  assert 'code_dim8' in text


def test_level_bars_have_the_heights_of_their_counts(workdir):
  bars = re.findall(r'height:([\d.]+)%"( class="dead")?', _read(workdir))
  assert bars == [
      ('50.0', ''),
      ('0.0', ' class="dead"'),
      ('100.0', ''),
      ('50.0', ''),
      ('100.0', ''),
      ('60.0', ''),
  ]


def test_histograms_of_levels_have_axes(workdir):
  text = _Page(_read(workdir)).text
  for name, most, levels in (('1', '50.0', '0123'), ('2', '62.5', '01')):
    axes = f'share of tokens{most} %0{levels}level index'
    assert re.search(f'Dimension {name}: [^%]*bits[^%]*{axes}', text), text
  # Not one number per level where they do not fit.
  text = _Page(elements.levels([1] * 64, 6.0, 'x')).text
  assert '0' + ''.join(map(str, range(0, 64, 8))) + 'level index' in text


def test_numbers_have_the_decimals_of_their_metric():
  values = {
      'psnr': (28.0, '28.00'),
      'ssim': (0.75, '0.750'),
      'ssim_uniform': (0.74379, '0.744'),
      'perplexity': (1333.04, '1,333.0'),
      'level_entropy_bits': (2.7, '2.70'),
      'entropy_bits_miller_madow': (7.0804, '7.08'),
      'mse': (0.00231903, '0.002319'),
      'lpips_vgg16': (0.123456, '0.1235'),
      'num_tokens': (21888, '21,888'),
      'rfid': (float('nan'), '\N{EN DASH}'),
      'l1': (None, '\N{EN DASH}'),
  }
  found = {name: elements.number(name, x) for name, (x, _) in values.items()}
  assert found == {name: text for name, (_, text) in values.items()}


def test_whole_photographs_come_first(workdir):
  folder = workdir / 'reconstructions'
  photographs = {}
  for i, name in enumerate(
      ('step_00000500_a', 'step_00001500_a', 'step_00001500_b', 'best_step_1_a')
  ):
    photographs[name] = _png(_images(i, 1)[0])
    (folder / f'{name}.png').write_bytes(photographs[name])
  (folder / 'step_00001500_c.png').write_bytes(b'cut')
  page = _read(workdir)
  text = _Page(page).text
  titles = re.findall('<h2>(.*?)</h2>', page)
  assert titles[:2] == ['Held-out photographs', 'Reconstructions']
  assert 'Original above reconstruction, step 1,500.' in text
  pictures = {
      name: base64.b64encode(png).decode() in page
      for name, png in photographs.items()
  }
  assert [name for name, shown in pictures.items() if shown] == [
      'step_00001500_a', 'step_00001500_b',
  ]
  assert 'step_00001500_c.png: ' in text
  assert 'max="2" value="2"' in page  # The slider has the three grids.
  # Photographs of another step than the newest grid are of an earlier run.
  for path in folder.glob('step_00001500_*.png'):
    path.unlink()
  assert 'Held-out photographs' not in _read(workdir)


def test_boxes_that_scroll_sideways_say_so(workdir):
  page = _read(workdir)
  assert '<div class="wide"><img class="frame"' in page
  assert '.scrolls::before { content: \'Scroll sideways' in page
  assert "box.classList.toggle('scrolls', box.scrollWidth >" in page


def test_texts_of_a_run_are_escaped(workdir, tmp_path):
  workdir = workdir.rename(tmp_path / '<script>alert(1)<')
  evaluation = json.loads((workdir / 'evaluation.json').read_text())
  evaluation['metrics'][_EVIL] = _EVIL
  evaluation['protocol'] |= {'source': _EVIL, 'definitions': {'psnr': _EVIL}}
  _write(
      workdir,
      config={_EVIL: {_EVIL: [_EVIL]}},
      quantizer={'name': _EVIL},
      run={'command': _EVIL},
      evaluation=evaluation,
  )
  parsed = _Page(_read(workdir))
  assert parsed.tags.count('script') == 1
  assert parsed.text.count(_EVIL) >= 8
  assert '<script>alert(1)<' in parsed.text


def test_page_of_an_empty_workdir(tmp_path):
  text = _Page(_read(tmp_path)).text
  assert 'no metrics have been logged yet' in text
  assert 'cannot be read' not in text


def test_page_before_the_first_evaluation(workdir):
  (workdir / 'evaluation.json').unlink()
  rows = [{'step': 20, 'split': 'train', 'loss': 0.5}]
  (workdir / 'metrics.jsonl').write_text(json.dumps(rows[0]))
  text = _Page(_read(workdir)).text
  assert 'no evaluation yet; after step 20 the loss is 0.5.' in text


def test_last_row_stands_in_for_a_missing_evaluation(workdir):
  (workdir / 'evaluation.json').unlink()
  text = _Page(_read(workdir)).text
  assert '(8 codes) reconstructs images at 23.00 dB PSNR, after 1,500' in text


def test_non_finite_evaluation_is_not_a_missing_one(workdir):
  _write(workdir, evaluation={'step': 5, 'metrics': {'psnr': None}})
  assert 'no finite PSNR' in _Page(_read(workdir)).text


def test_damaged_files_are_named(workdir):
  (workdir / 'evaluation.json').write_text('{"step": 15')
  (workdir / 'run.json').write_text('[1]')
  frames = sorted((workdir / 'reconstructions').iterdir())
  frames[-1].write_bytes(frames[-1].read_bytes()[:200])
  page = _read(workdir)
  text = _Page(page).text
  assert 'evaluation.json cannot be read' in text
  assert 'run.json cannot be read: it is not a JSON object' in text
  assert 'step_00001500.png: ' in text
  assert page.count('data:image/png') == 2


def test_rows_survive_a_crash_and_the_later_of_two_wins(tmp_path):
  lines = [
      '{"step": 20, "split": "train", "loss": 1.0}',
      '{"step": 30, "split": "train", "loss": 5.0}',
      '{"step": 20, "split": "train", "loss": NaN}',
      '[1, 2]',
      '{"loss": 6.0}',
      '{"step": 10, "split": "train", "loss": 3.0}',
      '{"step": 30, "split": "train", "loss": 4.0}',
      '{"step": 40, "split": "train", "lo',
  ]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines))
  assert 'after step 30 the loss is 4.' in _Page(_read(tmp_path)).text


def test_curve_passes_through_its_points():
  values = [1.0, 3.0, 2.0]
  rows = [{'step': i, 'psnr': value} for i, value in enumerate(values)]
  rows.insert(1, {'step': 0.5, 'psnr': None})
  svg = curves.render({'train': [], 'eval': rows})
  assert svg.count('<figure>') == 1
  assert 'PSNR' in svg
  marks = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*#3f7fd6', svg)
  x, y = np.array(marks, float).T
  np.testing.assert_allclose(np.diff(x)[0], np.diff(x)[1], rtol=1e-4)
  # Downwards on the page: 1 -> 3 goes up twice as far as 3 -> 2 comes down.
  np.testing.assert_allclose(y[0] - y[1], 2 * (y[2] - y[1]), rtol=1e-4)


@pytest.mark.parametrize(
    ('split', 'names'),
    [
        (
            'train',
            (
                'loss', 'reconstruction_loss', 'perceptual_loss',
                'quantizer_loss', 'distillation_loss',
            ),
        ),
        ('train', ('adversarial_loss', 'discriminator_loss', 'lecam_loss')),
        ('train', ('real_logits', 'fake_logits')),
        ('train', ('gradient_norm', 'discriminator_gradient_norm')),
        ('eval', ('lpips_alexnet', 'lpips_vgg16')),
    ],
)
def test_curves_of_one_plot_have_colors_of_their_own(split, names):
  rows = [{'step': i, **dict.fromkeys(names, 2.0 + i)} for i in range(3)]
  svg = curves.render({'train': [], 'eval': []} | {split: rows})
  assert svg.count('<figure>') == 1
  for name in names:
    label = 'total loss' if name == 'loss' else name.replace('_', ' ')
    assert f'>{label}</text>' in svg
  # Points, and one in the legend.
  colors = re.findall(r'<use [^>]*fill: (#\w+)', svg)
  assert sorted(map(colors.count, set(colors))) == [4] * len(names)


def test_the_total_loss_does_not_hide_its_only_term():
  rows = [{'step': i, 'loss': 2.0, 'reconstruction_loss': 2.0} for i in (1, 2)]
  svg = curves.render({'train': rows, 'eval': []})
  lines = re.findall(
      r'<path d="M[^"]*" [^>]*stroke: (#\w+)(?:; stroke-opacity: ([\d.]+))?;'
      r' stroke-width: ([\d.]+)',
      svg,
  )
  # The wide, light line of the term is drawn first.
  assert lines[:2] == [('#e0862c', '0.35', '5'), ('#3f7fd6', '', '1.2')]


def test_losses_below_zero_are_drawn():
  values = [0.0, -1.0, -3.0]  # 0 before their start.
  rows = [{'step': i, 'adversarial_loss': x} for i, x in enumerate(values)]
  svg = curves.render({'train': rows, 'eval': []})
  marks = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*#3f7fd6', svg)
  y = np.array(marks, float)[:, 1]
  np.testing.assert_allclose(y[2] - y[1], 2 * (y[1] - y[0]), rtol=1e-4)


@pytest.mark.parametrize(
    ('split', 'name', 'title'),
    [
        ('train', 'adversarial_weight', 'Adversarial weight'),
        ('train', 'r1_penalty', 'R1 penalty'),
        ('eval', 'rfid', 'rFID'),
        ('eval', 'fd_vgg16', 'Frechet distance, VGG16'),
        ('eval', 'fd_encoder', 'Frechet distance, encoder'),
    ],
)
def test_numbers_of_other_units_have_plots_of_their_own(split, name, title):
  rows = [{'step': i, name: 2.0 + i} for i in range(3)]
  svg = curves.render({'train': [], 'eval': []} | {split: rows})
  assert re.findall('<figcaption>(.*?)</figcaption>', svg) == [title]


@pytest.mark.slow
def test_every_metric_by_a_network_has_a_curve_and_a_tile(workdir):
  names = list(network_metrics.DEFINITIONS)
  for name in names:
    rows = [{'step': i, name: 2.0 + i} for i in range(3)]
    svg = curves.render({'train': [], 'eval': rows})
    assert svg.count('<figcaption>') == 1, name
  evaluation = json.loads((workdir / 'evaluation.json').read_text())
  # What would round to the same is told apart.
  values = {name: 0.12344 + i for i, name in enumerate(names)}
  evaluation['metrics'] |= values
  _write(workdir, evaluation=evaluation)
  text = _Page(_read(workdir)).text
  for tile in (
      '0.1234LPIPSAlexNet',
      '1.123LPIPSVGG16',
      '2.123rFIDInception-v3',
      '3.123rFIDInception-v3, grid of TF 1',
      '4.123Frechet distanceVGG16',
      '5.123Frechet distancelatents of an encoder',
  ):
    assert tile in text


def test_long_curves_stay_small():
  rng = np.random.default_rng(0)
  rows = [
      {'step': step, 'gradient_norm': float(norm)}
      for step, norm in enumerate(rng.uniform(1, 2, 20_000))
  ]
  assert len(curves.render({'train': rows, 'eval': []})) < 100_000


@pytest.mark.slow
def test_earlier_grids_stand_behind_a_slider(workdir, monkeypatch):
  page = _read(workdir)
  assert re.findall(r'alt="(step [\d,]+)"', page) == [
      'step 500',
      'step 1,000',
      'step 1,500',
  ]
  shown = ['" hidden' not in tag for tag in re.findall('<img[^>]*>', page)]
  assert shown == [False, False, True]
  assert 'max="2" value="2"' in page
  monkeypatch.setattr(report, 'MAX_FRAMES', 2)
  assert re.findall(r'alt="(step [\d,]+)"', _read(workdir)) == [
      'step 500',
      'step 1,500',
  ]
  monkeypatch.setattr(report, 'MAX_FRAME_BYTES', 10)
  page = _read(workdir)
  assert re.findall(r'alt="(step [\d,]+)"', page) == ['step 1,500']
  assert 'id="slider"' not in page


def test_report_replaces_the_old_one_whole(workdir, monkeypatch):
  (workdir / 'report.html').write_text('old')

  def fail(source, target):
    del source, target
    raise OSError('disk full')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='disk full'):
      report_lib.write_report(workdir)
  assert (workdir / 'report.html').read_text() == 'old'
  assert not list(workdir.glob('*.tmp'))
  report_lib.write_report(workdir)
  assert (workdir / 'report.html').read_text() != 'old'


@pytest.mark.parametrize(
    ('num', 'height', 'width', 'columns', 'scale'),
    [(5, 8, 10, 2, 8), (9, 32, 32, None, 4), (3, 40, 256, None, 1)],
)
def test_grid_holds_every_pixel(num, height, width, columns, scale):
  originals = _images(0, num, height, width)
  reconstructions = _images(1, num, height, width)
  grid = report_lib.reconstruction_grid(
      originals, reconstructions, columns=columns
  )
  columns = columns or {9: 8, 3: 3}[num]
  cell = np.array([height, width]) * scale
  rows = -(-num // columns)
  assert grid.dtype == np.uint8
  assert grid.shape == (
      rows * (2 * cell[0] + _GAP) + (rows - 1) * _BLOCK_GAP,
      _MARGIN + columns * cell[1] + (columns - 1) * _GAP,
      3,
  )
  white = np.ones(grid.shape[:2], bool)
  white[:, : _MARGIN] = False
  for i in range(num):
    left = _MARGIN + i % columns * (cell[1] + _GAP)
    top = i // columns * (2 * cell[0] + _GAP + _BLOCK_GAP)
    for images in (originals, reconstructions):
      place = np.s_[top : top + cell[0], left : left + cell[1]]
      expected = np.kron(images[i], np.ones((scale, scale, 1), np.uint8))
      np.testing.assert_array_equal(grid[place], expected)
      # Grey letters stand beside each row.
      assert grid[top : top + cell[0], : _MARGIN].min() < 160
      white[place] = False
      top += cell[0] + _GAP
  assert (grid[white] == 255).all()


def test_photographs_are_not_enlarged():
  images = _images(0, 1, height=288, width=448)
  grid = report_lib.reconstruction_grid(images, images, width=600)
  assert grid.shape == (2 * 288 + _GAP, _MARGIN + 448, 3)


@pytest.mark.parametrize('size', [16, 28, 32, 64, 128, 256])
def test_grid_is_about_as_wide_as_a_page(size):
  images = np.zeros((24, size, size, 3), np.uint8)
  assert 1000 < report_lib.reconstruction_grid(images, images).shape[1] < 1400


def test_grid_refuses_other_shapes_and_types():
  images = _images(0, 2)
  with pytest.raises(ValueError, match='equal shapes'):
    report_lib.reconstruction_grid(images, images[:1])
  with pytest.raises(ValueError, match='at least one'):
    report_lib.reconstruction_grid(images[:0], images[:0])
  with pytest.raises(ValueError, match='to_uint8'):
    report_lib.reconstruction_grid(images, images.astype(np.float32))


def test_png_returns_the_pixels(tmp_path):
  image = _images(0, 1)[0]
  report_lib.save_png(tmp_path / 'new' / 'image.png', image)
  data = (tmp_path / 'new' / 'image.png').read_bytes()
  np.testing.assert_array_equal(PIL.Image.open(io.BytesIO(data)), image)


def _analysis(**changes):
  """An analysis as of --mode=report, of two dimensions."""
  png = base64.b64encode(_png(_images(0, 1)[0])).decode()
  image = {
      'index': 7, 'psnr': 21.456, 'original': png, 'reconstruction': png,
  }
  direction = {
      'num_pairs': 1500, 'num_cells': 30, 'bits': 1.234,
      'bits_miller_madow': 1.111,
      'observed': [[40, 0], [2, 3]], 'expected': [[10.0, 6.0], [8.0, 4.9]],
  }
  cell = {'level': 2, 'own': True, 'rms': 3.14, 'image': png,
          'difference': png}
  return {
      'version': report_lib.ANALYSIS_VERSION,
      'step': 1500,
      'protocol': {'source': 'photos', 'split': 'test'},
      'quantizer': {'name': 'fsq'},
      'num_images': 100,
      'num_nonfinite_reconstructions': 0,
      'codebook': {
          'codebook_size': 8, 'num_tokens': 1600, 'num_used_codes': 6,
          'tokens_per_code': 200.0,
      },
      'index_shape': [],
      'dimensions': 2,
      'digits': {
          'histograms': [[400, 0, 800, 400], [1000, 600]],
          'entropy_bits': [1.5, 0.954],
          'pairs': {
              name: {'num_pairs': 1500, 'bits': [[1.5, 0.25], [0.5, 0.954]]}
              for name in ('token', 'right', 'below')
          },
      },
      'code_ranks': {
          'ranks': [1, 2, 6], 'counts': [800, 400, 10],
          'num_codes_of_share': {'0.5': 1, '0.9': 4},
      },
      'top_codes': [
          {'code': 5, 'count': 800, 'digits': [2, 1], 'swatch': png},
          {'code': 1, 'count': 400, 'digits': [0, 1], 'swatch': png},
      ],
      'code_pairs': {
          'num_classes': 8, 'codes_per_class': 1, 'order': 'index',
          'shown': [5, 1],
          'directions': {'right': direction, 'below': direction},
      },
      'swaps': [{
          'index': 7, 'position': [3, 4], 'box': [0.5, 0.25, 0.125, 0.125],
          'token': 5, 'num_digits': 2, 'gain': 2.5, 'reconstruction': png,
          'rows': [
              {'slot': 0, 'dimension': 1, 'cells': [cell],
               'share_in_patch': 0.87},
          ],
      }],
      'num_grids': 100,
      'nearest': [{
          'index': 7, 'image': png,
          'nearest': [{'index': 9, 'distance': 0.1234, 'equal_tokens': 0.25,
                       'image': png}],
      }],
      'spread': [image], 'worst': [image], 'best': [image],
  } | changes


def _png(image):
  file = io.BytesIO()
  PIL.Image.fromarray(image).save(file, 'png')
  return file.getvalue()


def _words(text):
  return re.sub(r'\s+', ' ', text)


@pytest.mark.fast_limit(10)
def test_analysis_stands_in_the_page_with_definitions(workdir):
  _write(workdir, codebook=_analysis())
  page = _read(workdir)
  parsed = _Page(page)
  text = _words(parsed.text)
  for part in (
      '100 images of photos / test after 1,500 steps.',
      '21.46 dB, #7',
      'Dimension 1: 1.50 of 2.00 bits, 1 dead',
      '6 of 8 codes occur in 1,600 tokens, 200 per code.',
      '1 for 50 %, 4 for 90 %.',
      '5(2 1)50.0 %',
      'Mutual information in bits: sum of p(x, y) log2 p(x, y)',
      'The token to the right, 1,500 pairs',
      'mutual information 1.23 bits, 1.11 bias-corrected; 1,500 pairs, 30 d',
      '#7, token in row 4, column 5. Differences times 2.5.',
      'Dimension 2: 87 % in the patch',
      'Shown are the first 1 of 2 dimensions.',
      'level 2RMS 3.1',
      '0.123, #925 % equal',
      'neighbours among 100 images, spaced evenly over the split',
  ):
    assert part in text, part
  # The levels are there once.
  assert text.count('How often each level occurs') == 1
  for link in parsed.links:
    assert link.startswith(('data:image/png;base64,', '#')), link[:80]
  assert 'left:50.000%;top:25.000%;width:12.500%' in page
  assert page.count('aria-label="line between original and recon') == 1
  assert parsed.tags.count('input') == 2  # Slider and line.


def test_cells_say_how_often_codes_are_neighbours(workdir):
  _write(workdir, codebook=_analysis())
  cells = re.findall(
      r'<td title="([^"]*)" style="[^"]*var\((--\w+)\) (\d+)%[^"]*">([^<]*)<',
      _read(workdir),
  )
  minus = '\N{MINUS SIGN}\N{INFINITY}'
  expected = [
      ('40 pairs, expected 10.0', '--mark', '47', '+2.0'),
      ('0 pairs, expected 6.0', '--soft', '45', minus),
      ('2 pairs, expected 8.0', '--soft', '30', '-2.0'),
      ('3 pairs, expected 4.9', '--soft', '0', ''),
  ]
  assert cells[-4:] == cells[-8:-4] == expected
  # The entropies of one token have no color, the largest of the rest all.
  same, right = cells[:4], cells[4:8]
  assert [cell[2:] for cell in same] == [
      ('0', '1.50'), ('35', '0.25'), ('70', '0.50'), ('0', '0.95'),
  ]
  assert [cell[2:] for cell in right] == [
      ('70', '1.50'), ('12', '0.25'), ('23', '0.50'), ('45', '0.95'),
  ]


def test_codes_without_digits_and_classes_of_codes(workdir):
  swap = _analysis()['swaps'][0]
  (row,) = swap['rows']
  cell = {
      key: value for key, value in row['cells'][0].items() if key != 'level'
  } | {'code': 3, 'rank': 8, 'distance': 0.5}
  swap |= {
      'num_digits': 0, 'rows': [{'cells': [cell], 'share_in_patch': 0.5}]
  }
  analysis = _analysis(dimensions=0, digits=None, swaps=[swap])
  analysis['code_pairs'] |= {
      'codes_per_class': 8, 'order': 'first principal component'
  }
  _write(workdir, codebook=analysis)
  text = _words(_Page(_read(workdir)).text)
  assert 'The codes of this quantizer have no level indices.' in text
  assert 'One token changed' in text
  assert 'rank 8code 30.5 awayRMS 3.1' in text
  assert 'Neighbouring classes of codes' in text
  assert 'ordered by first principal component, are one class of 8.' in text


def test_too_many_digits_and_levels_are_said_to_be(workdir):
  analysis = _analysis(index_shape=[2], dimensions=1)
  analysis['digits']['pairs'] = None
  for direction in analysis['code_pairs']['directions'].values():
    direction['expected'] = [[4.0, 3.0], [2.0, 1.0]]
  _write(workdir, codebook=analysis)
  text = _Page(_read(workdir)).text
  assert text.count('No pair is expected at least 5 times.') == 2
  assert 'A position has 2 level indices, too many for a matrix.' in text
  assert 'Dimension 1 of index 2: 0.95 of 1.00 bits' in text
  _write(workdir, codebook=_analysis(digits=None))
  assert 'too many levels to count pairs of them' in _Page(_read(workdir)).text


def test_without_tokens_the_analysis_is_of_images(workdir):
  names = (
      'version', 'step', 'protocol', 'quantizer', 'num_images',
      'num_nonfinite_reconstructions', 'spread', 'worst', 'best',
  )
  analysis = _analysis(num_nonfinite_reconstructions=3)
  analysis = {name: analysis[name] for name in names}
  _write(workdir, codebook=analysis)
  text = _Page(_read(workdir)).text
  assert '3 reconstructions are not finite and have no PSNR.' in text
  assert 'Worst and best images' in text
  assert 'One level index changed' not in text


def test_an_analysis_of_another_step_or_version_is_named(workdir):
  _write(workdir, codebook=_analysis(step=1000))
  text = _words(_Page(_read(workdir)).text)
  assert 'the codebook are of step 1000, everything else is of step' in text
  assert 'One level index changed' in text
  _write(workdir, codebook=_analysis(version=0))
  text = _Page(_read(workdir)).text
  assert 'codebook.json is of another version of fsq_jax and is skipped' in text
  assert 'One level index changed' not in text


def test_texts_of_an_analysis_are_escaped(workdir):
  protocol = {'source': _EVIL, 'split': _EVIL}
  _write(workdir, codebook=_analysis(protocol=protocol))
  parsed = _Page(_read(workdir))
  assert parsed.tags.count('script') == 1
  count = parsed.text.count(_EVIL)
  assert count >= 4
  names = dict.fromkeys(map(str, range(100)), _EVIL)  # Of image files.
  _write(workdir, codebook=_analysis(protocol=protocol, names=names))
  parsed = _Page(_read(workdir))
  assert parsed.tags.count('script') == 1
  assert parsed.text.count(_EVIL) > count
