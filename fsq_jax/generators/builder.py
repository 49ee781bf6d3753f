"""Builds models, objectives and samplers of generators from configs."""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

from jax import numpy as jnp
import ml_collections

from fsq_jax.configuration import errors
from fsq_jax.generators import architecture as architectures
from fsq_jax.generators import autoregressive_sampling
from fsq_jax.generators import draws
from fsq_jax.generators import guidance as guidance_lib
from fsq_jax.generators import masked_sampling
from fsq_jax.generators import model as models
from fsq_jax.generators import objectives
from fsq_jax.generators import schedules
from fsq_jax.generators import vocabulary as vocabularies
from fsq_jax.tokens import manifest as manifests

Sampling = (
    masked_sampling.MaskedSampling
    | autoregressive_sampling.AutoregressiveSampling
)
_SIZES = ('depth', 'width', 'num_heads', 'mlp_dim')
_OPTIONS = (
    'mlp', 'norm', 'use_bias', 'qk_norm', 'positions', 'conditioning',
    'dropout', 'remat', 'scan_unroll',
)  # fmt: skip


class TokenFormat(NamedTuple):
  """The tokens that a generator models, as JSON values.

  Attributes:
    quantizer: spec of the quantizer.
    codebook_size: K.
    grid: (rows, columns).
    label_names: class names by label; () without classes.
    model_hash: of the tokenizer that made the tokens.
  """

  quantizer: Mapping[str, Any]
  codebook_size: int
  grid: tuple[int, int]
  label_names: tuple[str, ...]
  model_hash: str

  @classmethod
  def from_manifest(cls, manifest: manifests.Manifest) -> 'TokenFormat':
    """Returns the format of token files.

    Raises:
      ValueError: images of several sizes, or several indices per code.
    """
    job = manifest.job
    if manifest.grid is None or job.fit != 'crop' or job.index_shape:
      raise ValueError(
          f'The token files have grids {manifest.grid or "of several sizes"},'
          f' fit {job.fit!r} and {job.index_shape or "one"} indices per code;'
          " generators need the grid of tokenize.fit 'crop' and one index per"
          ' code.'
      )
    return cls(
        quantizer=dict(job.quantizer),
        codebook_size=job.codebook_size,
        grid=tuple(manifest.grid),
        label_names=tuple(job.label_names),
        model_hash=job.model_hash,
    )

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> 'TokenFormat':
    """Returns the format of `_asdict()` after JSON.

    Raises:
      ValueError: a missing or unknown field.
    """
    if set(values) != set(cls._fields):
      raise ValueError(
          f'The format of tokens has the fields {sorted(values)}; needed are'
          f' {sorted(cls._fields)}.'
      )
    return cls(**{
        name: tuple(x) if isinstance(x, list) else x
        for name, x in values.items()
    })

  @property
  def vocabulary(self) -> vocabularies.Vocabulary:
    """The codebook."""
    return vocabularies.from_spec(self.quantizer, self.codebook_size)


def build_architecture(
    model: ml_collections.ConfigDict,
) -> architectures.Architecture:
  """Builds the architecture of the section model of a config.

  Raises:
    ValueError: unknown names, of embedding and head too, or values out of
      range, by field.
  """
  with errors.about('model'):
    for name, known in (
        ('embedding', models.EMBEDDINGS), ('head', models.HEADS)
    ):
      if model[name] not in ('auto', *known):
        raise ValueError(
            f"{name} is {model[name]!r}; known: {['auto', *known]}."
        )
    return architectures.preset(
        model.preset,
        causal=model.kind == 'autoregressive',
        **{name: model[name] for name in _SIZES if model[name]},
        **{name: model[name] for name in _OPTIONS},
        dtype=jnp.dtype(model.dtype),
    )


def build_model(
    config: ml_collections.ConfigDict, tokens: TokenFormat
) -> models.TokenModel:
  """Builds the model of a config for tokens.

  Args:
    config: the whole config.
    tokens: format of the tokens to model.

  Raises:
    ValueError: a model that does not fit the tokens.
  """
  vocabulary = tokens.vocabulary
  model = config.model
  has_levels = bool(vocabulary.levels)
  embedding, head = model.embedding, model.head
  if embedding == 'auto':
    embedding = 'levels' if has_levels else 'table'
  if head == 'auto':
    head = 'levels_autoregressive' if has_levels else 'flat'
  num_classes = len(tokens.label_names)
  if model.class_conditional and not num_classes:
    raise ValueError(
        'model.class_conditional is True, but the token files have no classes;'
        ' use --config.model.class_conditional=False with'
        ' --config.losses.class_dropout=0.'
    )
  architecture = build_architecture(model)
  with errors.about('model'):
    return models.TokenModel(
        architecture=architecture,
        vocabulary=vocabulary,
        grid=tokens.grid,
        num_classes=num_classes if model.class_conditional else 0,
        embedding=embedding,
        head=head,
    )


def build_objective(
    losses: ml_collections.ConfigDict,
) -> objectives.Objective:
  """Builds the training loss of the section losses of a config."""
  with errors.about('losses'):
    return objectives.Objective(
        class_dropout=losses.class_dropout,
        label_smoothing=losses.label_smoothing,
        mask_schedule=losses.mask_schedule,
        mask_floor=losses.mask_floor,
        normalization=losses.normalization,
    )


def build_sampling(
    sample: ml_collections.ConfigDict, kind: str, num_tokens: int
) -> Sampling:
  """Builds the options of sampling of the section sample of a config.

  Args:
    sample: the section.
    kind: model.kind.
    num_tokens: tokens per image.

  Raises:
    ValueError: unknown names or values out of range, by field.
  """
  with errors.about('sample'):
    options = {
        'draw': draws.Draw(
            temperature=sample.temperature,
            top_k=sample.top_k,
            top_p=sample.top_p,
        ),
        'guidance': guidance_lib.Guidance(
            scale=sample.guidance.scale,
            schedule=sample.guidance.schedule,
            power=sample.guidance.power,
        ),
    }
    if kind == 'autoregressive':
      return autoregressive_sampling.AutoregressiveSampling(**options)
    schedules.check_steps(num_tokens, sample.num_steps)
    return masked_sampling.MaskedSampling(
        num_steps=sample.num_steps,
        schedule=sample.mask_schedule,
        order=sample.order,
        choice_temperature=sample.choice_temperature,
        **options,
    )


def describe_sampling(options: Sampling) -> dict[str, Any]:
  """Returns the options of sampling in use as JSON values, for protocols."""
  values = dataclasses.asdict(options)
  if values.get('order') != 'confidence':
    values.pop('choice_temperature', None)
  return values
