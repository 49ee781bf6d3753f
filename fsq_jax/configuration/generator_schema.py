"""The schema of generator configs: allowed values and role of every field.

See configs/default_generator.py. Rows have the type of a field; constructors
(`generators.builder`) check ranges.
"""

from fsq_jax.configuration import rules
from fsq_jax.configuration import schema
from fsq_jax.workdir import urls

_Role = schema.Role
_FOLDER = rules.path(rules.TEXT.allowed, stores=urls.STORES)
_TOKENS = {
    'tokenizer': schema.runtime(
        rules.path(
            "the workdir of a tokenizer's run, or a folder of"
            " Tokenizer.save_pretrained; '' for token files without one",
            stores=urls.STORES,
        )
    ),
    'checkpoint': schema.runtime(
        rules.Rule(
            "'newest', 'best' or a step number, as a string",
            lambda x: x in ('newest', 'best')
            or (isinstance(x, str) and x.isdecimal()),
        )
    ),
    # A resumed run compares the content of token files, not their paths.
    'train': schema.runtime(_FOLDER),
    'eval': schema.runtime(_FOLDER),
    'train_views': schema.runtime(rules.COUNT),
    'batch_size': rules.COUNT,
    'eval_batch_size': schema.runtime(rules.COUNT),
}
_MODEL = {
    'kind': rules.name('masked', 'autoregressive'),
    'class_conditional': rules.BOOL,
    'preset': rules.TEXT,
    'depth': rules.COUNT_OR_ZERO,
    'width': rules.COUNT_OR_ZERO,
    'num_heads': rules.COUNT_OR_ZERO,
    'mlp_dim': rules.COUNT_OR_ZERO,
    'mlp': rules.TEXT,
    'norm': rules.TEXT,
    'use_bias': rules.BOOL,
    'qk_norm': rules.BOOL,
    'positions': rules.TEXT,
    'conditioning': rules.TEXT,
    'embedding': rules.TEXT,
    'head': rules.TEXT,
    'dropout': schema.training(rules.NUMBER),
    'dtype': schema.training(rules.DTYPE),
    'remat': schema.REMAT,
    'scan_unroll': schema.training(rules.COUNT),
}
_LOSSES = {
    'class_dropout': rules.NUMBER,
    'label_smoothing': rules.NUMBER,
    'mask_schedule': rules.TEXT,
    'mask_floor': rules.NUMBER,
    'normalization': rules.TEXT,
}
_NETWORKS = ('inception', 'inception_tf1', 'vgg16')
_EVAL = {
    'num_images': rules.COUNT_OR_ZERO,
    'num_draws': rules.COUNT,
    'num_samples': rules.COUNT_OR_ZERO,
    'reference': rules.name('decoded', 'original'),
    'samples_per_class': rules.COUNT,
    **{f'networks.{name}': rules.PATH for name in _NETWORKS},
}
_SAMPLE = {
    'num_images': rules.COUNT,
    'classes': rules.tuple_of(
        'a tuple of class numbers, integers >= -1; () for all classes',
        rules.integer(-1),
    ),
    'batch_size': rules.COUNT,
    'num_steps': rules.COUNT,
    'mask_schedule': rules.TEXT,
    'order': rules.TEXT,
    'choice_temperature': rules.NUMBER,
    'temperature': rules.NUMBER,
    'top_k': rules.COUNT_OR_ZERO,
    'top_p': rules.NUMBER,
    'guidance.scale': rules.NUMBER,
    'guidance.schedule': rules.TEXT,
    'guidance.power': rules.NUMBER,
}
# Every field of configs/default_generator.py.
FIELDS: dict[str, schema.Field] = {
    'seed': schema.FIELDS['seed'],
    **schema.section('tokens', _Role.TRAINING, _TOKENS),
    **schema.section('model', _Role.MODEL, _MODEL),
    **schema.section('losses', _Role.TRAINING, _LOSSES),
    **schema.section('optim', _Role.TRAINING, schema.OPTIM),
    **schema.section('partitioning', _Role.RUNTIME, schema.PARTITIONING),
    **schema.section('train', _Role.TRAINING, schema.TRAIN),
    **schema.section('eval', _Role.RUNTIME, _EVAL),
    **schema.section('sample', _Role.RUNTIME, _SAMPLE),
}
