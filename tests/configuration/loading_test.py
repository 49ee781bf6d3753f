"""Config files, JSON of configs, paths, and configs of earlier versions."""

import json
import pathlib

import ml_collections
import pytest

from fsq_jax import configuration
from fsq_jax.configuration import loading
from fsq_jax.configuration import schema

_PATH = pathlib.Path(__file__).parents[2] / 'configs' / 'default.py'
_DEFAULT = configuration.load_config(_PATH)


def _changed(fields):
  config = _DEFAULT.copy_and_resolve_references()
  config.update_from_flattened_dict(fields)
  return config


def test_json_round_trip():
  config = _changed({
      'partitioning.rules': (('a', ('fsdp', None)), ('.*', 'replicate')),
      'train.profile_steps': (3, 5),
  })
  text = configuration.config_to_json(config)
  loaded = configuration.config_from_json(text)
  assert loaded.to_dict() == config.to_dict()
  assert loaded.partitioning.rules[0] == ('a', ('fsdp', None))
  assert loaded.model.quantizer.fsq.eps is None
  assert configuration.config_to_json(loaded) == text
  assert configuration.diff_configs(loaded, config) == []
  configuration.check_config(loaded)
  with pytest.raises(AttributeError):
    loaded.data.batchsize = 3


def test_json_resolves_references():
  config = configuration.load_config(_PATH)
  config.model.encoder.width = 96
  loaded = configuration.config_from_json(configuration.config_to_json(config))
  assert loaded.model.decoder.width == 96


@pytest.mark.parametrize('text', ['', '{"seed": ', '[1, 2]', 'null'])
def test_other_json_is_refused(text):
  with pytest.raises(ValueError, match='The saved config is'):
    configuration.config_from_json(text)


def test_json_that_is_no_config_is_refused_by_its_check():
  for text in ('{}', '{"data": 3}', '{"model": {"encoder": 3}}'):
    config = configuration.config_from_json(text)
    with pytest.raises(ValueError, match='seed is missing'):
      configuration.check_config(config)


def test_runs_from_before_a_field_go_on_with_what_they_had():
  saved = _DEFAULT.to_dict()
  names = [name for name, field in schema.FIELDS.items() if field.added]
  assert len(names) > 8
  for name in names:
    *sections, key = name.split('.')
    section = saved
    for part in sections:
      section = section[part]
    del section[key]
  del saved['tokenize']
  loaded = configuration.config_from_json(json.dumps(saved))
  assert configuration.diff_configs(loaded, _DEFAULT) == []
  configuration.check_config(loaded)
  configuration.check_resumable(loaded, _DEFAULT)


def test_a_quantizer_added_since_does_not_matter_to_saved_runs():
  values = _DEFAULT.to_dict()
  del values['model']['quantizer']['lfq']
  saved = configuration.config_from_json(json.dumps(values))
  configuration.check_config(saved, mode='eval')
  configuration.check_resumable(saved, _DEFAULT)
  with pytest.raises(ValueError, match=r'lfq.num_bits is missing'):
    configuration.check_config(saved)
  del values['model']['quantizer']['fsq']
  saved = configuration.config_from_json(json.dumps(values))
  with pytest.raises(ValueError, match=r'fsq.levels is missing'):
    configuration.check_config(saved, mode='eval')


def test_runs_that_scaled_images_up_before_a_field_allowed_it_can_be_used():
  sizes = {'data.resize_shorter': 16, 'data.image_size': (32, 16)}
  saved = _changed(sizes).to_dict()
  del saved['data']['allow_upscaling'], saved['data']['label_names']
  loaded = configuration.config_from_json(json.dumps(saved))
  assert loaded.data.allow_upscaling is True
  assert loaded.data.label_names == ()
  configuration.check_config(loaded)
  given = {'data.allow_upscaling': True, 'data.label_names': ('cat',)}
  configuration.check_resumable(loaded, _changed({**sizes, **given}))


@pytest.mark.parametrize(('old', 'new'), [(False, 'none'), (True, 'blocks')])
@pytest.mark.parametrize('name', ['default', 'default_generator'])
def test_remat_of_earlier_versions_was_a_bool(old, new, name, tmp_path):
  current = configuration.load_config(_PATH.with_name(f'{name}.py'))
  fields = ['model.remat']
  if name == 'default':
    fields.append('discriminator.dino.remat')
  saved = current.copy_and_resolve_references().unlock()
  with saved.ignore_type():
    saved.update_from_flattened_dict(dict.fromkeys(fields, old))
  loaded = configuration.config_from_json(configuration.config_to_json(saved))
  file = tmp_path / 'configs' / 'old.py'
  file.parent.mkdir()
  # A user's file, which changes the defaults of this version.
  file.write_text(
      f'import runpy\n\ndef get_config():\n  config = runpy.run_path('
      f'{str(_PATH.with_name(f"{name}.py"))!r})["get_config"]()\n'
      + ''.join(f'  config.{field} = {old}\n' for field in fields)
      + '  return config\n'
  )
  from_file = configuration.load_config(file)
  current.update_from_flattened_dict(dict.fromkeys(fields, new))
  for config in (loaded, from_file):
    assert configuration.diff_configs(config, current) == []
  configuration.check_resumable(loaded, current)


def test_diff_names_field_and_both_values():
  current = _changed({'data.batch_size': 32, 'seed': 1}).to_dict()
  current['train']['extra'] = 3
  saved = _DEFAULT.to_dict()
  saved['model']['quantizer']['fsq']['levels'] = [8, 8, 8]
  del saved['data']['flip']
  assert configuration.diff_configs(saved, current) == [
      'data.batch_size: 64 -> 32',
      'data.flip: absent -> True',
      'seed: 0 -> 1',
      'train.extra: absent -> 3',
  ]


@pytest.mark.parametrize(
    ('text', 'problem'),
    [
        ('def get_config(:', 'SyntaxError'),
        ('config = 3', r'has no function get_config\(\); define one'),
        ('get_config = 3', r'has no function get_config\(\); define one'),
        ('def get_config(name): return name', 'TypeError'),
        # Of a tuple no number can be made, nor the other way round.
        (
            'from configs import default\n'
            'def get_config():\n'
            '  config = default.get_config()\n'
            '  config.model.quantizer.fsq.levels = 512\n'
            '  return config',
            "TypeError: .*'levels'",
        ),
        ('def get_config(): return {}', 'returns dict'),
        ('def get_config(): return 1 / 0', 'ZeroDivisionError'),
    ],
)
def test_config_file_that_fails_is_named(tmp_path, text, problem):
  path = tmp_path / 'broken.py'
  path.write_text(text)
  with pytest.raises(ValueError, match=f'broken.py .*{problem}'):
    configuration.load_config(path)


def test_the_config_of_a_run_is_no_config_file(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text(configuration.config_to_json(_DEFAULT))
  with pytest.raises(ValueError, match='is JSON; a config file is Python'):
    configuration.load_config(path)


def test_missing_config_file_is_named(tmp_path):
  with pytest.raises(ValueError, match=r'no config file .*none\.py'):
    configuration.load_config(tmp_path / 'none.py')


def test_paths_are_resolved(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', '/home/somebody')
  for value, resolved in (
      ('a/../b', f'{tmp_path}/b'),
      ('~/b', '/home/somebody/b'),
      ('/b', '/b'),
      ('', ''),
  ):
    given = _changed(dict.fromkeys(configuration.PATHS, value))
    config = configuration.resolve_paths(given)
    fields = dict(loading.flatten(config))
    assert {fields[name] for name in configuration.PATHS} == {resolved}
    # A copy: the given config stays.
    assert given.model.encoder.checkpoint == value
    assert configuration.diff_configs(given, config) == []
    configuration.check_resumable(given, config)
    configuration.check_resumable(config, given)


def test_every_field_that_is_a_path_is_resolved():
  ends = ('.checkpoint', '_dir', '.init_from', '.latent_statistics')
  assert set(configuration.PATHS) == {
      name
      for name in schema.FIELDS
      if name.endswith(ends) or name.startswith('eval.networks.')
  }


def test_placeholders_stay_as_they_are():
  given = ml_collections.ConfigDict(_DEFAULT.to_dict())
  given.model.encoder.checkpoint = None
  assert configuration.resolve_paths(given).model.encoder.checkpoint is None
