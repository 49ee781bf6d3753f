"""Which configs of generators are refused, and what the messages say."""

import pathlib

from absl.testing import flagsaver
import pytest

from fsq_jax import configuration
from fsq_jax.configuration import command_line
from fsq_jax.configuration import generator_schema
from fsq_jax.configuration import loading
from fsq_jax.generators import builder
import launch

_ROOT = pathlib.Path(__file__).parents[2]
_MASKGIT = str(_ROOT / 'configs' / 'cifar10_maskgit.py')
_CONFIG = configuration.load_config(_MASKGIT)
# Of configs/cifar10_fsq_888.py.
_NUM_TOKENS = 64


def _changed(fields):
  config = _CONFIG.copy_and_resolve_references()
  config.update_from_flattened_dict(fields)
  return config


def _launch(*args):
  """Runs launch.py in this process and returns the exit code."""
  with flagsaver.flagsaver():
    return launch.main(launch.parse_flags(['launch.py', *args]))


def test_the_fields_are_those_of_default_generator_py():
  default = configuration.load_config(_ROOT / 'configs/default_generator.py')
  assert set(generator_schema.FIELDS) == dict(loading.flatten(default)).keys()
  assert loading.fields_of(default) is generator_schema.FIELDS


def test_values_of_a_wrong_type_are_refused_by_name():
  wrong = {
      bool: (1, 'yes', None),
      int: (1.5, True, '3', None, -7),
      float: (float('nan'), True, '0.1'),
      tuple: (3, 'abc', None),
      str: (3, None, ('a',)),
  }
  fields = dict(loading.flatten(_CONFIG))
  failures, count = [], 0
  for i in range(5):
    values = {
        name: wrong[type(value)][i]
        for name, value in fields.items()
        if i < len(wrong.get(type(value), ()))
    }
    config = _CONFIG.to_dict()
    for name, value in values.items():
      *sections, key = name.split('.')
      section = config
      for part in sections:
        section = section[part]
      section[key] = value
    with pytest.raises(ValueError, match='The config cannot be') as error:
      configuration.check_config(config)
    count += len(values)
    failures += [
        (name, value)
        for name, value in values.items()
        if f'  {name} is {value!r}; allowed: ' not in str(error.value)
    ]
  assert count > 200
  assert not failures


def _build(config):
  """Builds everything whose constructors check fields."""
  builder.build_architecture(config.model)
  builder.build_objective(config.losses)
  builder.build_sampling(config.sample, config.model.kind, _NUM_TOKENS)


# Field, a wrong value, and a value on the allowed side of the boundary.
_CONSTRUCTORS = [
    ('model.preset', 'huge', 'tiny'),
    ('model.mlp', 'relu', 'gelu'),
    ('model.norm', 'batch', 'layer'),
    ('model.positions', 'sincos', 'rope'),
    ('model.conditioning', 'suffix', 'adaln'),
    ('model.embedding', 'level', 'levels'),
    ('model.head', 'levelz', 'auto'),
    ('model.num_heads', 7, 8),
    ('model.dropout', 1.0, 0.99),
    ('model.dropout', -0.1, 0.0),
    ('losses.class_dropout', 1.1, 1.0),
    ('losses.label_smoothing', 1.0, 0.99),
    ('losses.mask_schedule', 'sine', 'linear'),
    ('losses.mask_floor', 1.0, 0.45),
    ('losses.normalization', 'batch', 'example'),
    ('sample.num_steps', 65, 64),
    ('sample.mask_schedule', 'sine', 'arccos'),
    ('sample.order', 'raster', 'random'),
    ('sample.choice_temperature', -1.0, 0.0),
    ('sample.temperature', -1.0, 0.0),
    ('sample.top_p', 0.0, 1.0),
    ('sample.top_p', 1.1, 0.1),
    ('sample.guidance.scale', -1.0, 0.0),
    ('sample.guidance.schedule', 'cosine', 'power_cosine'),
    ('sample.guidance.power', 0.0, 2.5),
]


@pytest.mark.parametrize(('name', 'wrong', 'right'), _CONSTRUCTORS)
def test_constructors_name_the_field(name, wrong, right):
  _build(_changed({name: right}))
  section, _, field = name.partition('.')
  with pytest.raises(ValueError, match=f'^{section}: ') as error:
    _build(_changed({name: wrong}))
  for part in (*field.split('.'), str(wrong)):
    assert part in str(error.value)


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('model.head=levelz', 'head is'),
        ('tokens.tokenizer=nowhere', 'Train the tokenizer first'),
    ],
)
def test_no_folder_is_made_for_a_wrong_config(
    tmp_path, capsys, argument, message
):
  arguments = f'--workdir={tmp_path}/x', f'--config.{argument}'
  assert _launch(f'--config={_MASKGIT}', *arguments) == 2
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'tokens.tokenizer': ''}, 'a tokenizer, or the folders of training'),
        (
            {'tokens.tokenizer': '', 'tokens.train': 'a', 'tokens.eval': 'b'},
            'num_samples 0 without a tokenizer',
        ),
        ({'eval.num_samples': 3}, 'else 4 or more, which precision'),
        (
            {'eval.num_samples': 9, 'eval.networks.inception_tf1': 'a'},
            'and 10 or more with an Inception network',
        ),
        (
            {'eval.num_samples': 0, 'eval.networks.vgg16': 'a'},
            'num_samples 0 without networks',
        ),
        (
            {'model.class_conditional': False},
            'a class_dropout > 0 only with class_conditional',
        ),
        (
            {'losses.class_dropout': 0.0, 'sample.guidance.scale': 1.5},
            'a guidance.scale other than 1 only with',
        ),
        ({'tokens.batch_size': 60}, r'tokens\.batch_size is 60.*8'),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    configuration.check_config(_changed(fields), num_devices=8)


@pytest.mark.parametrize(
    ('name', 'nearest'),
    [
        ('modle.width', 'model.width'),
        ('sample.num_step', 'sample.num_steps'),
        ('guidance.scale', 'sample.guidance.scale'),
        # A field of tokenizers alone.
        ('data.batch_size', 'tokens.batch_size'),
    ],
)
def test_unknown_overrides_suggest_fields_of_generators(name, nearest):
  config = command_line.load(_MASKGIT, None, _ROOT)
  with pytest.raises(ValueError, match=rf'nearest: .*{nearest}') as error:
    command_line.override(config, ['launch.py', f'--config.{name}=3'])
  assert name in str(error.value)


def test_unknown_and_missing_fields_are_named():
  config = _CONFIG.to_dict()
  config['sample']['num_step'] = config['sample'].pop('num_steps')
  with pytest.raises(ValueError, match='cannot be used') as error:
    configuration.check_config(config)
  message = str(error.value)
  assert (
      'sample.num_step is not a field of a config; nearest: sample.num_steps'
      in message
  )
  assert 'sample.num_steps is missing; allowed: an integer' in message


def test_modes_are_for_one_kind_of_run(tmp_path, capsys):
  for mode in ('tokenize', 'detokenize', 'export', 'prepare'):
    with pytest.raises(ValueError, match=f'mode={mode} is for .* tokenizers'):
      configuration.check_config(_CONFIG, mode=mode)
  for mode in ('train', 'eval', 'report', 'generate'):
    configuration.check_config(_CONFIG, mode=mode)
  args = [f'--config={_MASKGIT}', '--mode=tokenize', f'--workdir={tmp_path}']
  assert _launch(*args) == 2
  assert 'allowed: train, eval, report, generate' in capsys.readouterr().err
  args[:2] = [f'--config={_ROOT}/configs/debug.py', '--mode=generate']
  assert _launch(*args) == 2
  assert (
      '--mode=generate is for runs of generators, but the config is of a'
      ' tokenizer; allowed: train, eval, report, tokenize'
  ) in capsys.readouterr().err


# Fields by how a run resumes with another value of them.
_CHANGES = {
    'always': {
        'sample.num_steps': 7,
        'sample.guidance.scale': 3.0,
        'sample.classes': (1,),
        'eval.num_images': 7,
        'eval.networks.vgg16': 'elsewhere',
        'partitioning.mesh.tensor': 2,
        'train.log_every_steps': 7,
        # Compared by content.
        'tokens.tokenizer': 'elsewhere',
        'tokens.train': 'elsewhere',
    },
    'the flag': {
        'tokens.batch_size': 7,
        'losses.label_smoothing': 0.2,
        'losses.mask_floor': 0.2,
        'optim.learning_rate': 1.0,
        'train.num_steps': 7,
        'model.dropout': 0.2,
        'model.dtype': 'float32',
        'model.remat': 'blocks',
        'seed': 7,
    },
    'never': {
        'model.kind': 'autoregressive',
        'model.preset': 'B',
        'model.width': 48,
        'model.mlp': 'gelu',
        'model.qk_norm': False,
        'model.embedding': 'table',
        'model.head': 'flat',
        'model.class_conditional': False,
        'optim.name': 'adam',
    },
}


@pytest.mark.parametrize('how', _CHANGES)
def test_with_which_changes_a_run_resumes(how):
  saved = _changed({})
  wrong = []
  for name, value in _CHANGES[how].items():
    current = _changed({name: value})
    refused = []
    for allow in (False, True):
      try:
        configuration.check_resumable(
            saved, current, allow_config_change=allow
        )
      except ValueError as error:
        refused.append(allow)
        if f'{name}: ' not in str(error):
          wrong.append((name, str(error)))
    expected = {'always': [], 'the flag': [False], 'never': [False, True]}
    if refused != expected[how]:
      wrong.append((name, refused))
  assert not wrong
