"""Tests of URLs given as paths: rejected by scheme, never a local folder."""

import pathlib
import re
import sys

from etils import epath
import pytest

from fsq_jax import configuration
from fsq_jax import tokens
from fsq_jax.analysis import reconstruction
from fsq_jax.checkpoints import saved_model
from fsq_jax.evaluation import image_arrays
from fsq_jax.evaluation import saved_run
from fsq_jax.report import report
from fsq_jax.tokenizer import export
from fsq_jax.tokenizer import files as tokenizer_files
from fsq_jax.tokenizer import tokenizer
from fsq_jax.tokens import tokenization
from fsq_jax.workdir import files
from fsq_jax.workdir import metric_log
from fsq_jax.workdir import urls

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ('path', 'scheme'),
    [
        ('gs://bucket/x', 'gs'),
        ('S3://bucket', 's3'),
        ('https://host/x', 'https'),
        (pathlib.Path('gs://bucket/x'), 'gs'),
        ('/tmp/gs://bucket', None),
        ('./gs:/bucket', None),
        ('a:/b', None),  # A folder a: of one letter, or a drive.
        ('gs:/bucket', 'gs'),  # str() of a pathlib.Path.
        ('s3n:/bucket', 's3n'),
        ('oss:/bucket', 'oss'),
        ('dbfs:/folder', 'dbfs'),
        ('gsx:/bucket', None),
        ('runs/x', None),
        ('~/x', None),
        ('', None),
    ],
)
def test_schemes_are_found(path, scheme):
  assert urls.find_scheme(path) == scheme


def test_a_url_of_gcs_is_written_gs():
  for url in ('gcs://b/gcs', 'GCS:/b/gcs'):
    assert urls.explain(url, 'x', urls.STORES).endswith(' Write gs://b/gcs.')
  assert 'Mount the bucket' in urls.explain('gcs://b/x', 'x')


def test_local_paths_stay_as_they_are(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert urls.local_path('a/../b', 'x') == pathlib.Path('a/../b')
  assert urls.local_path('~/b', 'x') == tmp_path / 'b'


# Functions whose argument may be the folder of a run or of token files.
_TAKE_RUNS = {
    'read_metrics': metric_log.read_metrics,
    'find_run': saved_model.find_run,
    'load_tokenizer': lambda x: tokenizer.load_tokenizer(x, 'newest'),
    'write_report': report.write_report,
    'find': tokenizer_files.find,
    'export': lambda x: export.export_workdir(None, 'run', x),
    'export to the workdir': lambda x: export.export_workdir(None, x),
    'TokenSource': tokens.TokenSource,
    'tokenize': lambda x: tokenization.tokenize_workdir(_config('debug'), x),
    'is_complete': tokenization.is_complete,
}
_TAKE_PATHS = {
    'create': files.create,
    'reconstruct': lambda x: tokenizer.Tokenizer.reconstruct(None, x),
    'reconstruct_files': lambda x: reconstruction.reconstruct_files(
        'run', x, 'out'
    ),
    'ImageArrays': image_arrays.ImageArrays,
    'from_maskgit': lambda x: tokenizer.Tokenizer.from_maskgit(
        x, _config('imagenet256_vq_1024')
    ),
    'new_folder': lambda x: saved_run.new_folder(x, '--images'),
}


@pytest.mark.parametrize('as_path', [str, pathlib.Path, epath.Path])
@pytest.mark.parametrize(
    ('name', 'scheme'),
    [
        *((name, scheme) for name in _TAKE_PATHS for scheme in ('gs', 's3')),
        *((name, 's3') for name in _TAKE_RUNS),
    ],
)
def test_functions_reject_urls(name, as_path, scheme, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  use = {**_TAKE_PATHS, **_TAKE_RUNS}[name]
  with pytest.raises(ValueError, match=f'URLs of {scheme}:// are not supp'):
    use(as_path(f'{scheme}://bucket/x'))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', _TAKE_RUNS)
def test_missing_packages_are_named(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, 'gcsfs', None)  # An import raises.
  with pytest.raises(ValueError, match='pip install gcsfs google-cloud-st'):
    _TAKE_RUNS[name]('gs://bucket/x')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('url', ['s3://bucket/x', 's3:/bucket/x'])
def test_no_file_of_another_store_is_written(url, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with (
      pytest.raises(ValueError, match='URLs of s3:// are not supported'),
      files.open_atomic(url),
  ):
    pass
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'url',
    [
        'gs://bucket/x', 'GS://bucket/x/', 'gs:/bucket/x',
        pathlib.Path('gs://bucket/x'),
    ],
)
def test_urls_are_normalized(url):
  assert urls.normalize(url) == 'gs://bucket/x'


def _config(name):
  return configuration.load_config(_ROOT / 'configs' / f'{name}.py')


@pytest.mark.parametrize(
    ('name', 'field'),
    [
        *(('debug', x) for x in configuration.PATHS),
        ('digits_maskgit', 'tokens.train'),
        ('digits_maskgit', 'tokens.tokenizer'),
    ],
)
def test_fields_reject_urls(name, field):
  config = _config(name)
  config.update_from_flattened_dict({field: 's3://bucket/x'})
  config = configuration.resolve_paths(config)
  pattern = re.escape(f'{field} is s3://bucket/x: URLs of s3:// are not supp')
  with pytest.raises(ValueError, match=pattern):
    configuration.check_config(config)


def test_compilation_cache_rejects_urls():
  config = _config('debug')
  config.train.compilation_cache = 'gs://bucket/x'
  with pytest.raises(ValueError, match='allowed: a local folder, not a URL'):
    configuration.check_config(config)
