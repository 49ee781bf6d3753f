"""With which changes of its config a run resumes, and a model is the same."""

import pathlib

import pytest

from fsq_jax import configuration
from fsq_jax.configuration import schema

_DEFAULT = configuration.load_config(
    pathlib.Path(__file__).parents[2] / 'configs' / 'default.py'
).copy_and_resolve_references()
_Role = schema.Role


def _changed(fields, config=_DEFAULT):
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(fields)
  return config


def _how(saved, current):
  """How a run resumes: 'always', with 'the flag' or 'never'."""
  messages = []
  for allow in (False, True):
    try:
      configuration.check_resumable(saved, current, allow_config_change=allow)
    except ValueError as error:
      messages.append(str(error))
  if messages and '--allow_config_change' in messages[0]:
    return {1: 'the flag'}[len(messages)]
  assert all('Use another --workdir; a checkpoint' in x for x in messages)
  return {0: 'always', 2: 'never'}[len(messages)]


# Fields by how a run resumes with another value of them.
_CHANGES = {
    'always': {
        'eval.num_grid_images': 7,
        'eval.networks.rfid': 'elsewhere',
        'train.log_every_steps': 7,
        'train.compilation_cache': 'elsewhere',
        'train.trackers': ('wandb',),
        'data.num_threads': 7,
        'data.eval_batch_size': 7,
        'data.allow_upscaling': True,
        'partitioning.mesh.tensor': 2,
        'partitioning.fsdp_min_size': 0,
        'tokenize.views': 7,
        # Read by a new run alone.
        'train.init_from': 'stage1',
        'model.encoder.checkpoint': 'encoder',
        'model.decoder.mae.checkpoint': 'decoder',
        # Compared by content.
        'losses.perceptual.checkpoint': 'elsewhere',
        'discriminator.dino.checkpoint': 'elsewhere',
        # Of alternatives that are not chosen.
        'model.quantizer.vq.codebook_size': 99,
        'model.projector_in.mlp.width': 9,
        'discriminator.patch.channels': 64,
    },
    'the flag': {
        'train.num_steps': 7,
        'data.batch_size': 7,
        'data.data_dir': '/b',
        'data.image_sizes': ((32, 32), (48, 48)),
        'optim.b1': 0.5,
        'seed': 7,
        'model.dtype': 'bfloat16',
        'model.latent_noise': 0.5,
        'model.quantizer.fsq.noise': 0.5,
        'model.quantizer.fsq.commitment_weight': 0.5,
        'discriminator.r1_weight': 1.0,
    },
    'never': {
        'model.encoder.width': 8,
        'model.projector_out.name': 'fourier',
        'model.quantizer.fsq.levels': (5, 5),
        'data.image_size': (16, 16),
        'optim.name': 'muon',
        'optim.frozen': ('encoder/.*',),
        'discriminator.name': 'patch',
        # A teacher, or statistics, where there are none.
        'losses.distillation_weight': 1.0,
        'model.latent_statistics': '/a',
    },
}


def test_how_runs_resume_with_other_values():
  failures = []
  for expected, fields in _CHANGES.items():
    for name, value in fields.items():
      if (how := _how(_DEFAULT, _changed({name: value}))) != expected:
        failures.append((name, value, expected, how))
  assert not failures


def test_the_message_names_field_and_both_values():
  current = _changed({'optim.b1': 0.5, 'train.log_every_steps': 7})
  with pytest.raises(ValueError, match=r'optim.b1: 0.9 -> 0.5') as error:
    configuration.check_resumable(_DEFAULT, current)
  assert 'log_every_steps' not in str(error.value)
  with pytest.raises(ValueError, match=r'encoder.width: 64 -> 8') as error:
    configuration.check_resumable(
        _DEFAULT, _changed({'model.encoder.width': 8, 'optim.b1': 0.5})
    )
  assert 'optim.b1' not in str(error.value)


def test_values_that_only_have_to_be_there_may_change():
  teacher = _changed({'losses.distillation_weight': 1.0})
  weaker = _changed({'losses.distillation_weight': 0.5})
  assert _how(teacher, weaker) == 'the flag'
  assert _how(teacher, _DEFAULT) == 'never'
  # A checkpoint has the statistics.
  statistics = _changed({'model.latent_statistics': '/a'})
  moved = _changed({'model.latent_statistics': '/b'})
  assert _how(statistics, moved) == 'always'
  assert _how(statistics, _DEFAULT) == 'never'


def test_a_run_cannot_go_on_with_another_discriminator():
  saved = _changed({'discriminator.name': 'patch'})
  for field, value in (
      ('discriminator.name', 'none'),
      ('discriminator.name', 'stylegan'),
      ('discriminator.patch.channels', 64),
  ):
    assert _how(saved, _changed({field: value}, saved)) == 'never'
  for field, value in (
      ('discriminator.r1_weight', 1.0), ('discriminator.optim.b1', 0.1)
  ):
    assert _how(saved, _changed({field: value}, saved)) == 'the flag'


def test_models_differ_in_what_decides_variables_and_tokens():
  for fields, expected in (
      ({'model.quantizer.vq.codebook_size': 99}, []),
      ({'model.quantizer.fsq.noise': 0.5}, []),
      ({'model.projector_in.mlp.width': 9}, []),
      ({'model.dtype': 'bfloat16', 'seed': 3, 'optim.name': 'muon'}, []),
      ({'model.quantizer.fsq.levels': (5, 5)}, ['model.quantizer.fsq.levels']),
      ({'model.quantizer.fsq.bound': 'ifsq'}, ['model.quantizer.fsq.bound']),
      (
          {'model.quantizer.name': 'vq', 'model.quantizer.vq.code_dim': 3},
          ['model.quantizer.name', 'model.quantizer.vq.code_dim'],
      ),
      ({'model.latent_statistics': 'x'}, ['model.latent_statistics']),
      ({'data.image_size': (16, 16)}, ['data.image_size']),
  ):
    lines = configuration.diff_models(_DEFAULT, _changed(fields))
    assert [line.partition(':')[0] for line in lines] == expected


def test_one_architecture_in_other_words_is_the_same():
  def model(family):
    fields = 'width=24, depth=2, num_heads=2, mlp_dim=48, patch_size=16'
    return _changed({'model.encoder.architecture': f'{family}({fields})'})

  saved = model('siglip')
  assert configuration.diff_models(saved, model('siglip_big_vision')) == []
  assert _how(saved, model('siglip_big_vision')) == 'the flag'
  assert len(configuration.diff_models(saved, model('dinov2'))) == 1


def test_fields_of_another_version_are_of_the_model_or_of_training():
  saved = _DEFAULT.to_dict()
  saved['train']['extra'] = 1
  assert _how(saved, _DEFAULT) == 'the flag'
  saved = _DEFAULT.to_dict()
  saved['model']['extra'] = 1
  assert _how(saved, _DEFAULT) == 'never'


def test_roles_that_are_easy_to_get_wrong():
  """Sections whose fields have one role, apart from the listed ones."""
  others = {
      name
      for name, field in schema.FIELDS.items()
      if name.startswith(('eval.', 'partitioning.', 'tokenize.'))
      and field.role is not _Role.RUNTIME
  }
  assert not others
  start = {n for n, field in schema.FIELDS.items() if field.role is _Role.START}
  assert start == {
      'model.encoder.checkpoint', 'model.decoder.mae.checkpoint',
      'model.latent_statistics', 'train.init_from',
  }
