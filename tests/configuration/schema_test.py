"""Tests of configuration: what is refused, and what the messages say."""

import ast
import copy
import dataclasses
import json
import math
import pathlib

import ml_collections
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import quantizers
from fsq_jax.configuration import compatibility
from fsq_jax.configuration import loading
from fsq_jax.configuration import schema
from fsq_jax.train import losses
from fsq_jax.train import optim

_DEFAULT = configuration.load_config(
    pathlib.Path(__file__).parents[2] / 'configs' / 'default.py'
)


def _changed(**fields):
  """The default config as a dict, with dotted fields (a__b) replaced."""
  config = copy.deepcopy(_DEFAULT.to_dict())
  for name, value in fields.items():
    _set(config, name.replace('__', '.'), value)
  return config


def _get(config, name):
  for key in name.split('.'):
    config = config[key]
  return config


def _set(config, name, value):
  *sections, key = name.split('.')
  for section in sections:
    config = config[section]
  config[key] = value


def _problems(config, num_devices=None):
  with pytest.raises(ValueError, match='cannot be used') as error:
    configuration.check_config(config, num_devices)
  return str(error.value).splitlines()[1:]


def _fields(config, prefix=''):
  for key, value in config.items():
    if isinstance(value, dict):
      yield from _fields(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}'


def _typos(name):
  """Misspelt names: a letter doubled, one missing, two swapped."""
  section, dot, key = name.rpartition('.')
  section += dot
  middle = len(key) // 2
  head, tail = key[:middle], key[middle:]
  yield section + head + tail[0] + tail
  if len(key) > 2:  # 'b' could be 'b1' or 'b2'.
    yield section + head + tail[1:]
    if head[-1] != tail[0]:
      yield section + head[:-1] + tail[0] + head[-1] + tail[1:]


def _wrong_values(name, value):
  """Values of a wrong type or out of range for a field that holds `value`."""
  if isinstance(value, bool):
    return [1, 'yes', None]
  if isinstance(value, int):
    return [-7, 1.5, math.nan, True, '3', None, 2**40, (1,)]
  if isinstance(value, float):
    return [math.nan, math.inf, -0.5, True, '0.1', None, 1e300]
  if isinstance(value, tuple):
    return [3, 'abc', (math.nan, 1), (-1, -1, -1), (None,), None]
  if isinstance(value, str):
    texts = {
        'data.name', 'data.data_dir', 'train.compilation_cache',
        'train.init_from', 'model.encoder.checkpoint',
        'model.decoder.mae.checkpoint', 'model.latent_statistics',
        'losses.perceptual.checkpoint', 'discriminator.dino.checkpoint',
        'eval.networks.lpips_alexnet', 'eval.networks.lpips_vgg16',
        'eval.networks.rfid', 'eval.networks.rfid_tf1',
        'eval.networks.fd_vgg16',
        'eval.networks.fd_encoder',
    }  # fmt: skip
    return [3, None, ('a',), 'a\0b'] + ([] if name in texts else [''])
  return [math.nan, math.inf, True, '0.1', (0.1,)]  # Optional floats.


_TYPOS = [(typo, name) for name in schema.FIELDS for typo in _typos(name)]
_VALUES = [
    (name, value)
    for name in schema.FIELDS
    for value in _wrong_values(name, _get(_DEFAULT.to_dict(), name))
]


def test_rules_name_the_fields_of_default():
  assert set(schema.FIELDS) == set(_fields(_DEFAULT.to_dict()))


def test_default_passes_with_any_kind_of_container():
  configuration.check_config(_DEFAULT)
  configuration.check_config(_DEFAULT, num_devices=8)
  listed = _changed(
      data__image_size=[32, 64],
      model__quantizer__fsq__levels=[8, 6, 5],
      partitioning__rules=[['.*kernel', [None, 'fsdp']], ['.*', 'replicate']],
      losses__reconstruction_weight=1,
  )
  configuration.check_config(listed)


def test_there_are_two_hundred_mutations():
  assert len(_TYPOS) >= 100
  assert len(_VALUES) >= 200


@pytest.mark.parametrize(('typo', 'name'), _TYPOS)
def test_typo_is_refused_with_the_nearest_field(typo, name):
  config = _changed()
  *sections, key = name.split('.')
  section = _get(config, '.'.join(sections)) if sections else config
  value = section.pop(key)
  section[typo.rpartition('.')[2]] = value
  unknown, missing = _problems(config)
  assert unknown.strip().startswith(
      f'{typo} is not a field of a config; nearest: {name}'
  )
  assert missing.strip().startswith(f'{name} is missing; allowed: ')


@pytest.mark.parametrize(('name', 'value'), _VALUES)
def test_wrong_value_is_refused_by_name(name, value):
  config = _changed()
  _set(config, name, value)
  given = f'{name} is {value!r}'
  assert any(given in problem for problem in _problems(config))


@pytest.mark.parametrize(
    ('fields', 'problem'),
    [
        ({'data__image_size': (30, 32)}, 'divides both sides'),
        ({'data__image_size': (32, 8)}, 'window of SSIM'),
        ({'model__encoder__num_heads': 3}, 'multiple of num_heads'),
        ({'model__decoder__num_heads': 3}, 'multiple of num_heads'),
        (
            {
                'model__decoder__width': 66,
                'model__decoder__position': 'sincos',
            },
            "multiple of 4 with position 'sincos'",
        ),
        ({'model__decoder__patch_size': 8}, "'vit' takes (4, 4)"),
        (
            {'losses__distillation_weight': 1.0},
            'for distillation something to stay close to',
        ),
        (
            {
                'losses__distillation_weight': 1.0,
                'model__encoder__checkpoint': 'of no vit',
            },
            'for distillation something to stay close to',
        ),
        (
            {'optim__learning_rate_factors': (('encoder/.*', 0.0),)},
            'finite number > 0',
        ),
        (
            {
                'model__encoder__name': 'pretrained',
                'model__encoder__architecture': 'siglip_H/16',
            },
            "model.encoder: The architecture 'siglip_H/16' is invalid",
        ),
        (
            {
                'model__encoder__name': 'pretrained',
                'model__encoder__architecture': 'checkpoint',
            },
            'without a model.encoder.checkpoint',
        ),
        (
            {
                'model__encoder__name': 'pretrained',
                'model__encoder__image_size': (8, 8),
            },
            'less than one patch, which has 16 pixels',
        ),
        (
            {
                'model__encoder__name': 'pretrained',
                'model__decoder__patch_size': 16,
                'model__latent_statistics': 'x',
            },
            'of 768 channels',
        ),
        ({'model__quantizer__fsq__levels': ()}, 'fsq: levels is ()'),
        ({'model__quantizer__fsq__levels': (2**16,) * 2}, 'quantizer.fsq: lev'),
        (
            {
                'model__quantizer__fsq__convention': 'paper',
                'model__quantizer__fsq__bound': 'clip',
            },
            'model.quantizer.fsq: bound',
        ),
        (
            {
                'model__projector_in__name': 'attention',
                'model__projector_in__attention__num_heads': 7,
            },
            'a width that is a multiple of num_heads',
        ),
        (
            {
                'model__projector_out__name': 'levels',
                'model__quantizer__name': 'simvq',
            },
            "'levels', model.quantizer.name is 'simvq'; allowed: with 'levels'",
        ),
        (
            {
                'model__projector_out__name': 'levels',
                'model__quantizer__name': 'none',
            },
            "'levels', model.quantizer.name is 'none'; allowed: with 'levels'",
        ),
        (
            {'model__quantizer__none__code_dim': 0},
            'model.quantizer.none.code_dim is 0; allowed: ',
        ),
        (
            {'model__projector_in__name': 'none'},
            "projector_in.name is 'none' with 64 channels of the encoder",
        ),
        (
            {'model__projector_out__name': 'none'},
            "projector_out.name is 'none' with 3 channels of a code",
        ),
        ({'data__source': 'tfds'}, "with 'tfds' a name"),
        ({'data__source': 'folder'}, '--config.data.data_dir'),
        ({'data__source': 'folder', 'data__data_dir': '/none'}, "'/none'"),
        ({'eval__native_size': True}, "with native_size 'folder' or 'tfds'"),
        ({'data__crop_scale': (2.0, 1.0)}, 'lowest <= highest'),
        ({'data__batch_size': 64, 'optim__accumulation_steps': 3},
         'multiple of accumulation_steps'),
        ({'optim__warmup_steps': 1000}, 'warmup_steps < num_steps'),
        ({'optim__end_learning_rate': 1.0}, 'end_learning_rate <='),
        ({'optim__frozen': ('(',)}, 'regular expressions'),
        ({'partitioning__rules': ()}, 'at least one'),
        ({'partitioning__rules': (('.*', 'split'),)}, "'replicate'"),
        ({'partitioning__rules': (('(', 'fsdp'),)}, "'replicate'"),
        ({'partitioning__rules': (('.*', ('model',)),)}, "'replicate'"),
        ({'partitioning__mesh__fsdp': -1}, 'at most one -1'),
        ({'partitioning__mesh__data': 0}, '-1 for all devices'),
        ({'train__profile_steps': (5, 2)}, 'first <= last'),
        ({'train__profile_steps': (5, 2000)}, 'last <= num_steps'),
        ({'train__profile_steps': (5,)}, '(first, last)'),
        ({'eval': {}}, 'eval.num_grid_images is missing'),
        ({'model__encoder': 3}, 'model.encoder is not a field'),
    ],
)
def test_problem_is_named(fields, problem):
  assert any(problem in line for line in _problems(_changed(**fields)))


@pytest.mark.parametrize(
    ('fields', 'problem'),
    [
        ({'data__batch_size': 12}, '8 devices times accumulation_steps'),
        ({'data__batch_size': 16, 'optim__accumulation_steps': 4},
         '8 devices times accumulation_steps'),
        ({'data__eval_batch_size': 4}, 'a multiple of 8 devices'),
        ({'partitioning__mesh__data': 4}, 'multiply to 8 devices'),
        ({'partitioning__mesh__fsdp': 3}, 'multiply to 8 devices'),
    ],
)
def test_devices_count_only_where_they_are_known(fields, problem):
  config = _changed(**fields)
  configuration.check_config(config)
  assert len(_problems(config, num_devices=8)) == 1
  assert problem in _problems(config, num_devices=8)[0]


def test_mesh_that_fills_the_devices_passes():
  for sizes in [(8, 1), (2, 4), (-1, 4), (4, -1)]:
    data, fsdp = sizes
    config = _changed(
        partitioning__mesh__data=data, partitioning__mesh__fsdp=fsdp
    )
    configuration.check_config(config, num_devices=8)


def test_all_problems_are_listed_at_once():
  config = _changed(
      seed=-1,
      data__batch_sise=3,
      data__image_size=(30, 32),
      model__quantizer__fsq__levels=(2**16, 2**16),
      optim__learning_rate=math.nan,
  )
  del config['train']['num_steps']
  names = [line.split()[0] for line in _problems(config)]
  assert names == [
      'data.batch_sise',
      'seed',
      'optim.learning_rate',
      'train.num_steps',
      'data.image_size',
      'data.image_size',
      'model.quantizer.fsq:',
  ]


def test_folder_that_exists_passes(tmp_path):
  config = _changed(data__source='folder', data__data_dir=str(tmp_path))
  configuration.check_config(config)


def _allowed_names(field):
  """The names of a rule of names, out of its words."""
  allowed = schema.FIELDS[field].allowed
  return ast.literal_eval(allowed.removeprefix('one of '))


@pytest.mark.parametrize(
    'field',
    [
        field
        for field, rule in schema.FIELDS.items()
        if rule.allowed.startswith('one of ')
    ],
)
def test_every_allowed_name_is_known_to_its_builder(field):
  for name in _allowed_names(field):
    config = ml_collections.ConfigDict(_changed(**{field: name}))
    if 'projector' in field and name == 'none':
      # Codes as wide as encoder and decoder; projectors have no say in it.
      config.model.quantizer.name = 'vq'
      config.model.quantizer.vq.code_dim = config.model.encoder.width
    if field in ('model.encoder.name', 'model.decoder.name'):
      # The patches of the pretrained encoder that default.py names, and the
      # stride of its conv parts.
      config.model.encoder.patch_size = config.model.decoder.patch_size = 16
    if field.startswith('model.'):
      models.build_autoencoder(config.model, config.data.image_size)
    elif field.startswith('losses.'):
      losses.build_reconstruction_loss(config.losses.reconstruction)
    elif field.startswith('optim.'):
      optim.build_optimizer(config.optim, num_steps=1000)


@pytest.mark.parametrize(
    'name', _allowed_names('model.quantizer.name')
)
def test_the_section_of_a_quantizer_has_every_field_and_its_default(name):
  section = _DEFAULT.model.quantizer[name].to_dict()
  quantizer = quantizers.build_quantizer({'name': name, **section})
  fields = {
      field.name: field.default for field in dataclasses.fields(quantizer)
  }
  # `parent` and `name` are linen's; configs keep channels last, and train on
  # global arrays, which need no axis_name.
  assert section.keys() == fields.keys() - {
      'axis_name', 'channel_axis', 'name', 'parent'
  }
  # Sizes have no default: dataclasses.MISSING, or None where a base needs one.
  sizes = {'levels', 'num_groups', 'num_stages', 'num_bits', 'codebook_size',
           'code_dim'}
  for field in section.keys() - sizes:
    assert section[field] == fields[field], field


@pytest.mark.parametrize('name', schema.FIELDS)
def test_no_field_hides_behind_a_method_of_the_config(name):
  # config.update would be the method, and --config.update fail.
  assert not set(name.split('.')) & set(dir(ml_collections.ConfigDict()))


def test_json_round_trip():
  config = ml_collections.ConfigDict(
      _changed(
          partitioning__rules=(('a', ('fsdp', None)), ('.*', 'replicate')),
          train__profile_steps=(3, 5),
      )
  )
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


def test_runs_from_before_a_field_go_on_with_what_they_had():
  current = ml_collections.ConfigDict(_changed())
  saved = current.to_dict()
  # Sections come before the fields that were added to them later.
  for name, value in reversed(loading._ADDED.items()):
    *sections, field = name.split('.')
    section = saved
    for part in sections:
      section = section[part]
    given = section.pop(field)
    section = ml_collections.ConfigDict(section)
    assert given == (value(section) if callable(value) else value)
  loaded = configuration.config_from_json(json.dumps(saved))
  assert configuration.diff_configs(loaded, current) == []
  configuration.check_config(loaded)
  configuration.check_resumable(loaded, current)


def test_runs_that_scaled_images_up_before_a_field_allowed_it_can_be_used():
  saved = _changed(data__resize_shorter=16, data__image_size=(32, 16))
  del saved['data']['allow_upscaling'], saved['data']['label_names']
  loaded = configuration.config_from_json(json.dumps(saved))
  assert loaded.data.allow_upscaling is True
  assert loaded.data.label_names == ()
  configuration.check_config(loaded)
  current = _changed(
      data__resize_shorter=16,
      data__image_size=(32, 16),
      data__allow_upscaling=True,
      data__label_names=('cat',),
  )
  configuration.check_resumable(loaded, current)


@pytest.mark.parametrize(
    ('length', 'size', 'allowed', 'fits'),
    [
        (0, (32, 64), False, True),
        (64, (32, 64), False, True),
        (64, (64, 32), False, True),
        (63, (32, 64), False, False),
        (31, (32, 32), False, False),
        (31, (32, 32), True, True),
    ],
)
def test_resizing_below_the_crop_needs_leave(length, size, allowed, fits):
  config = _changed(
      data__resize_shorter=length,
      data__image_size=size,
      data__allow_upscaling=allowed,
  )
  if fits:
    configuration.check_config(config)
  else:
    (problem,) = _problems(config)
    assert f'data.resize_shorter is {length}' in problem
    assert '--config.data.allow_upscaling' in problem


def test_class_names_differ_from_each_other():
  configuration.check_config(_changed(data__label_names=('cat', 'dog')))
  for names in (('cat', 'cat'), ('cat', ''), ('cat', 3)):
    (problem,) = _problems(_changed(data__label_names=names))
    assert 'data.label_names is' in problem


def test_a_run_may_go_on_with_another_partitioning():
  current = _changed(
      partitioning__mesh__tensor=2, partitioning__fsdp_min_size=0
  )
  configuration.check_resumable(_changed(), current)


def test_json_resolves_references():
  config = configuration.load_config(
      pathlib.Path(__file__).parents[2] / 'configs' / 'default.py'
  )
  config.model.encoder.width = 96
  loaded = configuration.config_from_json(configuration.config_to_json(config))
  assert loaded.model.decoder.width == 96


@pytest.mark.parametrize('text', ['', '{"seed": ', '[1, 2]', 'null'])
def test_other_json_is_refused(text):
  with pytest.raises(ValueError, match='The saved config is'):
    configuration.config_from_json(text)


def test_diff_names_field_and_both_values():
  current = _changed(data__batch_size=32, seed=1, train__extra=3)
  saved = _changed(model__quantizer__fsq__levels=[8, 8, 8])
  del saved['data']['flip']
  assert configuration.diff_configs(saved, current) == [
      'data.batch_size: 64 -> 32',
      'data.flip: absent -> True',
      'seed: 0 -> 1',
      'train.extra: absent -> 3',
  ]


@pytest.mark.parametrize(
    'name',
    ['eval.num_grid_images', 'train.log_every_steps', 'data.num_threads'],
)
def test_run_continues_with_other_logging(name):
  current = _changed()
  _set(current, name, 7)
  configuration.check_resumable(_DEFAULT, current)


@pytest.mark.parametrize(
    'name', ['train.num_steps', 'data.batch_size', 'optim.b1', 'seed']
)
def test_run_that_would_change_needs_the_flag(name):
  current = _changed(train__log_every_steps=7)
  _set(current, name, 0.5)
  with pytest.raises(ValueError, match='--allow_config_change') as error:
    configuration.check_resumable(_DEFAULT, current)
  old = _get(_DEFAULT.to_dict(), name)
  assert f'{name}: {old!r} -> 0.5' in str(error.value)
  assert 'log_every_steps' not in str(error.value)
  configuration.check_resumable(_DEFAULT, current, allow_config_change=True)


def test_what_a_run_started_from_may_move():
  current = _changed(
      train__init_from='stage1',
      model__encoder__checkpoint='encoder',
      model__decoder__mae__checkpoint='decoder',
  )
  configuration.check_resumable(_DEFAULT, current)


def test_one_architecture_in_other_words_is_the_same():
  fields = 'width=24, depth=2, num_heads=2, mlp_dim=48'
  saved = _changed(
      model__encoder__architecture=f'siglip({fields}, patch_size=16)'
  )
  current = _changed(
      model__encoder__architecture=f'siglip_big_vision(patch_size=16, {fields})'
  )
  assert configuration.diff_models(saved, current) == []
  current = _changed(
      model__encoder__architecture=f'dinov2({fields}, patch_size=16)'
  )
  assert len(configuration.diff_models(saved, current)) == 1


@pytest.mark.parametrize(
    'field', ['fsq.noise', 'fsq.commitment_weight', 'vq.decay', 'vq.gradient']
)
def test_models_are_the_same_where_only_training_differs(field):
  current = _changed()
  _set(current, f'model.quantizer.{field}', 0.5)
  assert configuration.diff_models(_DEFAULT, current) == []
  with pytest.raises(ValueError, match='--allow_config_change'):
    configuration.check_resumable(_DEFAULT, current)


def test_a_teacher_neither_comes_nor_goes():
  with_teacher = _changed(losses__distillation_weight=1.0)
  weaker = _changed(losses__distillation_weight=0.5)
  configuration.check_resumable(
      with_teacher, weaker, allow_config_change=True
  )
  with pytest.raises(ValueError, match='cannot be continued so'):
    configuration.check_resumable(
        with_teacher, _DEFAULT, allow_config_change=True
    )


def test_noise_on_latents_may_change_with_the_flag():
  current = _changed(model__latent_noise=0.5)
  with pytest.raises(ValueError, match='--allow_config_change'):
    configuration.check_resumable(_DEFAULT, current)
  configuration.check_resumable(_DEFAULT, current, allow_config_change=True)


def test_projectors_that_are_not_chosen_are_not_checked():
  configuration.check_config(_changed(
      model__projector_in__attention__num_heads=7,
      model__projector_out__name='levels',
      model__quantizer__name='residual_fsq',
  ))
  configuration.check_config(_changed(
      model__projector_in__name='none',
      model__projector_out__name='none',
      model__quantizer__name='vq',
      model__quantizer__vq__code_dim=64,
  ))


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('model.encoder.width', 8),
        ('model.projector_out.name', 'fourier'),
        ('model.quantizer.fsq.levels', (5, 5)),
        ('data.image_size', (16, 16)),
        ('optim.name', 'muon'),
    ],
)
def test_another_model_or_optimizer_cannot_continue_a_run(name, value):
  current = _changed()
  _set(current, name, value)
  with pytest.raises(ValueError, match='--workdir') as error:
    configuration.check_resumable(_DEFAULT, current, allow_config_change=True)
  assert f'{name}: ' in str(error.value)


def test_names_that_may_change_are_fields():
  assert compatibility._RESUMABLE.issubset(schema.FIELDS)
  assert compatibility._NOT_OF_STATE.issubset(schema.FIELDS)


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


@pytest.mark.parametrize('name', configuration.PATHS)
def test_paths_are_resolved(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', '/home/somebody')
  given = _DEFAULT.copy_and_resolve_references()
  for value, resolved in (
      ('a/../b', f'{tmp_path}/b'),
      ('~/b', '/home/somebody/b'),
      ('/b', '/b'),
      ('', ''),
  ):
    given.update_from_flattened_dict({name: value})
    config = configuration.resolve_paths(given)
    assert dict(loading.flatten(config))[name] == resolved
    # A copy: the given one stays.
    assert dict(loading.flatten(given))[name] == value
    assert configuration.diff_configs(given, config) == []
    configuration.check_resumable(given, config)
    configuration.check_resumable(config, given)


def test_every_field_that_is_a_path_is_resolved():
  # Those of which the comments in configs/default.py say so.
  assert set(configuration.PATHS) <= schema.FIELDS.keys()
  ends = ('.checkpoint', '_dir', '.init_from', '.latent_statistics')
  assert set(configuration.PATHS) == {
      name
      for name in schema.FIELDS
      if name.endswith(ends) or name.startswith('eval.networks.')
  }


def test_placeholders_stay_as_they_are():
  given = _DEFAULT.copy_and_resolve_references()
  given.model.encoder.checkpoint = None
  assert configuration.resolve_paths(given).model.encoder.checkpoint is None


def test_another_folder_is_another_config():
  saved = _changed(data__data_dir='/a')
  current = _changed(data__data_dir='/b')
  with pytest.raises(ValueError, match=r"data_dir: '/a' -> '/b'"):
    configuration.check_resumable(saved, current)


def test_statistics_that_a_checkpoint_has_may_move():
  moved = {'model__latent_statistics': '/a'}, {'model__latent_statistics': '/b'}
  saved, current = (_changed(**fields) for fields in moved)
  configuration.check_resumable(saved, current)
  with pytest.raises(ValueError, match=r'cannot be continued so'):
    configuration.check_resumable(saved, _changed(), allow_config_change=True)


@pytest.mark.parametrize(
    ('mode', 'uses'),
    [
        ('train', ('images', 'initialization', 'training')),
        ('eval', ('images',)),
        ('report', ('images',)),
        ('tokenize', ('images',)),
        ('detokenize', ()),
        ('export', ()),
        ('prepare', ()),
        ('latent_statistics', ('images', 'initialization')),
    ],
)
def test_a_mode_checks_what_it_uses(mode, uses):
  for fields, part in (
      ({'data__source': 'folder', 'data__data_dir': '/none'}, 'images'),
      ({'data__data_dir': None}, 'images'),
      ({'model__encoder__checkpoint': None}, 'initialization'),
      ({'train__init_from': None}, 'initialization'),
      ({'losses__perceptual__name': 'vit'}, 'training'),
      ({'discriminator__name': 'dino'}, 'training'),
      ({'losses__distillation_weight': 1.0}, 'training'),
      ({'data__batch_size': 12}, 'training'),
  ):
    config = _changed(**fields)
    if part in uses:
      with pytest.raises(ValueError, match='allowed: '):
        configuration.check_config(config, 8, mode=mode)
    else:
      configuration.check_config(config, 8, mode=mode)
  # Whatever a mode uses, no field may be wrong.
  with pytest.raises(ValueError, match='seed is -1'):
    configuration.check_config(_changed(seed=-1), mode=mode)


def test_the_config_of_a_run_is_no_config_file(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text(configuration.config_to_json(_DEFAULT))
  with pytest.raises(ValueError, match='is JSON; a config file is Python'):
    configuration.load_config(path)


def test_missing_config_file_is_named(tmp_path):
  with pytest.raises(ValueError, match=r'no config file .*none\.py'):
    configuration.load_config(tmp_path / 'none.py')


def test_of_sections_to_choose_from_only_the_chosen_one_makes_a_state():
  saved = _DEFAULT.copy_and_resolve_references()
  for fields, expected in (
      ({'model.quantizer.vq.codebook_size': 99}, []),
      ({'discriminator.patch.channels': 64}, []),
      ({'discriminator.name': 'patch'}, ['discriminator.name']),
      ({'model.projector_in.mlp.width': 9}, []),
      ({'model.quantizer.fsq.levels': (5, 5)}, ['model.quantizer.fsq.levels']),
  ):
    current = saved.copy_and_resolve_references()
    current.update_from_flattened_dict(fields)
    lines = configuration.diff_models(saved, current, and_of=('discriminator',))
    assert [line.partition(':')[0] for line in lines] == expected


def test_a_run_cannot_go_on_with_another_discriminator():
  saved = _DEFAULT.copy_and_resolve_references()
  saved.discriminator.name = 'patch'
  for field, value in (
      ('discriminator.name', 'none'),
      ('discriminator.name', 'stylegan'),
      ('discriminator.patch.channels', 64),
  ):
    current = saved.copy_and_resolve_references()
    current.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match='cannot be continued') as error:
      configuration.check_resumable(saved, current, allow_config_change=True)
    assert field in str(error.value)
  # Its losses may change, where that is meant.
  current = saved.copy_and_resolve_references()
  current.discriminator.r1_weight = 1.0
  with pytest.raises(ValueError, match='allow_config_change'):
    configuration.check_resumable(saved, current)
  configuration.check_resumable(saved, current, allow_config_change=True)
  # Its frozen weights may lie elsewhere.
  current = saved.copy_and_resolve_references()
  current.losses.perceptual.checkpoint = 'elsewhere'
  configuration.check_resumable(saved, current)
