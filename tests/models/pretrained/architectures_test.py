"""Architectures as text: read back, and nothing executed or let through."""

import pathlib
import string

import hypothesis
from hypothesis import strategies
import pytest

from fsq_jax import models
from fsq_jax.models import resampling
from fsq_jax.models.pretrained import architectures

_ENCODERS = pathlib.Path(__file__).parents[2] / 'testdata' / 'encoders'
_CHECKPOINTS = (
    'big_vision_siglip/unrolled.npz', 'dinov2', 'dinov2_with_registers',
    'dinov3', 'mae', 'siglip',
)  # fmt: skip
_FIELDS = 'width=8, depth=1, num_heads=2, mlp_dim=16'


def _assert_read_back(architecture):
  text = models.describe_architecture(architecture)
  assert models.parse_architecture(text) == architecture
  return text


@pytest.mark.parametrize('name', sorted(models.ARCHITECTURES))
def test_a_published_architecture_is_described_by_its_name(name):
  assert _assert_read_back(models.ARCHITECTURES[name]) == name


@pytest.mark.parametrize('checkpoint', _CHECKPOINTS)
def test_what_a_checkpoint_has_can_be_written_down(checkpoint):
  architecture = models.build_encoder(_ENCODERS / checkpoint).architecture
  text = _assert_read_back(architecture)
  # Of the family's fields, nothing is repeated.
  family, _, fields = text.partition('(')
  assert family == {
      'big_vision_siglip/unrolled.npz': 'siglip_big_vision'
  }.get(checkpoint, checkpoint)
  assert [field.split('=')[0] for field in fields.split(', ')] == [
      'width', 'depth', 'num_heads', 'mlp_dim', 'patch_size',
  ]


def test_fields_may_be_other_than_the_familys():
  text = f"mae({_FIELDS}, patch_size=4, biases=('query', 'mlp'), mlp='gated')"
  architecture = models.parse_architecture(text)
  assert (architecture.biases, architecture.mlp) == (('query', 'mlp'), 'gated')
  assert architecture.norm_epsilon == 1e-12
  _assert_read_back(architecture)


_counts = strategies.integers(1, 2**31)
_pixels = strategies.floats(-1e3, 1e3)


@strategies.composite
def _architectures(draw):
  num_heads = draw(strategies.integers(1, 64))
  biases = draw(strategies.sets(strategies.sampled_from(architectures.BIASES)))
  positive = strategies.floats(1e-30, 1e6)

  def one_of(values):
    return draw(strategies.sampled_from(values))

  return architectures.Architecture(
      width=4 * num_heads * draw(strategies.integers(1, 64)),
      depth=draw(_counts),
      num_heads=num_heads,
      mlp_dim=draw(_counts),
      patch_size=draw(_counts),
      num_class_tokens=one_of((0, 1)),
      num_registers=draw(strategies.integers(0, 2**31)),
      position=one_of(architectures.POSITIONS),
      position_kernel=one_of(sorted(resampling.KERNELS)),
      rope_theta=draw(positive),
      mlp=one_of(architectures.MLPS),
      activation=one_of(architectures.ACTIVATIONS),
      biases=tuple(b for b in architectures.BIASES if b in biases),
      layer_scale=one_of((False, True)),
      norm_epsilon=draw(positive),
      mean=draw(strategies.tuples(_pixels, _pixels, _pixels)),
      std=draw(strategies.tuples(positive, positive, positive)),
  )


@pytest.mark.slow
@hypothesis.given(_architectures())
@hypothesis.settings(deadline=None, max_examples=200)
def test_any_architecture_is_read_back(architecture):
  _assert_read_back(architecture)


# All of Unicode would take seconds to list.
@hypothesis.given(strategies.text(string.printable + '\0é٣\u2212\u2028'))
@hypothesis.settings(deadline=None, max_examples=20)
def test_any_other_text_is_refused(text):
  for candidate in (text, f'siglip({text})', f'mae({_FIELDS}, mean={text})'):
    with pytest.raises(ValueError, match='known: '):
      models.parse_architecture(candidate)


@pytest.mark.parametrize(
    ('text', 'problem'),
    [
        ('', 'invalid'),
        ('siglip', 'neither a name nor'),
        ('siglip_L/15', 'neither a name nor'),
        ("__import__('os')", 'fields without a name'),
        ("siglip.__class__(width='os')", 'neither a name nor'),
        ("__import__(name='os')", r"unknown fields \['name'\]"),
        (f'open({_FIELDS}, patch_size=4)', "family is 'open'; known"),
        (f'siglip({_FIELDS}, patch_size=__import__("os"))', 'malformed node'),
        (f'siglip({_FIELDS}, patch_size=2**40)', 'malformed node'),
        (f'siglip({_FIELDS}, patch_size=[4 for _ in "x"][0])', 'malformed'),
        (f'siglip({_FIELDS}, **{{"patch_size": 4}})', r"fields \['None'\]"),
        (f'siglip(8, {_FIELDS}, patch_size=4)', 'fields without a name'),
        (f'siglip({_FIELDS})', "missing 1 .*'patch_size'"),
        (f'siglip({_FIELDS}, patch_size=4, widht=8)', r"fields \['widht'\]; k"),
        (f'siglip({_FIELDS}, family=4)', r"unknown fields \['family'\]"),
        (f'siglip({_FIELDS}, width=16, patch_size=4)', 'a field twice'),
        (f'siglip({_FIELDS}, patch_size=4', 'never closed'),
        (f'siglip({_FIELDS}, patch_size=4); 1', 'invalid syntax'),
        ('siglip(\0)', 'null bytes'),
        ('x' * 10**7, '10000000 characters, more than 1000'),
        ('-' * 1000, 'invalid'),
        ('(' * 1000, 'invalid'),
        (f'siglip(width={"-" * 900}1)', 'invalid'),
        (f'siglip({_FIELDS}, patch_size={"(" * 90}1{",)" * 90})', 'patch_size'),
    ],
    ids=lambda x: x[:40],
)  # fmt: skip
def test_text_that_describes_nothing_is_refused(text, problem):
  with pytest.raises(ValueError, match='known: ') as error:
    models.parse_architecture(text)
  error.match(problem)
  error.match("'dinov2_B/14'")  # All names are there, and an example.
  error.match(r'siglip\(width=768')
  assert len(str(error.value)) < 2500


@pytest.mark.parametrize(
    'field',
    [
        'width=0', 'width=-8', 'width=8.0', "width='8'", 'width=True',
        'width=None', 'width=9', 'depth=0', "depth='2'", 'num_heads=0',
        'num_heads=3', 'mlp_dim=0', 'patch_size=0', "patch_size='4'",
        'num_class_tokens=2', 'num_class_tokens=True', 'num_registers=-1',
        "num_registers='4'", "position='none'", 'position=[]',
        "position_kernel='nearest'", "rope_theta='100'", 'rope_theta=1e999',
        f'norm_epsilon=1{"0" * 400}',
        "position='rope', rope_theta=0.0", "mlp='deep'", "activation='relu'",
        "biases='mlp'", "biases=('mlp', 'query')", "biases=('scale',)",
        'layer_scale=1', "norm_epsilon='1e-6'", 'norm_epsilon=-1e-6',
        'mean=0.5', "mean=('a', 'b', 'c')", 'mean=(0.5, 0.5)',
        'mean=[0.5, 0.5, 0.5]', 'std=(0.5, 0.5, 0.0)', 'std={0.1, 0.2, 0.3}',
    ],
)  # fmt: skip
def test_fields_of_another_kind_are_refused(field):
  fields = dict(x.split('=') for x in _FIELDS.split(', '))
  fields['patch_size'] = '4'
  fields.pop(field.partition('=')[0], None)
  others = ', '.join(f'{name}={value}' for name, value in fields.items())
  models.parse_architecture(f'siglip({others}, {_good(field)})')
  with pytest.raises(ValueError, match='known: ') as error:
    models.parse_architecture(f'siglip({others}, {field})')
  # It names a field of those given.
  name = 'width' if 'num_heads' in field else field.split('=')[0]
  error.match('rope_theta' if 'rope' in field else name)


def _good(field):
  """The field as it may be, so that nothing else is wrong with the text."""
  name = field.partition('=')[0]
  counts = {'width': 8, 'num_heads': 2, 'num_class_tokens': 1}
  siglip = architectures.FAMILIES['siglip']
  return f'{name}={counts.get(name, siglip.get(name, 4))!r}'
