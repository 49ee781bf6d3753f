"""Generators: masked and autoregressive models of image tokens."""

from fsq_jax.generators import autoregressive_sampling
from fsq_jax.generators import baselines
from fsq_jax.generators import likelihood
from fsq_jax.generators import masked_sampling
from fsq_jax.generators import objectives
from fsq_jax.generators.architecture import Architecture
from fsq_jax.generators.architecture import preset
from fsq_jax.generators.autoregressive_sampling import AutoregressiveSampling
from fsq_jax.generators.draws import Draw
from fsq_jax.generators.generator import Generated
from fsq_jax.generators.generator import Generator
from fsq_jax.generators.guidance import Guidance
from fsq_jax.generators.masked_sampling import MaskedSampling
from fsq_jax.generators.model import TokenModel
from fsq_jax.generators.objectives import Objective
from fsq_jax.generators.sampled import Samples
from fsq_jax.generators.vocabulary import Vocabulary
from fsq_jax.generators.vocabulary import from_levels
from fsq_jax.generators.vocabulary import from_spec

__all__ = [
    'Architecture', 'AutoregressiveSampling', 'Draw', 'Generated', 'Generator',
    'Guidance', 'MaskedSampling', 'Objective', 'Samples', 'TokenModel',
    'Vocabulary', 'autoregressive_sampling', 'baselines', 'from_levels',
    'from_spec', 'likelihood', 'masked_sampling', 'objectives', 'preset',
]  # fmt: skip
