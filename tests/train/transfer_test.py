"""Tests of variables that another model initializes."""

import json
import pathlib
import shutil
import sys
import types

import jax
import numpy as np
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import saved_model
from fsq_jax.configuration import rules
from fsq_jax.models import resampling
from fsq_jax.models import variables as variables_lib
from fsq_jax.report import report
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.train import initialization
from fsq_jax.train import transfer

_ROOT = pathlib.Path(__file__).parents[2]
# Of configs/debug.py: a ViT with learned positions, 4 x 4 tokens of 512 codes.
_RUN = _ROOT / 'tests' / 'testdata' / 'run'


def _load_config(fields, source=_RUN):
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.train.init_from = str(source)
  config.update_from_flattened_dict(fields)
  return configuration.resolve(config)


def _build(fields, source=_RUN):
  """(transfer, shapes of the model's variables, mesh)."""
  config = _load_config(fields, source)
  source = initialization.find_source(config.train.init_from)
  model = models.build_autoencoder(
      config.model, config.data.image_size, config.data.channels
  )
  mesh = partitioning.create_mesh({'data': -1, 'fsdp': 1}, jax.devices()[:1])
  shapes = partitioning.place_abstract(
      variables_lib.abstract_variables(model, config.data.image_size),
      mesh,
      config.partitioning.rules,
      config.partitioning.fsdp_min_size,
  )
  return transfer.Transfer(source, config, model), shapes, mesh


def _leaves(tree):
  """Path to array."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): x
      for path, x in flat
  }


def _assert_same(tree, expected):
  """Bit for bit."""
  assert tree.keys() == expected.keys()
  for path, x in expected.items():
    assert np.asarray(tree[path]).tobytes() == np.asarray(x).tobytes(), path


@pytest.fixture(scope='module')
def saved():
  """Path to variable of the run."""
  mesh = partitioning.create_mesh({'data': -1, 'fsdp': 1}, jax.devices()[:1])
  return _leaves(saved_model.restore(saved_model.find_run(_RUN), mesh)[1])


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer.from_workdir(_RUN)


def test_another_image_size_resamples_learned_positions(saved):
  taken, shapes, mesh = _build({'data.image_size': (32, 16)})
  arrays = taken.load(shapes, mesh)
  assert arrays.keys() == _leaves(shapes).keys()
  expected = dict(saved)
  for part in ('encoder', 'decoder'):
    path = f'params/{part}/positions/embedding'
    positions = arrays.pop(path)
    assert positions.shape == (8, 4, 16)
    np.testing.assert_allclose(
        positions,
        resampling.resize_grid(
            np.asarray(expected.pop(path)), (8, 4), 'bicubic_antialias'
        ),
        atol=1e-6,
    )
    assert f'  {path} resampled from 4 x 4 to 8 x 4' in taken.lines()
  _assert_same(arrays, expected)
  assert taken.lines()[:2] == [
      'The model differs (saved -> current):',
      '  data.image_size: (16, 16) -> (32, 16)',
  ]
  assert taken.lines()[-1] == 'Arrays not taken: none'


@pytest.mark.fast_variants('model.quantizer.name-')
@pytest.mark.parametrize(
    ('fields', 'fresh'),
    [
        # FSQ has no variables; the projectors have the same three channels. The
        # shapes of attention are the same, but it is another function.
        (
            {
                'model.quantizer.fsq.levels': (8, 6, 5),
                'model.decoder.num_heads': 1,
            },
            'decoder (all 15)',
        ),
        (
            {'model.quantizer.name': 'vq'},
            'projector_in (all 4), quantizer (all 5), projector_out (all 2)',
        ),
        (
            {'model.encoder.depth': 2, 'model.projector_out.name': 'mlp'},
            'encoder (all 15), projector_out (all 6)',
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_parts_that_differ_start_anew(fields, fresh):
  taken, _, _ = _build(fields)
  assert taken.lines()[-1] == f'Arrays not taken: {fresh}'
  assert not taken.resampled


def test_other_channels_leave_all_but_the_layers_of_pixels():
  taken, _, _ = _build({'data.channels': 1})
  assert taken.fresh == {
      'params/encoder/patches/kernel',
      'params/decoder/pixels/kernel', 'params/decoder/pixels/bias',
  }


def test_a_code_of_another_dimension_leaves_most_of_a_conv_model():
  configs = [
      _load_config({
          **{
              f'model.{part}.{name}': value
              for part in ('encoder', 'decoder')
              for name, value in (
                  ('name', 'conv'), ('conv.filters', 32),
                  ('conv.channel_multipliers', (1,)),
                  ('conv.num_res_blocks', 1), ('conv.latent_width', 0),
              )
          },
          'model.projector_in.name': 'none',
          'model.projector_out.name': 'none',
          'model.quantizer.fsq.levels': levels,
      })
      for levels in ((8, 8, 8), (8, 5, 5, 5))
  ]
  taken = transfer.Transfer(
      transfer.Source(_RUN, None, configs[0], False, dict),
      configs[1],
      models.build_autoencoder(configs[1].model, (16, 16)),
  )
  assert taken.fresh == {
      'params/encoder/latents/kernel', 'params/encoder/latents/bias',
      'params/decoder/input/kernel',
  }
  assert taken.takes('encoder')
  assert not taken.has_same_encoder


@pytest.mark.parametrize(
    ('field', 'value', 'taken'),
    [
        ('model.quantizer.fsq.levels', (8, 6, 5), True),
        # All arrays are taken, but the latents are others.
        ('model.encoder.position', 'sincos', False),
    ],
)
def test_statistics_are_taken_with_the_same_encoder(field, value, taken):
  fields = {'model.latent_statistics': '/file'}
  source = transfer.Source(_RUN, None, _load_config(fields), False, dict)
  config = _load_config({**fields, field: value})
  model = models.build_autoencoder(config.model, config.data.image_size)
  transferred = transfer.Transfer(source, config, model)
  assert transferred.takes('encoder')
  assert transferred.has_same_encoder == taken
  assert transferred.takes('statistics') == taken


def test_a_model_with_nothing_in_common_is_refused():
  fields = {'model.encoder.depth': 2, 'model.decoder.depth': 3}
  with pytest.raises(ValueError, match='neither encoder nor deco') as error:
    _build({**fields, 'data.image_size': (32, 32)})
  assert [x.strip() for x in str(error.value).splitlines()[1:-1]] == [
      'data.image_size: (16, 16) -> (32, 32)',
      'model.decoder.depth: 1 -> 3',
      'model.encoder.depth: 1 -> 2',
  ]


def test_a_fresh_encoder_is_no_teacher_and_has_no_statistics():
  config = _load_config(
      {'model.encoder.depth': 2, 'losses.distillation_weight': 1.0}
  )
  model = models.build_autoencoder(config.model, config.data.image_size)
  with pytest.raises(ValueError, match='distillation_weight needs a trained'):
    initialization.Initializer(config, model)
  # The source has no statistics either, so that they come from their file.
  config = _load_config({'model.latent_statistics': '/nowhere'})
  model = models.build_autoencoder(config.model, config.data.image_size)
  with pytest.raises(ValueError, match=r'latent_statistics /nowhere cannot'):
    initialization.Initializer(config, model)


def test_frozen_parameters_do_not_stay_random():
  config = _load_config({'data.channels': 1, 'optim.frozen': ('encoder/.*',)})
  model = models.build_autoencoder(config.model, config.data.image_size, 1)
  with pytest.raises(ValueError, match='freezes encoder/patches/kernel, which'):
    initialization.Initializer(config, model)


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        ('me/a-tokenizer_1.0', True), ('./me', False), ('../me', False),
        ('~/me', False), ('me/', False), ('/me/you', False), ('me', False),
        ('me/you/them', False), ('gs://me', False), ('C:/me', False),
    ],
)
def test_a_repository_has_an_owner_and_a_name(value, expected):
  assert rules.is_hub_id(value) == expected


def test_a_saved_tokenizer_is_taken_from_a_folder_and_the_hub(
    tokenizer, saved, tmp_path, monkeypatch
):
  folder = tokenizer.save_pretrained(tmp_path / 'me' / 'mine')
  taken, shapes, mesh = _build({}, folder)
  assert taken.is_whole
  assert taken.source.step == 8
  _assert_same(taken.load(shapes, mesh), saved)

  hub = types.SimpleNamespace(snapshot_download=lambda name, **_: folder)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  assert _load_config({}, 'me/mine').train.init_from == 'me/mine'
  assert initialization.find_source('me/mine').folder == folder
  # A folder of that name has priority.
  monkeypatch.chdir(tmp_path)
  assert _load_config({}, 'me/mine').train.init_from == str(folder)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(
      ValueError, match=r'^me/other is no local folder.*pip install huggingface'
  ):
    initialization.find_source('me/other')


def test_a_tokenizer_that_only_decodes_has_no_encoder(
    tokenizer, saved, tmp_path
):
  folder = tokenizer.save_pretrained(tmp_path / 'saved', decoder_only=True)
  taken, shapes, mesh = _build({}, folder)
  assert taken.lines() == [
      'Arrays taken: projector_out (all 2), decoder (all 15)',
      'Arrays not taken: encoder (all 15), projector_in (all 4)',
  ]
  _assert_same(
      taken.load(shapes, mesh),
      {
          path: x
          for path, x in saved.items()
          if path.split('/')[1] in ('projector_out', 'decoder')
      },
  )


@pytest.mark.slow
def test_a_run_of_another_size_resumes_without_its_source(
    tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(report, 'write_report', lambda *_: None)
  source = shutil.copytree(_RUN, tmp_path / 'source')
  config = _load_config(
      {
          'data.image_size': (32, 16),
          'model.quantizer.name': 'vq',
          'train.num_steps': 4,
          'train.checkpoint_every_steps': 2,
          'train.eval_every_steps': 0,
      },
      source,
  )
  expected = jax.device_get(train.train_and_evaluate(config, tmp_path / 'run'))
  assert 'resampled from 4 x 4 to 8 x 4' in capsys.readouterr().err
  started_from = json.loads((tmp_path / 'run' / workdirs.RUN).read_text())[
      'started_from'
  ]
  assert started_from['differences'][1] == (
      '  data.image_size: (16, 16) -> (32, 16)'
  )
  shutil.rmtree(source)
  shutil.rmtree(tmp_path / 'run' / workdirs.CHECKPOINTS / '4')
  state = train.train_and_evaluate(config, tmp_path / 'run')
  _assert_same(_leaves(state), _leaves(expected))
  run = json.loads((tmp_path / 'run' / workdirs.RUN).read_text())
  assert run['first_step'] == 2
  assert run['started_from'] == started_from
