"""Which configs are refused, and what the messages say."""

import ast
import copy
import dataclasses
import importlib.util
import math
import pathlib

import ml_collections
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import quantizers
from fsq_jax.configuration import loading
from fsq_jax.configuration import schema
from fsq_jax.train import losses
from fsq_jax.train import optim

_ROOT = pathlib.Path(__file__).parents[2]
_DEFAULT = configuration.load_config(_ROOT / 'configs' / 'default.py')


def _changed(fields=None):
  """The default config as a dict, with other values by dotted name."""
  config = copy.deepcopy(_DEFAULT.to_dict())
  for name, value in (fields or {}).items():
    *sections, key = name.split('.')
    section = config
    for part in sections:
      section = section[part]
    section[key] = value
  return config


def _problems(config, num_devices=None, mode='train'):
  """The lines of the error that a config raises; [] if it raises none."""
  try:
    configuration.check_config(config, num_devices, mode=mode)
  except ValueError as error:
    title, *problems = str(error).splitlines()
    assert title == 'The config cannot be used:'
    return [problem.strip() for problem in problems]
  return []


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
    is_text = name in schema.PATHS or name in (
        'data.name', 'train.compilation_cache'
    )
    return [3, None, ('a',), 'a\0b'] + ([] if is_text else [''])
  return [math.nan, math.inf, True, '0.1', (0.1,)]  # Optional floats.


def test_the_fields_are_those_of_default_py():
  assert set(schema.FIELDS) == dict(loading.flatten(_DEFAULT)).keys()


def test_default_passes_with_any_kind_of_container():
  listed = _changed({
      'data.image_size': [32, 64],
      'model.quantizer.fsq.levels': [8, 6, 5],
      'partitioning.rules': [['.*kernel', [None, 'fsdp']], ['.*', 'replicate']],
      'losses.reconstruction_weight': 1,
  })
  assert _problems(_DEFAULT) == []
  assert _problems(_DEFAULT, num_devices=8) == []
  assert _problems(listed) == []


def test_a_config_is_not_changed_by_its_check():
  config = _DEFAULT.copy_and_resolve_references()
  config.data.data_dir = None
  before = config.to_dict()
  assert _problems(config, mode='export') == []
  assert config.to_dict() == before


def test_typos_are_refused_with_the_nearest_field():
  failures = []
  # Some of them: finding the nearest of all names takes long.
  cases = [(typo, name) for name in schema.FIELDS for typo in _typos(name)]
  for typo, name in cases[::7]:
    (problem,) = configuration.describe_unknown([typo])
    if not problem.startswith(
        f'{typo} is not a field of a config; nearest: {name}'
    ):
      failures.append(problem)
  assert not failures
  # In a config, the field itself is missing.
  config = _changed()
  config['seeed'] = config.pop('seed')
  unknown, missing = _problems(config)
  assert unknown.startswith('seeed is not a field of a config; nearest: seed')
  assert missing.startswith('seed is missing; allowed: an integer from 0')


def test_wrong_values_are_refused_by_name():
  defaults = dict(loading.flatten(_DEFAULT))
  cases = {x: _wrong_values(x, value) for x, value in defaults.items()}
  assert sum(map(len, cases.values())) > 1200
  configs = []
  # All fields at once; but a constructor names only the first wrong argument.
  for i in range(max(map(len, cases.values()))):
    wrong = {name: x[i] for name, x in cases.items() if i < len(x)}
    alone = [name for name in wrong if name.startswith('model.quantizer.')]
    configs += [{name: wrong.pop(name)} for name in alone] + [wrong]
  failures = []
  for fields in configs:
    problems = _problems(_changed(fields))
    for name, value in fields.items():
      # Constructors name the wrong element of a tuple.
      given = name if isinstance(value, tuple) else f'{name} is {value!r}'
      if not any(x.startswith(given) for x in problems):
        failures.append((name, value, problems))
  assert not failures


_SIZES = {'data.image_sizes': ((32, 32), (48, 48), (64, 32))}
_SINCOS = {
    'model.encoder.position': 'sincos',
    'model.decoder.position': 'sincos',
}
# Fields of a config, and a part of the message.
_REFUSED = [
    ({'data.image_size': (30, 32)}, 'model.encoder.patch_size 4 does not div'),
    ({'data.image_size': (32, 8)}, 'window of SSIM'),
    ({'data.image_sizes': (48, 48)}, 'two or more different (height, width)'),
    ({'data.image_sizes': ((32, 32),)}, 'two or more different'),
    ({'data.image_sizes': ((32, 32), (32, 32))}, 'two or more different'),
    (_SINCOS | {'data.image_sizes': ((48, 48), (64, 32))}, 'with image_size'),
    (
        _SIZES,
        "data.image_sizes: model.encoder is 'vit' with position 'learned',"
        " which takes one image size; use 'conv', or 'vit'",
    ),
    (
        _SIZES | _SINCOS | {'model.decoder.position': 'learned'},
        "data.image_sizes: model.decoder is 'vit' with position 'learned'",
    ),
    (
        _SIZES | _SINCOS | {'model.decoder.name': 'mae'},
        'data.image_sizes: model.decoder is mae, which takes one image size',
    ),
    (
        _SIZES | _SINCOS | {'model.latent_statistics': 'file'},
        "image size; set it to ''",
    ),
    (
        _SINCOS | {'data.image_sizes': ((32, 32), (50, 32))},
        'data.image_sizes: image_size is (50, 32), which',
    ),
    (
        _SIZES | _SINCOS | {'discriminator.name': 'stylegan'},
        "'patch' and 'dino'",
    ),
    (
        _SIZES | _SINCOS | {'data.resize_shorter': 32},
        'at least the longest side of image_sizes',
    ),
    (
        _SIZES | _SINCOS | {'data.source': 'digits', 'data.flip': False},
        "() with 'digits'",
    ),
    ({'model.encoder.num_heads': 3}, 'multiple of num_heads'),
    ({'model.decoder.num_heads': 3}, 'multiple of num_heads'),
    (
        {'model.decoder.width': 66, 'model.decoder.position': 'sincos'},
        "position is 'sincos' with model.decoder.width 66; use a multiple of 4",
    ),
    ({'model.decoder.patch_size': 8}, "'vit' takes (4, 4)"),
    ({'losses.distillation_weight': 1.0}, 'or a teacher'),
    (
        {
            'losses.distillation_weight': 1.0,
            'model.encoder.checkpoint': 'of no vit',
        },
        'or a teacher',
    ),
    (
        {'optim.learning_rate_factors': (('encoder/.*', 0.0),)},
        'finite number > 0',
    ),
    (
        {
            'model.encoder.name': 'pretrained',
            'model.encoder.architecture': 'siglip_H/16',
        },
        "model.encoder: The architecture 'siglip_H/16'",
    ),
    (
        {
            'model.encoder.name': 'pretrained',
            'model.encoder.architecture': 'checkpoint',
        },
        'without a model.encoder.checkpoint',
    ),
    (
        {
            'model.encoder.name': 'pretrained',
            'model.encoder.architecture': 'checkpoint',
            'model.encoder.checkpoint': '/nowhere',
        },
        'model.encoder.checkpoint: There is no /nowhere',
    ),
    (
        {
            'model.encoder.name': 'pretrained',
            'model.encoder.image_size': (8, 8),
        },
        'less than one patch, which has 16 pixels',
    ),
    (
        {
            'model.encoder.name': 'pretrained',
            'model.decoder.patch_size': 16,
            'model.latent_statistics': 'x',
        },
        'of 768 channels',
    ),
    ({'model.quantizer.fsq.levels': ()}, 'model.quantizer.fsq.levels is ()'),
    ({'model.quantizer.fsq.levels': (8, 1)}, 'quantizer.fsq.levels[1] is 1;'),
    (
        {'model.quantizer.fsq.levels': (2**16,) * 2},
        'model.quantizer.fsq.levels (65536, 65536) have',
    ),
    (
        {
            'model.quantizer.fsq.convention': 'paper',
            'model.quantizer.fsq.bound': 'clip',
        },
        "model.quantizer.fsq.bound is 'clip'; convention 'paper' allows",
    ),
    # Sections of quantizers that are not chosen have to be right, too.
    ({'model.quantizer.vq.decay': 1.0}, 'model.quantizer.vq.decay is 1.0; use'),
    (
        {
            'model.projector_in.name': 'attention',
            'model.projector_in.attention.num_heads': 7,
        },
        'model.projector_in.attention.width 512 is no multiple of num_heads 7',
    ),
    (
        {
            'model.projector_out.name': 'levels',
            'model.quantizer.name': 'simvq',
        },
        'codes of SimVQ have no levels',
    ),
    (
        {'model.projector_out.name': 'levels', 'model.quantizer.name': 'none'},
        'codes of NoQuantizer have no levels',
    ),
    ({'model.quantizer.none.code_dim': 0}, 'none.code_dim is 0; use an int'),
    (
        {'model.projector_in.name': 'none'},
        "projector_in.name is 'none' with 64 channels of the encoder",
    ),
    (
        {'model.projector_out.name': 'none'},
        "projector_out.name is 'none' with 3 channels of a code",
    ),
    ({'data.source': 'tfds'}, "with 'tfds' a name"),
    ({'data.source': 'folder'}, '--config.data.data_dir'),
    ({'data.source': 'folder', 'data.data_dir': '/none'}, "'/none'"),
    ({'data.source': 'webdataset', 'data.data_dir': '/none'}, "'/none'"),
    ({'data.source': 'arrays', 'data.data_dir': '/none'}, "'/none'"),
    ({'data.source': 'parquet', 'data.data_dir': '/none'}, "'/none'"),
    ({'data.source': 'parquet', 'data.name': 'cifar10'}, "'owner/name'"),
    ({'eval.native_size': True}, "only with data.source 'tfds', 'parquet'"),
    ({'data.source': 'digits'}, 'set --config.data.flip=False'),
    ({'tokenize.views': 2, 'tokenize.fit': 'pad'}, "only with fit 'crop'"),
    ({'data.crop_scale': (2.0, 1.0)}, '0 < min <= max'),
    ({'model.encoder.conv.pixel_range': (1.0, 1.0)}, 'low < high'),
    ({'data.label_names': ('cat', 'cat')}, 'data.label_names is'),
    ({'data.label_names': ('cat', '')}, 'data.label_names is'),
    ({'data.label_names': ('cat', 3)}, 'data.label_names is'),
    (
        {'data.batch_size': 64, 'optim.accumulation_steps': 3},
        'multiple of accumulation_steps',
    ),
    ({'optim.warmup_steps': 1000}, 'warmup_steps < num_steps'),
    ({'optim.end_learning_rate': 1.0}, 'end_learning_rate <='),
    ({'optim.frozen': ('(',)}, 'regular expressions'),
    (
        {
            'discriminator.name': 'patch',
            'discriminator.start_step': 10,
            'losses.adversarial.start_step': 9,
        },
        'starts with the discriminator or later',
    ),
    (
        {
            'discriminator.name': 'patch',
            'discriminator.optim.warmup_steps': 1000,
        },
        'start_step + warmup_steps < num_steps',
    ),
    ({'discriminator.patch.channels': 48}, 'allowed: a multiple of 32'),
    ({'discriminator.dino.kernel_size': 8}, 'allowed: an odd integer >= 1'),
    ({'partitioning.rules': ()}, 'at least one'),
    ({'partitioning.rules': (('.*', 'split'),)}, "'replicate'"),
    ({'partitioning.rules': (('(', 'fsdp'),)}, "'replicate'"),
    ({'partitioning.rules': (('.*', ('model',)),)}, "'replicate'"),
    ({'partitioning.mesh.fsdp': -1}, 'at most one -1'),
    ({'partitioning.mesh.data': 0}, '-1 for all remaining devices'),
    ({'train.profile_steps': (5, 2)}, 'first <= last'),
    ({'train.profile_steps': (5, 2000)}, 'last <= num_steps'),
    ({'train.profile_steps': (5,)}, '(first, last)'),
    ({'eval': {}}, 'eval.num_grid_images is missing'),
    ({'model.encoder': 3}, 'model.encoder is not a field'),
]


def test_problems_are_named():
  failures = []
  for fields, message in _REFUSED:
    problems = _problems(_changed(fields))
    if not any(message in problem for problem in problems):
      failures.append((fields, message, problems))
  assert not failures


def test_devices_count_only_where_they_are_known():
  for fields, message in (
      ({'data.batch_size': 12}, '8 devices times accumulation_steps'),
      (
          {'data.batch_size': 16, 'optim.accumulation_steps': 4},
          '8 devices times accumulation_steps',
      ),
      ({'data.eval_batch_size': 4}, 'a multiple of 8 devices'),
      ({'partitioning.mesh.data': 4}, 'multiply to 8 devices'),
      ({'partitioning.mesh.fsdp': 3}, 'multiply to 8 devices'),
  ):
    config = _changed(fields)
    assert _problems(config) == []
    (problem,) = _problems(config, num_devices=8)
    assert message in problem


def test_mesh_that_fills_the_devices_passes():
  for data, fsdp in [(8, 1), (2, 4), (-1, 4), (4, -1)]:
    config = _changed(
        {'partitioning.mesh.data': data, 'partitioning.mesh.fsdp': fsdp}
    )
    assert _problems(config, num_devices=8) == []


def test_all_problems_are_listed_at_once():
  config = _changed({
      'seed': -1,
      'data.batch_sise': 3,
      'data.source': 'tfds',
      'model.quantizer.fsq.levels': (2**16, 2**16),
      'model.quantizer.vq.metric': 'manhattan',
      'optim.learning_rate': math.nan,
  })
  del config['train']['num_steps']
  names = [line.split()[0] for line in _problems(config)]
  assert names == [
      'data.batch_sise',
      'seed',
      'optim.learning_rate',
      'train.num_steps',
      'data.source',
      'model.quantizer.fsq.levels',
      'model.quantizer.vq.metric',
  ]


def test_the_model_is_checked_beside_other_problems():
  fields = {'seed': -1, 'model.encoder.num_heads': 3}
  seed, heads = _problems(_changed(fields))
  assert seed.startswith('seed is -1')
  assert heads.startswith('model.encoder.width 64 is no multiple of num_heads')


def test_folder_that_exists_passes(tmp_path):
  config = {'data.source': 'folder', 'data.data_dir': str(tmp_path)}
  assert _problems(_changed(config)) == []


def test_resizing_below_the_crop_needs_leave():
  for length, size, allowed, fits in (
      (0, (32, 64), False, True),
      (64, (32, 64), False, True),
      (64, (64, 32), False, True),
      (63, (32, 64), False, False),
      (31, (32, 32), False, False),
      (31, (32, 32), True, True),
  ):
    problems = _problems(
        _changed({
            'data.resize_shorter': length,
            'data.image_size': size,
            'data.allow_upscaling': allowed,
        })
    )
    assert len(problems) == (0 if fits else 1)
    for problem in problems:
      assert f'data.resize_shorter is {length}' in problem
      assert '--config.data.allow_upscaling' in problem


def test_models_without_learned_positions_take_several_sizes():
  conv = {'model.encoder.name': 'conv', 'model.decoder.name': 'conv'}
  for fields in (
      _SINCOS,
      conv,
      _SINCOS | {'discriminator.name': 'patch'},
      _SINCOS | {'data.resize_shorter': 64},
      _SINCOS | {'data.resize_shorter': 32, 'data.allow_upscaling': True},
  ):
    assert _problems(_changed(_SIZES | fields)) == []
  listed = {'data.image_sizes': [[32, 32], [48, 48]]}
  assert _problems(_changed(_SINCOS | listed)) == []
  # Networks of training do not matter to other modes.
  stylegan = _SINCOS | {'discriminator.name': 'stylegan'}
  assert _problems(_changed(_SIZES | stylegan), mode='eval') == []


def test_projectors_that_are_not_chosen_are_not_checked():
  unused = {
      'model.projector_in.attention.num_heads': 7,
      'model.projector_out.name': 'levels',
      'model.quantizer.name': 'residual_fsq',
  }
  equal = {
      'model.projector_in.name': 'none',
      'model.projector_out.name': 'none',
      'model.quantizer.name': 'vq',
      'model.quantizer.vq.code_dim': 64,
  }
  assert _problems(_changed(unused)) == []
  assert _problems(_changed(equal)) == []


def _allowed_names(field):
  """The names of a rule of names, out of its words; () of another rule."""
  allowed = schema.FIELDS[field].rule.allowed
  names = allowed.removeprefix('one of ')
  return ast.literal_eval(names) if names != allowed else ()


def test_every_allowed_name_is_known_to_its_builder():
  assert sum(len(_allowed_names(field)) for field in schema.FIELDS) > 50
  for field in schema.FIELDS:
    for name in _allowed_names(field):
      config = ml_collections.ConfigDict(_changed({field: name}))
      if 'projector' in field and name == 'none':
        # Codes as wide as encoder and decoder, which no projector changes.
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


def test_sections_of_quantizers_have_every_field_and_its_default():
  assert set(_allowed_names('model.quantizer.name')) == schema.QUANTIZERS.keys()
  for name in schema.QUANTIZERS:
    section = _DEFAULT.model.quantizer[name].to_dict()
    quantizer = quantizers.build_quantizer({'name': name, **section})
    fields = {x.name: x.default for x in dataclasses.fields(quantizer)}
    # `parent` and `name` are linen's; configs keep channels last, and train on
    # global arrays, which need no axis_name.
    assert section.keys() == fields.keys() - {
        'axis_name', 'channel_axis', 'name', 'parent'
    }
    for field, value in section.items():
      # Sizes have no default: MISSING, or None where a base needs one.
      if fields[field] not in (dataclasses.MISSING, None):
        assert value == fields[field], (name, field)


def test_only_fields_of_training_are_missing_in_specs():
  """What decides the meaning of tokens has the role MODEL."""
  for name, rows in schema.QUANTIZERS.items():
    section = _DEFAULT.model.quantizer[name].to_dict()
    if name == 'none':  # It has no tokens.
      continue
    spec = quantizers.build_quantizer({'name': name, **section}).spec()
    for field in rows.keys() & spec.keys():
      row = schema.FIELDS[f'model.quantizer.{name}.{field}']
      assert row.role is schema.Role.MODEL, (name, field)


def test_no_field_hides_behind_a_method_of_the_config():
  # config.update would be the method, and --config.update fail.
  methods = set(dir(ml_collections.ConfigDict()))
  assert not [x for x in schema.FIELDS if set(x.split('.')) & methods]


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
      ({'data.source': 'folder', 'data.data_dir': '/none'}, 'images'),
      ({'data.data_dir': None}, 'images'),
      ({'model.encoder.checkpoint': None}, 'initialization'),
      ({'train.init_from': None}, 'initialization'),
      ({'losses.perceptual.name': 'vit'}, 'training'),
      ({'discriminator.name': 'dino'}, 'training'),
      ({'losses.distillation_weight': 1.0}, 'training'),
      ({'data.batch_size': 12}, 'training'),
  ):
    problems = _problems(_changed(fields), 8, mode=mode)
    assert len(problems) == (part in uses), fields
    assert all('allowed: ' in problem for problem in problems)
  # Whatever a mode uses, no field may be wrong.
  (problem,) = _problems(_changed({'seed': -1}), mode=mode)
  assert problem.startswith('seed is -1')


@pytest.mark.parametrize('name', ['default', 'default_generator'])
def test_a_tracker_without_its_package_says_what_to_install(
    name, monkeypatch
):
  # Also where it is installed.
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  config = configuration.load_config(_ROOT / f'configs/{name}.py')
  if name == 'default_generator':
    config.tokens.tokenizer = 'runs/tokenizer'
  configuration.check_config(config)
  config.train.trackers = ('mlflow', 'wandb')
  assert _problems(config) == [
      f"train.trackers is ('mlflow', 'wandb'); allowed: '{name}' only where it"
      f' is installed; run: pip install {package}.'
      for name, package in (('mlflow', 'mlflow-skinny'), ('wandb', 'wandb'))
  ]
  # Only training uses them.
  assert _problems(config, mode='eval') == []
  for value in (('tensorboard',), ('wandb', 'wandb')):
    config.train.trackers = value
    assert _problems(config) == [
        f'train.trackers is {value!r}; allowed: a tuple of names of'
        " ['mlflow', 'wandb'], each once."
    ]
