"""The tokenizers that ship with the package: found by name, and complete."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

from absl.testing import flagsaver
import numpy as np
import pytest

from fsq_jax import configuration
from fsq_jax.analysis import reconstruction
from fsq_jax.configuration import shipped
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.tokenizer import files
from fsq_jax.train import initialization
import launch

_ROOT = pathlib.Path(__file__).parents[2]
_RUN = _ROOT / 'tests' / 'testdata' / 'run'
_MAX_BYTES = 3 * 10**6


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A small tokenizer, saved."""
  folder = tmp_path_factory.mktemp('saved') / 'photos'
  return Tokenizer.from_workdir(_RUN).save_pretrained(folder)


@pytest.fixture
def _ships(saved, tmp_path, monkeypatch):
  """Lets the small tokenizer ship, and the current folder be empty."""
  monkeypatch.setattr(shipped, 'FOLDERS', saved.parent)
  monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures('_ships')
def test_a_name_is_found_from_any_folder(saved, tmp_path):
  assert files.find('photos') == saved
  # Photographs may be in a folder of this name.
  (tmp_path / 'photos').mkdir()
  assert files.find('photos') == saved
  assert initialization.find_source('photos').folder == saved
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.train.init_from = 'photos'
  config.data.data_dir = 'photos'
  resolved = configuration.resolve_paths(config)
  assert resolved.train.init_from == 'photos'
  assert resolved.data.data_dir == str(tmp_path / 'photos')
  with pytest.raises(ValueError, match='that ships with fsq_jax: photos'):
    files.find('photographs')


@pytest.mark.usefixtures('_ships')
def test_a_folder_is_found_by_a_path(saved, tmp_path):
  local = shutil.copytree(saved, tmp_path / 'photos')
  for path in ('./photos', pathlib.Path('photos'), local):
    assert files.find(path) == local
  message = re.escape(
      f"'photos' is ambiguous: it is a tokenizer that ships with fsq_jax, and"
      f' {local} is another one. Give ./photos for the folder, or {saved}'
  )
  for find in (files.find, initialization.find_source):
    with pytest.raises(ValueError, match=message):
      find('photos')


def test_files_that_were_not_installed_are_named(tmp_path, monkeypatch):
  monkeypatch.setattr(shipped, 'FOLDERS', tmp_path)
  with pytest.raises(ValueError, match='without its package data'):
    files.find('photos')


@pytest.mark.usefixtures('_ships')
def test_reconstruct_takes_it_without_a_run(
    saved, tmp_path, monkeypatch, capsys
):
  workdirs = []

  def reconstruct_files(workdir, *args, **kwargs):
    workdirs.append(pathlib.Path(workdir))
    return []

  monkeypatch.setattr(reconstruction, 'reconstruct_files', reconstruct_files)
  for args in (
      [], [f'--workdir={_RUN}'], [f'--config={_ROOT}/configs/debug.py']
  ):
    words = ['launch.py', '--mode=reconstruct', *args]
    with flagsaver.flagsaver():
      assert launch.main(launch.parse_flags(words)) == 0
  assert workdirs == [saved, _RUN, pathlib.Path('runs/debug')]
  out = capsys.readouterr().out
  assert out == 'Tokenizer: photos, which ships with fsq_jax.\n'
  # As a workdir it is a folder.
  monkeypatch.chdir(tmp_path)
  config = f'--config={_ROOT}/configs/debug.py'
  for args in (['--mode=reconstruct'], ['--mode=tokenize', config]):
    words = ['launch.py', '--workdir=photos', *args]
    with flagsaver.flagsaver():
      assert launch.main(launch.parse_flags(words)) == 2
    err = capsys.readouterr().err
    assert f'ships with fsq_jax: give its folder, {saved};' in err
    assert "uses 'photos' if --workdir is left out" in err
  # Other modes need a run.
  with flagsaver.flagsaver():
    assert launch.main(launch.parse_flags(['launch.py', '--mode=eval'])) == 2
  assert '--config is missing' in capsys.readouterr().err


@pytest.mark.parametrize('name', shipped.NAMES)
def test_the_files_are_a_small_tokenizer_of_a_config(name, tmp_path):
  folder = shipped.folder_of(name)
  assert sum(x.stat().st_size for x in folder.iterdir()) <= _MAX_BYTES
  # Reading compares hashes.
  tokenizer = Tokenizer.from_pretrained(folder)
  config = configuration.load_config(_ROOT / 'configs' / f'{name}.py')
  assert configuration.diff_configs(tokenizer.config, config) == []
  assert tokenizer.step == config.train.num_steps
  assert tokenizer.evaluation['step'] == tokenizer.step
  # The card is of these weights.
  assert tokenizer.model_hash in (folder / files.CARD).read_text('utf-8')


@pytest.mark.slow
def test_it_reconstructs_photographs_of_any_size():
  tokenizer = Tokenizer.from_pretrained('photos')
  skimage = pytest.importorskip('skimage.data')
  image = skimage.chelsea()
  restored = tokenizer.reconstruct(image[None], 'pad')[0]
  assert restored.shape == image.shape
  error = np.subtract(restored, image, dtype=np.float64)
  # 2 dB above a tokenizer of 512 codes at half the bits per pixel.
  assert -10 * np.log10(np.mean(error**2) / 255**2) > 29.3 + 2


def test_the_files_are_installed(tmp_path):
  pytest.importorskip('setuptools')
  done = subprocess.run(
      [
          sys.executable, 'setup.py', '--quiet', 'build_py',
          f'--build-lib={tmp_path}',
      ],
      cwd=_ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  for name in shipped.NAMES:
    folder = shipped.folder_of(name)
    installed = tmp_path / folder.relative_to(_ROOT)
    assert json.loads((installed / files.CONFIG).read_text('utf-8'))
    assert {x.name for x in installed.iterdir()} == {
        x.name for x in folder.iterdir()
    }
