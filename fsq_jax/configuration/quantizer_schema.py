"""What the fields of quantizers may hold in a config."""

from collections.abc import Mapping

from fsq_jax.configuration import rules

_LEVELS = rules.tuple_of(
    'a tuple of integers >= 2, one for each dimension',
    rules.integer(2),
    rules.ANY_LENGTH,
)
_FSQ = {
    'levels': _LEVELS,
    'convention': rules.name('symmetric', 'paper', 'vqp', 'preserve_symmetry'),
    'bound': rules.name('tanh', 'ifsq', 'clip'),
    'eps': rules.optional(rules.number('', lambda x: True)),
    'commitment_weight': rules.optional(rules.NOT_NEGATIVE),
    'bins': rules.name('rounded', 'equal'),
    'noise': rules.NOT_NEGATIVE,
    'noise_per': rules.name('element', 'example'),
}
_LFQ = {
    'num_bits': rules.integer(1, 30),
    'bit_order': rules.name('msb_first', 'lsb_first'),
    'commitment_weight': rules.NOT_NEGATIVE,
    'entropy_weight': rules.NOT_NEGATIVE,
    'diversity_weight': rules.NOT_NEGATIVE,
    'temperature': rules.POSITIVE,
    'entropy_group_bits': rules.integer(1, 16),
}
_CODEBOOK = {
    # Usage and perplexity of a single code say nothing.
    'codebook_size': rules.integer(2),
    'code_dim': rules.COUNT,
    'metric': rules.name('euclidean', 'cosine'),
    'gradient': rules.name('straight_through', 'rotation'),
    'commitment_weight': rules.NOT_NEGATIVE,
}
# Of each quantizer, its fields.
FIELDS: Mapping[str, Mapping[str, rules.Rule]] = {
    'fsq': _FSQ,
    'grouped_fsq': {**_FSQ, 'num_groups': rules.COUNT},
    'residual_fsq': {
        'levels': _LEVELS,
        'num_stages': rules.COUNT,
        'stage_dropout': rules.SHARE,
    },
    'lfq': _LFQ,
    'bsq': _LFQ,
    'vq': {
        **_CODEBOOK,
        'codebook_update': rules.name('ema', 'gradient'),
        'decay': rules.DECAY,
        'codebook_init': rules.name('normal', 'kmeans'),
        'restart': rules.name('none', 'batch', 'split'),
        'dead_share': rules.DECAY,
        'entropy_weight': rules.NOT_NEGATIVE,
    },
    'simvq': {
        **_CODEBOOK,
        'weighting': rules.name('standard', 'legacy'),
        'input_projection': rules.name('none', 'linear'),
    },
    'none': {'code_dim': rules.COUNT},
}
# Quantizers whose codes have no levels.
WITHOUT_LEVELS = ('none', 'simvq', 'vq')
