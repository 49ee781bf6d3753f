"""Quantizers, candidate settings and training budget of the comparison."""

from typing import Any

from fsq_jax import quantizers

CONFIG = 'configs/cifar10_fsq_888.py'

# For all runs of this experiment and of experiments/codebook_size: the training
# budget, and the same projectors and losses for all quantizers.
BUDGET = {
    'model.projector_out.name': 'linear',
    'model.quantizer.fsq.diversity_weight': 0.0,
    'train.num_steps': 4000,
    'train.eval_every_steps': 0,
    'train.checkpoint_every_steps': 1000,
    'train.keep_checkpoints': 1,
}
# Settings are selected on held-out training images.
TUNING_BUDGET = {
    **BUDGET,
    'train.num_steps': 1500,
    'data.train_split': 'train[:90%]',
    'data.eval_split': 'train[90%:]',
}
TUNING_BITS = 10

LABELS = {
    'fsq': 'FSQ',
    'vq_ema': 'VQ, EMA',
    'vq_gradient': 'VQ, gradient',
    'simvq': 'SimVQ',
    'lfq': 'LFQ',
}

_VQ_EMA = {
    'model.quantizer.name': 'vq',
    'model.quantizer.vq.codebook_init': 'kmeans',
    'model.quantizer.vq.restart': 'batch',
}
_VQ_GRADIENT = {
    'model.quantizer.name': 'vq',
    'model.quantizer.vq.codebook_update': 'gradient',
    'model.quantizer.vq.entropy_weight': 0.1,
}
_SIMVQ = {'model.quantizer.name': 'simvq'}
_LFQ = {'model.quantizer.name': 'lfq'}


def _weighted(
    fields: dict[str, Any], variant: str, variant_fields: dict[str, Any]
) -> dict[str, dict[str, Any]]:
  """Returns a setting with three loss weights, and a variant."""
  weight = 'losses.quantizer_weight'
  return {
      'loss x 1': {**fields, weight: 1.0},
      'loss x 0.1': {**fields, weight: 0.1},
      'loss x 0.01': {**fields, weight: 0.01},
      f'{variant}, loss x 0.1': {**fields, weight: 0.1, **variant_fields},
  }


# Four settings per quantizer: the recommended one with three loss weights, and
# the most commonly published variant. FSQ needs no loss and has four variants.
CANDIDATES: dict[str, dict[str, dict[str, Any]]] = {
    'fsq': {
        'tanh, no loss': {},
        'commitment loss x 0.1': {
            'model.quantizer.fsq.commitment_weight': 0.1
        },
        'equal bins': {
            'model.quantizer.fsq.bound': 'ifsq',
            'model.quantizer.fsq.bins': 'equal',
        },
        'standardized latents': {'model.projector_in.name': 'standardized'},
    },
    'vq_ema': _weighted(
        _VQ_EMA, 'cosine', {'model.quantizer.vq.metric': 'cosine'}
    ),
    'vq_gradient': _weighted(
        _VQ_GRADIENT,
        'cosine without entropy',
        {
            'model.quantizer.vq.metric': 'cosine',
            'model.quantizer.vq.entropy_weight': 0.0,
        },
    ),
    'simvq': _weighted(
        _SIMVQ,
        'cosine, input projection',
        {
            'model.quantizer.simvq.metric': 'cosine',
            'model.quantizer.simvq.input_projection': 'linear',
        },
    ),
    'lfq': _weighted(
        _LFQ,
        'standardized latents',
        {'model.projector_in.name': 'standardized'},
    ),
}
# Selected by tuning, see results.json; compare.py exits if they differ.
CHOSEN = {
    'fsq': 'tanh, no loss',
    'vq_ema': 'loss x 1',
    'vq_gradient': 'cosine without entropy, loss x 0.1',
    'simvq': 'loss x 1',
    'lfq': 'loss x 0.1',
}

# VQ with random initialization and no dead-code reset, as in the first
# comparisons with FSQ; only used in experiments/codebook_size.
_PLAIN = {
    'model.quantizer.vq.codebook_init': 'normal',
    'model.quantizer.vq.restart': 'none',
}


def chosen(quantizer: str) -> dict[str, Any]:
  """Returns the config overrides selected by tuning.

  Args:
    quantizer: a key of `CHOSEN`; or 'vq_plain', which is 'vq_ema' without
      k-means initialization and dead-code reset.
  """
  if quantizer == 'vq_plain':
    return {**chosen('vq_ema'), **_PLAIN}
  return CANDIDATES[quantizer][CHOSEN[quantizer]]


def size(quantizer: str, bits: int) -> dict[str, Any]:
  """Returns the config overrides for a codebook of about 2^bits codes."""
  if quantizer == 'fsq':
    levels = quantizers.recommended_levels(bits)
    return {'model.quantizer.fsq.levels': levels}
  if quantizer == 'lfq':
    return {'model.quantizer.lfq.num_bits': bits}
  section = 'simvq' if quantizer == 'simvq' else 'vq'
  return {f'model.quantizer.{section}.codebook_size': 2**bits}


def run_name(quantizer: str, bits: int, seed: int) -> str:
  """Returns the folder name of a run."""
  return f'{quantizer}_{bits}_bits_seed_{seed}'


def final_run(
    quantizer: str, bits: int, seed: int, data_dir: str
) -> dict[str, Any]:
  """Returns the config overrides of a run with the selected settings."""
  return {
      **BUDGET,
      'data.data_dir': data_dir,
      'seed': seed,
      **chosen(quantizer),
      **size(quantizer, bits),
  }


def tuning_runs(data_dir: str) -> dict[str, dict[str, Any]]:
  """Returns the config overrides of every tuning run, by name."""
  return {
      f'tuning_{quantizer}_{number}': {
          **TUNING_BUDGET,
          'data.data_dir': data_dir,
          **candidate,
          **size(quantizer, TUNING_BITS),
      }
      for quantizer, candidates in CANDIDATES.items()
      for number, candidate in enumerate(candidates.values())
  }
