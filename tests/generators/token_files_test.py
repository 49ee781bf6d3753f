"""Token files of a generator: opened, compared, selected."""

import dataclasses

import numpy as np
import pytest

from fsq_jax import tokenizer as tokenizers
from fsq_jax import tokens
from fsq_jax.generators import builder
from fsq_jax.generators import token_files
from fsq_jax.tokenizer import files as tokenizer_files


@pytest.fixture
def config(make_config):
  return make_config()


def test_files_are_opened_with_their_tokenizer(config, tokenizer):
  files = token_files.open_files(config)
  assert (len(files.train), len(files.eval)) == (40, 12)
  assert files.tokenizer.model_hash == tokenizer.model_hash
  expected = builder.TokenFormat(
      quantizer=tokenizer.spec, codebook_size=512, grid=(4, 4),
      label_names=('cat', 'dog', 'a/b c'), model_hash=tokenizer.model_hash,
  )
  assert files.format == expected
  assert builder.TokenFormat.from_json(expected._asdict()) == expected
  described = files.describe()
  assert described['train']['num_images'] == 40
  assert described['train']['sha256'] != described['eval']['sha256']


def test_files_need_no_tokenizer(config):
  config.tokens.tokenizer = ''
  assert token_files.open_files(config).tokenizer is None


@pytest.mark.parametrize(
    ('fields', 'line'),
    [
        ({'label_names': ('cat',)}, r"label_names: .* 'a/b c'\) -> \('cat',\)"),
        ({'model_hash': 'ab' * 32}, r'model_hash: .* -> .abababab'),
    ],
)
def test_splits_of_different_tokens_are_rejected(
    config, write_tokens, tmp_path, fields, line
):
  config.tokens.tokenizer = ''
  config.tokens.eval = str(write_tokens(tmp_path / 'eval', 3, **fields))
  with pytest.raises(ValueError, match=line):
    token_files.open_files(config)


@pytest.mark.parametrize('split', ['train', 'eval'])
def test_files_of_another_tokenizer_are_rejected(
    config, write_tokens, tmp_path, split
):
  folder = write_tokens(tmp_path / 'x', 3, model_hash='ab' * 32)
  config.tokens[split] = str(folder)
  with pytest.raises(ValueError, match=rf'^tokens\.{split}: .* hash abab'):
    token_files.open_files(config)


def test_the_tokenizer_is_the_one_that_made_the_files(config, other_tokenizer):
  config.tokens.tokenizer = str(other_tokenizer)
  with pytest.raises(ValueError, match=r'^tokens\.train: .* made by the model'):
    token_files.open_files(config)


@pytest.mark.parametrize('split', ['train', 'eval'])
def test_corrupted_files_are_rejected(config, write_tokens, tmp_path, split):
  folder = write_tokens(tmp_path / 'x', 3)
  (path,) = folder.glob('tokens*')
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  config.tokens[split] = str(folder)
  with pytest.raises(ValueError, match=rf'^tokens\.{split}: .* cannot be used'):
    token_files.open_files(config)


def test_a_missing_tokenizer_is_named(config, tmp_path):
  config.tokens.tokenizer = str(tmp_path / 'none')
  with pytest.raises(ValueError, match=r'^tokens\.tokenizer: .* not a folder'):
    token_files.open_files(config)


def test_a_saved_tokenizer_does_not_find_its_images(
    config, tokenizer, tmp_path
):
  own = tokenizer.config.copy_and_resolve_references()
  own.data.source, own.data.data_dir = 'folder', str(tmp_path)
  saved = tokenizer_files.SavedModel(
      own, tokenizer.model, tokenizer.variables,
      tokenizer_files.Metadata(step=8),
  )
  folder = tokenizers.Tokenizer(saved, tokenizer.mesh).save_pretrained(
      tmp_path / 'saved'
  )
  config.tokens.tokenizer, config.tokens.eval = str(folder), ''
  with pytest.raises(
      ValueError, match=r'^tokens\.eval: [^$]*set --config\.tokens\.eval to'
  ):
    token_files.open_files(config)


def test_classes_are_needed_for_class_conditioning(
    config, write_tokens, tmp_path
):
  folder = str(write_tokens(tmp_path / 'x', 3, label_names=()))
  config.tokens.train = config.tokens.eval = folder
  form = token_files.open_files(config).format
  with pytest.raises(ValueError, match='files have no classes'):
    builder.build_model(config, form)
  config.model.class_conditional = False
  assert builder.build_model(config, form).num_classes == 0


def test_tokens_are_read_in_raster_order(config):
  source = tokens.TokenSource(config.tokens.train)
  arrays = token_files.read(source, [5, 2])
  assert arrays.tokens.dtype == arrays.labels.dtype == np.int32
  np.testing.assert_array_equal(arrays.tokens[0], source[5].tokens.ravel())
  np.testing.assert_array_equal(arrays.labels, [2, 2])


@pytest.mark.parametrize(
    ('num_images', 'limit', 'expected'),
    [
        (3, 0, [0, 1, 2]),
        (3, 3, [0, 1, 2]),
        (3, 9, [0, 1, 2]),
        (10, 5, [0, 2, 4, 6, 8]),
        (10, 3, [0, 3, 6]),
        (4, 1, [0]),
    ],
)
def test_images_are_selected_at_regular_intervals(num_images, limit, expected):
  chosen = token_files.select(num_images, limit)
  np.testing.assert_array_equal(chosen, expected)


def test_formats_are_compared_by_field(config):
  form = token_files.open_files(config).format
  saved = form._asdict()
  token_files.check_same(saved, form)
  with pytest.raises(ValueError, match=r'grid: \(4, 4\) -> \(2, 8\)'):
    token_files.check_same(saved, form._replace(grid=(2, 8)))
  with pytest.raises(ValueError, match='has the fields'):
    builder.TokenFormat.from_json({'grid': [4, 4]})


def test_several_sizes_or_indices_are_rejected(config):
  manifest = tokens.TokenSource(config.tokens.train).manifest
  with pytest.raises(ValueError, match='grids of several sizes'):
    builder.TokenFormat.from_manifest(dataclasses.replace(manifest, grid=None))
