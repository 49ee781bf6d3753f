"""Mode reconstruct: pictures and numbers of image files; bad input."""

import json
import math
import pathlib

from absl.testing import flagsaver
import numpy as np
from PIL import Image
import pytest
from skimage import metrics

from fsq_jax.analysis import reconstruction
from fsq_jax.tokenizer import tokenizer as tokenizers
import launch

# A trained run: images of 16 x 16 pixels, 16 tokens of 512 codes.
_RUN = pathlib.Path(__file__).parents[1] / 'testdata' / 'run'


def _launch(*args):
  with flagsaver.flagsaver():
    return launch.main(
        launch.parse_flags(['launch.py', '--mode=reconstruct', *args])
    )


def _save(path, height, width):
  rng = np.random.default_rng(height)
  low = rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), np.uint8)
  image = low.repeat(5, axis=0).repeat(5, axis=1)[:height, :width]
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path)


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / 'in'
  _save(folder / 'wide.png', 20, 33)
  _save(folder / 'sub' / 'tiny.jpg', 9, 6)
  return folder


def _read(path):
  return np.asarray(Image.open(path))


@pytest.mark.slow
def test_images_are_written_and_measured(
    folder, tmp_path, capsys, monkeypatch
):
  # Compiled once.
  tokenizer = tokenizers.load_tokenizer(_RUN, 'newest')
  monkeypatch.setattr(
      tokenizers, 'load_tokenizer',
      lambda *args: {(str(_RUN), 'newest'): tokenizer}[args],
  )
  out = tmp_path / 'out'
  args = [
      f'--workdir={_RUN}', f'--images_in={folder}', f'--images={out}',
      '--tiles=overlapping',
  ]
  assert _launch(*args) == 0
  record = json.loads((out / reconstruction.RECORD).read_text())
  assert set(record['images']) == {'wide.png', 'sub/tiny.jpg'}
  assert record['tiles'] == 'overlapping'
  for name, file, num_tokens in (
      ('wide.png', 'wide.png', 8 * 16),
      ('sub/tiny.jpg', 'sub/tiny.jpg.png', 16),
  ):
    original = _read(folder / name)
    restored = _read(out / 'reconstructions' / file)
    np.testing.assert_array_equal(_read(out / 'originals' / file), original)
    np.testing.assert_array_equal(
        restored,
        tokenizer.reconstruct(folder / name, 'pad', tiles='overlapping'),
    )
    pair = _read(out / 'side_by_side' / file)
    assert pair.shape[1] > 2 * original.shape[1]
    row = record['images'][name]
    assert row['num_tokens'] == num_tokens
    pixels = original.shape[0] * original.shape[1]
    assert row['bits_per_pixel'] == pytest.approx(num_tokens * 9 / pixels)
    assert row['psnr'] == pytest.approx(
        metrics.peak_signal_noise_ratio(original, restored)
    )
    if name == 'wide.png':
      assert row['ssim'] == pytest.approx(
          metrics.structural_similarity(
              original, restored, channel_axis=2, gaussian_weights=True,
              sigma=1.5, use_sample_covariance=False,
          ),
          abs=1e-6,
      )
    else:
      assert row['ssim'] is None
  rows = record['images'].values()
  for metric in ('psnr', 'bits_per_pixel'):
    assert record['mean'][metric] == pytest.approx(
        math.fsum(row[metric] for row in rows) / 2
    )
  assert record['mean']['ssim'] == record['images']['wide.png']['ssim']
  said = capsys.readouterr().out
  bits = record['mean']['bits_per_pixel']
  assert f'mean of 2 images: {bits:.2f} bits per pixel, PSNR ' in said
  # The same command again keeps the results.
  assert _launch(*args) == 2
  assert 'out is not empty' in capsys.readouterr().err


def _cut(path):
  path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ('change', 'args', 'message'),
    [
        (None, ['--images={}/out'], 'Give --images_in=FILE_OR_FOLDER to read'),
        (None, ['--images_in={}/in'], 'and --images=FOLDER to write'),
        (
            None, ['--images_in={}/none', '--images={}/out'],
            'none is neither an image file nor a folder',
        ),
        (
            lambda x: _cut(x / 'in' / 'wide.png'),
            ['--images_in={}/in/wide.png', '--images={}/out'],
            'wide.png cannot be read',
        ),
        (
            lambda x: (
                _cut(x / 'in' / 'wide.png'), _cut(x / 'in' / 'sub' / 'tiny.jpg')
            ),
            ['--images_in={}/in', '--images={}/out'],
            'None of 2 images can be read',
        ),
        (
            lambda x: _save(x / 'in' / 'sub' / 'tiny.jpg.png', 5, 5),
            ['--images_in={}/in', '--images={}/out'],
            'would both be written as sub/tiny.jpg.png',
        ),
        (None, ['--images_in={}/in', '--images={}/in'], 'in is not empty'),
        (
            None, ['--images_in={}/in', '--images={}/in/wide.png'],
            'wide.png is a file; give a folder with --images',
        ),
        (
            None, ['--images_in={}/in', '--images={}/out', '--tiles=all'],
            'disjoint|overlapping',
        ),
    ],
)
def test_bad_input_is_named_before_any_work(
    folder, tmp_path, capsys, monkeypatch, change, args, message
):
  def work(*args, **kwargs):
    raise AssertionError('It is too late to say so.')

  monkeypatch.setattr(tokenizers, 'load_tokenizer', work)
  if change is not None:
    change(tmp_path)
  before = sorted(tmp_path.rglob('*'))
  try:
    code = _launch(
        f'--workdir={_RUN}', *(arg.format(tmp_path) for arg in args)
    )
  except SystemExit as error:
    code = error.code
  assert code == 2
  assert message in capsys.readouterr().err
  assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.slow
def test_unreadable_images_are_skipped_and_listed(folder, tmp_path, capsys):
  _cut(folder / 'wide.png')
  out = tmp_path / 'out'
  args = [f'--images_in={folder}', f'--images={out}']
  assert _launch(f'--workdir={_RUN}', *args) == 0
  said = capsys.readouterr().out
  assert 'mean of 1 images (1 unreadable): ' in said
  record = json.loads((out / reconstruction.RECORD).read_text())
  assert list(record['images']) == ['sub/tiny.jpg']
  assert list(record['unreadable']) == ['wide.png']
  assert 'wide.png cannot be read' in record['unreadable']['wide.png']
  assert not (out / 'originals' / 'wide.png').exists()


def test_a_missing_run_leaves_no_folder(folder, tmp_path, capsys):
  args = [f'--images_in={folder}', f'--images={tmp_path}/out']
  config = f'--config={_RUN.parents[2]}/configs/debug.py'
  assert _launch(config, f'--workdir={tmp_path}/none', *args) == 2
  assert 'none is not a folder' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_the_encoder_is_needed(folder, tmp_path, capsys):
  saved = tmp_path / 'saved'
  tokenizers.Tokenizer.from_workdir(_RUN).save_pretrained(
      saved, decoder_only=True
  )
  args = [f'--images_in={folder}', f'--images={tmp_path}/out']
  assert _launch(f'--workdir={saved}', *args) == 2
  assert 'has no encoder' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()
