"""Fixtures of the tests of generators."""

import contextlib
import functools
import pathlib

import jax
import numpy as np
import pytest

from fsq_jax import checkpoints
from fsq_jax import configuration
from fsq_jax import tokenizer as tokenizers
from fsq_jax import tokens
from fsq_jax.generators import builder
from fsq_jax.generators import token_files
from fsq_jax.generators import training
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import files as tokenizer_files
from fsq_jax.tokens import source as sources
from fsq_jax.tokens import writer as writers
from fsq_jax.train import optim
from fsq_jax.train import run_record

_ROOT = pathlib.Path(__file__).parents[2]
# A tokenizer with grids of 4 x 4 tokens and the levels (8, 8, 8).
_TOKENIZER = _ROOT / 'tests' / 'testdata' / 'run'
_LABEL_NAMES = ('cat', 'dog', 'a/b c')


@pytest.fixture(scope='session')
def draw_variables():
  """Returns random variables of a module, none at its initial value.

  Nothing is compiled. Arguments: the module, then the arguments of init.
  """

  def draw(module, *inputs, scale=0.4):
    rng = np.random.default_rng(1)

    def draw_array(path, x):
      around = 1.0 if path[-1].key == 'scale' else 0.0
      return np.asarray(around + rng.uniform(-scale, scale, x.shape), x.dtype)

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree_util.tree_map_with_path(draw_array, shapes)

  return draw


@pytest.fixture(scope='session')
def tokenizer():
  """The trained tokenizer in tests/testdata."""
  return tokenizers.Tokenizer.from_workdir(_TOKENIZER, batch_size=8)


@pytest.fixture(scope='session')
def other_tokenizer(tokenizer, tmp_path_factory):
  """A folder of the same tokenizer with other weights."""
  saved = tokenizer_files.SavedModel(
      tokenizer.config,
      tokenizer.model,
      jax.tree.map(
          lambda x: jax.device_put(np.asarray(x) + np.float32(1), x.sharding),
          tokenizer.variables,
      ),
      tokenizer_files.Metadata(step=8),
  )
  other = tokenizers.Tokenizer(saved, tokenizer.mesh)
  return other.save_pretrained(tmp_path_factory.mktemp('other') / 'tokenizer')


@pytest.fixture(scope='session')
def write_tokens(tokenizer):
  """Writes token files of random tokens that depend on the class.

  Arguments: the folder, the number of images, the seed, and fields of the job.
  """

  def write(folder, num_images, seed=0, **fields):
    job = tokens.Job(**{
        'storage': 'npz',
        'quantizer': tokenizer.spec,
        'codebook_size': 512,
        'index_shape': (),
        'model_hash': tokenizer.model_hash,
        'fit': 'crop',
        'image_size': (16, 16),
        'batch_size': 8,
        'images_per_shard': num_images,
        'source': {'source': 'synthetic', 'num_examples': num_images},
        'label_names': _LABEL_NAMES,
        **fields,
    })
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % max(len(job.label_names), 1)
    grids = rng.integers(0, 40, (num_images, 4, 4))
    grids += 100 * labels[:, None, None]
    if not job.label_names:
      labels = np.full(num_images, -1)
    examples = [
        tokens.Example(
            grid.astype(np.int32), f'{seed}/{i}', int(label), (16, 16), (16, 16)
        )
        for i, (grid, label) in enumerate(zip(grids, labels, strict=True))
    ]
    writer = writers.TokenWriter(folder, job)
    writer.write(0, examples, damaged=[], source_bytes=None)
    writer.finish()
    return folder

  return write


@pytest.fixture(scope='session')
def make_config(write_tokens, tmp_path_factory):
  """Returns a config of a tiny generator on written token files, by kind."""
  root = tmp_path_factory.mktemp('tokens')
  folders = {
      split: write_tokens(root / split, num, seed)
      for split, num, seed in (('train', 40, 0), ('eval', 12, 1))
  }

  def make(kind='masked'):
    config = configuration.load_config(_ROOT / 'configs/default_generator.py')
    config.tokens.tokenizer = str(_TOKENIZER)
    config.tokens.train = str(folders['train'])
    config.tokens.eval = str(folders['eval'])
    config.tokens.batch_size = config.tokens.eval_batch_size = 8
    config.model.kind = kind
    config.model.depth, config.model.width = 1, 8
    config.model.num_heads, config.model.mlp_dim = 2, 12
    config.optim.learning_rate = 1e-2
    config.optim.warmup_steps = 0
    config.train.num_steps = 6
    config.train.log_every_steps = 1
    config.train.checkpoint_every_steps = 2
    config.train.eval_every_steps = 3
    config.train.keep_checkpoints = 3
    config.eval.num_draws = 2
    config.eval.num_samples = 8
    config.eval.samples_per_class = 2
    config.sample.batch_size = 8
    config.sample.num_images = 8
    config.sample.num_steps = 3
    return config

  return make


@pytest.fixture(scope='session')
def untrained_run(make_config, draw_variables, tmp_path_factory):
  """Folder of a run with random parameters, by kind; nothing is compiled.

  Step 2 is the best one, step 4 the newest.
  """

  @functools.cache
  def write(kind):
    folder = tmp_path_factory.mktemp(kind) / 'run'
    config = configuration.resolve(make_config(kind))
    files = token_files.open_files(config)
    model = builder.build_model(config, files.format)
    mesh = partitioning.create_mesh(config.partitioning.mesh)
    optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
    abstract = training.build_state_builder(
        config, model, optimizer, mesh
    ).abstract
    record = run_record.RunRecord(
        config,
        {
            'quantizer': dict(files.format.quantizer),
            'tokens': files.format._asdict(),
        },
        lambda saved: None,
        sources.build_dataset(files.train, batch_size=8, seed=0),
    )
    arrays = np.zeros((1, 16), np.int32), np.zeros(1, np.int32)
    known = None if kind == 'autoregressive' else np.zeros((1, 16), bool)
    with contextlib.closing(checkpoints.Checkpointer(folder, keep=2)) as saver:
      for step, scale, bits in ((2, 0.2, 8.0), (4, 0.4, 9.0)):
        params = draw_variables(model, *arrays, known, scale=scale)['params']
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
        state = state.replace(step=np.int32(step), ema_params=params)
        saver.save(
            step,
            jax.tree.map(
                lambda x, y: jax.device_put(x, y.sharding), state, abstract
            ),
            record.current(),
            {'bits_per_token': bits},
        )
      saver.wait()
    record.write(folder, state, mesh, 0.0)
    return folder

  return write
