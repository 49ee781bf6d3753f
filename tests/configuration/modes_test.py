"""Modes name missing inputs that they use, and need no other inputs.

One tiny run is trained with everything that a config can name: a folder of
images, a pretrained encoder and decoder, statistics of latents, networks of the
losses and of the evaluation.
"""

import pathlib
import shutil

from absl import flags
from absl.testing import flagsaver
import numpy as np
import PIL.Image
import pytest

from fsq_jax import configuration
from fsq_jax.checkpoints import saved_model
from fsq_jax.configuration import loading
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.train import state as train_state
import launch

_ROOT = pathlib.Path(__file__).parents[2]
_TESTDATA = _ROOT / 'tests' / 'testdata'
# The folder {root} holds all that it names.
_CONFIG = """
from configs import debug

def get_config():
  config = debug.get_config()
  config.data.source = 'folder'
  config.data.data_dir = '{root}/images'
  config.data.image_size = (64, 64)
  encoder = config.model.encoder
  encoder.name = 'pretrained'
  encoder.architecture = (
      'siglip(width=48, depth=3, num_heads=4, mlp_dim=160, patch_size=16)'
  )
  encoder.checkpoint = '{root}/siglip'
  config.model.latent_statistics = '{root}/latent_statistics.safetensors'
  decoder = config.model.decoder
  decoder.name = 'mae'
  decoder.patch_size = 16
  decoder.width, decoder.depth = 40, 2
  decoder.num_heads, decoder.mlp_dim = 4, 96
  decoder.mae.input_width = 48
  decoder.mae.checkpoint = '{root}/rae_decoder'
  config.losses.perceptual.checkpoint = '{root}/siglip'
  dino = config.discriminator.dino
  dino.checkpoint = '{root}/dino'
  dino.architecture = (
      'dino(width=12, depth=2, num_heads=3, mlp_dim=20, patch_size=4)'
  )
  dino.image_size, dino.blocks, dino.kernel_size = (12, 12), (0,), 3
  config.eval.networks.fd_encoder = '{root}/siglip'
  config.optim.frozen = ('encoder/.*',)
  config.optim.warmup_steps = 0
  config.train.num_steps = 1
  config.train.eval_every_steps = 0
  return config
"""

# The run was trained without them, which compiles sooner.
_PERCEPTUAL = ['--config.losses.perceptual.name=vit']
_DINO = ['--config.discriminator.name=dino']
# Input: what makes it missing, and words of the message.
_MISSING = {
    'images': (['--config.data.data_dir=/nowhere'], "'/nowhere'; allowed:"),
    'training images': (
        ['--config.data.train_split=none'], "has no folder 'none'"
    ),
    'validation images': (
        ['--config.data.eval_split=none'], "has no folder 'none'"
    ),
    'data set of TFDS': (
        ['--config.data.source=tfds', '--config.data.name=mnist',
         '--config.data.data_dir=/nowhere'],
        "Dataset 'mnist' is not prepared",
    ),
    'encoder': (
        ['--config.model.encoder.checkpoint=/nowhere'],
        'model.encoder.checkpoint: There is no /nowhere',
    ),
    'decoder': (
        ['--config.model.decoder.mae.checkpoint=/nowhere'],
        'model.decoder.mae.checkpoint: /nowhere has no config.json',
    ),
    'latent statistics': (
        ['--config.model.latent_statistics=/nowhere'],
        'model.latent_statistics /nowhere cannot be read',
    ),
    'stage 1': (
        ['--config.train.init_from=/nowhere'],
        'train.init_from: /nowhere is not a folder; give the workdir of a run',
    ),
    'perceptual network': (
        [*_PERCEPTUAL, '--config.losses.perceptual.checkpoint=/nowhere'],
        'losses.perceptual.checkpoint: There is no /nowhere',
    ),
    'no perceptual network': (
        [*_PERCEPTUAL, '--config.losses.perceptual.checkpoint='],
        'set --config.losses.perceptual.checkpoint',
    ),
    'DINO': (
        [*_DINO, '--config.discriminator.dino.checkpoint=/nowhere'],
        'discriminator.dino.checkpoint: There is no /nowhere',
    ),
    'no DINO': (
        [*_DINO, '--config.discriminator.dino.checkpoint='],
        'set --config.discriminator.dino.checkpoint',
    ),
    'network of the evaluation': (
        ['--config.eval.networks.fd_encoder=/nowhere'],
        'eval.networks.fd_encoder: There is no /nowhere',
    ),
}
_OF_SPLIT = ('images', 'validation images', 'data set of TFDS')
# Which of these inputs a mode uses; it does without the others.
_USED = {
    'train': tuple(_MISSING),
    'eval': (*_OF_SPLIT, 'network of the evaluation'),
    'report': _OF_SPLIT,
    'tokenize': _OF_SPLIT,
    'detokenize': (),
    'reconstruct': (),
    'export': (),
    'latent_statistics': (
        'images', 'training images', 'data set of TFDS', 'encoder', 'stage 1'
    ),
}


def _launch(*args):
  """Runs launch.py in this process and returns the exit code."""
  with flagsaver.flagsaver():
    return launch.main(launch.parse_flags(['launch.py', *args]))


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  """Folder of the config and of its images and encoders."""
  root = tmp_path_factory.mktemp('modes')
  rng = np.random.default_rng(0)
  for split in ('train', 'validation'):
    (root / 'images' / split).mkdir(parents=True)
    for i in range(8):
      image = rng.integers(0, 256, (64, 64, 3), np.uint8)
      PIL.Image.fromarray(image).save(root / 'images' / split / f'{i}.png')
  for name in ('encoders/siglip', 'encoders/dino', 'decoders/rae_decoder'):
    shutil.copytree(_TESTDATA / name, root / pathlib.Path(name).name)
  (root / 'config.py').write_text(_CONFIG.format(root=root))
  return root


@pytest.fixture(scope='module')
def root(inputs):
  """The same folder with latent statistics, a run and its tokens."""
  root = inputs
  config = f'--config={root}/config.py'
  assert not _launch(config, '--mode=latent_statistics', f'--workdir={root}')
  assert not _launch(config, f'--workdir={root}/run')
  assert not _launch('--mode=tokenize', f'--workdir={root}/run',
                     f'--tokens={root}/tokens')
  return root


def _args(mode, root, folder):
  """Arguments of a mode that writes to a new folder."""
  if mode in ('train', 'latent_statistics'):
    return [f'--config={root}/config.py', f'--workdir={folder}/run']
  images = f'--images={folder}/images'
  return [f'--workdir={root}/run', *{
      'tokenize': [f'--tokens={folder}/tokens'],
      'detokenize': [f'--tokens={root}/tokens', images],
      'reconstruct': [f'--images_in={root}/images/train', images],
      'export': [f'--export={folder}/export'],
  }.get(mode, [])]


def test_every_mode_is_in_the_table():
  modes = flags.FLAGS['mode'].parser.enum_values
  # 'generate' is for runs of generators alone.
  assert set(modes) - {'generate'} == loading.USES.keys()
  assert loading.USES.keys() == {*_USED, 'prepare'}


@pytest.mark.slow
@pytest.mark.parametrize('mode', [x for x in _USED if x != 'train'])
def test_a_mode_runs_without_what_it_does_not_use(mode, root, tmp_path):
  missing = [
      flag
      for name, (changes, _) in _MISSING.items()
      if name not in _USED[mode]
      for flag in changes
      # It would look at other images.
      if name != 'data set of TFDS' or not _USED[mode]
  ]
  assert missing
  folder = root
  if mode != 'latent_statistics':
    # What the checkpoint's own config names is gone, too.
    folder = root.rename(tmp_path / 'moved')
  args = [
      *_args(mode, folder, tmp_path), f'--config.data.data_dir={folder}/images',
      f'--config.eval.networks.fd_encoder={folder}/siglip', *missing,
  ]
  try:
    assert _launch(f'--mode={mode}', *args) == 0
  finally:
    folder.rename(root)


def _check_messages(modes, root, folder, capsys, monkeypatch, *changes):
  """Runs modes without each of their inputs; lists what they said instead."""

  def work(*args, **kwargs):
    raise AssertionError('It is too late to say so.')

  monkeypatch.setattr(saved_model, 'restore', work)
  monkeypatch.setattr(train_state.StateBuilder, 'create', work)
  wrong = []
  for mode in modes:
    for name in _USED[mode]:
      missing, message = _MISSING[name]
      args = _args(mode, root, folder)
      code = _launch(f'--mode={mode}', *args, *changes, *missing)
      said = capsys.readouterr().err
      if code != 2 or message not in said:
        wrong.append((mode, name, code, said))
  assert not wrong
  # Latent statistics, measured for long, are written to a folder that is known
  # to be writable.
  created = ['run'] if 'latent_statistics' in modes else []
  assert [x.name for x in folder.rglob('*')] == created


@pytest.mark.slow
@pytest.mark.parametrize('mode', _USED)
def test_a_mode_names_what_is_missing(
    mode, root, tmp_path, capsys, monkeypatch
):
  _check_messages([mode], root, tmp_path, capsys, monkeypatch)


def test_modes_without_a_run_name_what_is_missing(
    inputs, tmp_path, capsys, monkeypatch
):
  _check_messages(
      ['train', 'latent_statistics'], inputs, tmp_path, capsys, monkeypatch,
      '--config.model.latent_statistics=',
  )


@pytest.mark.slow
@pytest.mark.parametrize(
    'mode', ['tokenize', 'detokenize', 'reconstruct', 'export']
)
def test_a_saved_tokenizer_needs_images_to_tokenize_alone(
    mode, root, tmp_path, capsys
):
  Tokenizer.from_workdir(root / 'run').save_pretrained(tmp_path / 'saved')
  args = [*_args(mode, root, tmp_path), f'--workdir={tmp_path}/saved']
  # It names the last parts of paths, which are nothing here.
  assert _launch(f'--mode={mode}', *args) == 2 * (mode == 'tokenize')
  if mode == 'tokenize':
    assert 'set --config.data.data_dir' in capsys.readouterr().err
    images = f'--config.data.data_dir={root}/images'
    assert _launch(f'--mode={mode}', *args, images) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    'mode', ['eval', 'tokenize', 'detokenize', 'reconstruct', 'export']
)
def test_a_config_of_another_model_is_rejected(mode, root, tmp_path, capsys):
  args = _args(mode, root, tmp_path)
  for change in ('model.dtype=bfloat16', 'model.quantizer.fsq.levels=(8,8,5)'):
    assert _launch(f'--mode={mode}', *args, f'--config.{change}') == 2
    said = capsys.readouterr().err
    assert 'another model than the checkpoint (saved -> given)' in said
    assert change.partition('=')[0] in said
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['eval', 'report'])
def test_a_saved_tokenizer_is_no_run(mode, root, tmp_path, capsys):
  folder = tmp_path / 'saved'
  Tokenizer.from_workdir(root / 'run').save_pretrained(folder)
  images = f'--config.data.data_dir={root}/images'
  assert _launch(f'--mode={mode}', f'--workdir={folder}', images) == 2
  assert 'A saved tokenizer works with the modes' in capsys.readouterr().err


@pytest.mark.parametrize(
    'config', ['folder_fsq_8555', 'vqrae_fsq_siglip_l', 'vqrae_fsq_dinov2_s']
)
def test_configs_with_placeholders_do_for_modes_that_do_not_use_them(config):
  config = configuration.load_config(_ROOT / 'configs' / f'{config}.py')
  with pytest.raises(ValueError, match='allowed: '):
    configuration.check_config(config)
  configuration.check_config(config, mode='export')
  configuration.check_config(config, mode='prepare')


def test_preparing_needs_tensorflow_alone(capsys):
  """Neither the encoder nor the networks of the losses."""
  args = ['--mode=prepare', '--config.data.data_dir=/nowhere']
  config = f'--config={_ROOT}/configs/vqrae_fsq_siglip_l.py'
  assert _launch(config, *args) == 1
  assert 'needs TensorFlow' in capsys.readouterr().err
