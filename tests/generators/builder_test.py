"""Models, objectives and samplers from configs, and messages by field."""

import pytest

from fsq_jax.generators import autoregressive_sampling
from fsq_jax.generators import builder
from fsq_jax.generators import masked_sampling

_FSQ = builder.TokenFormat(
    quantizer={
        'name': 'fsq', 'levels': [5, 3],
        'index_order': 'last dimension fastest',
    },
    codebook_size=15, grid=(2, 3), label_names=('a', 'b'),
    model_hash='ab' * 32,
)
_VQ = _FSQ._replace(quantizer={'name': 'vq', 'codebook_size': 15})


@pytest.fixture
def config(make_config):
  return make_config()


@pytest.mark.parametrize(
    ('form', 'embedding', 'head'),
    [(_FSQ, 'levels', 'levels_autoregressive'), (_VQ, 'table', 'flat')],
)
def test_embedding_and_head_follow_the_quantizer(config, form, embedding, head):
  model = builder.build_model(config, form)
  assert (model.embedding, model.head) == (embedding, head)
  assert (model.grid, model.num_tokens, model.num_classes) == ((2, 3), 6, 2)
  assert not model.architecture.causal
  config.model.kind = 'autoregressive'
  config.model.embedding, config.model.head = 'table', 'flat_tied'
  model = builder.build_model(config, form)
  assert (model.embedding, model.head) == ('table', 'flat_tied')
  assert model.architecture.causal


def test_sizes_of_0_are_those_of_the_preset(config):
  for name in ('depth', 'width', 'num_heads', 'mlp_dim'):
    config.model[name] = 0
  config.model.preset = 'S'
  architecture = builder.build_architecture(config.model)
  assert (architecture.depth, architecture.width) == (12, 384)
  config.model.depth = 3
  assert builder.build_architecture(config.model).depth == 3
  assert builder.build_architecture(config.model).width == 384


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('preset', 'M', "^model: The preset is 'M'; known: "),
        ('mlp', 'relu', "^model: mlp is 'relu'; known: "),
        ('num_heads', 3, '^model: width is 8, which num_heads = 3 does not'),
        ('dropout', 1.0, '^model: dropout is 1.0'),
        ('head', 'linear', '^model: .*linear'),
        ('embedding', 'sum', '^model: .*sum'),
    ],
)
def test_wrong_models_are_rejected_by_field(config, field, value, message):
  config.model[field] = value
  with pytest.raises(ValueError, match=message):
    builder.build_model(config, _FSQ)


def test_levels_need_a_quantizer_that_has_them(config):
  config.model.head = 'levels_autoregressive'
  with pytest.raises(ValueError, match=r'^model: .*levels'):
    builder.build_model(config, _VQ)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('class_dropout', 1.5), ('label_smoothing', -0.1),
        ('mask_schedule', 'sine'), ('mask_floor', 2.0),
        ('normalization', 'batch'),
    ],
)
def test_wrong_losses_are_rejected_by_field(config, field, value):
  config.losses[field] = value
  with pytest.raises(ValueError, match=r'^losses: '):
    builder.build_objective(config.losses)


def test_sampling_has_the_options_of_its_kind(config):
  sample = config.sample
  sample.temperature, sample.top_k, sample.top_p = 0.5, 7, 0.9
  sample.guidance.scale, sample.guidance.schedule = 3.0, 'linear'
  sample.num_steps, sample.order = 6, 'random'
  masked = builder.build_sampling(sample, 'masked', 6)
  assert isinstance(masked, masked_sampling.MaskedSampling)
  assert (masked.num_steps, masked.order) == (6, 'random')
  causal = builder.build_sampling(sample, 'autoregressive', 6)
  assert isinstance(causal, autoregressive_sampling.AutoregressiveSampling)
  for options in (masked, causal):
    values = builder.describe_sampling(options)
    assert values['draw'] == {'temperature': 0.5, 'top_k': 7, 'top_p': 0.9}
    assert values['guidance']['scale'] == 3
  # Only masked models take steps.
  sample.num_steps = 7
  builder.build_sampling(sample, 'autoregressive', 6)
  with pytest.raises(ValueError, match=r'^sample: .*7'):
    builder.build_sampling(sample, 'masked', 6)
