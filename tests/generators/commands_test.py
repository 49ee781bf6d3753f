"""Commands on runs of generators, by launch.py: generate, eval, report."""

import collections
import json
import shutil
import zipfile

from absl.testing import flagsaver
import numpy as np
from PIL import Image
import pytest

from fsq_jax.generators import commands
from fsq_jax.generators import generation
from fsq_jax.generators import generator as generators
from fsq_jax.generators import saved_generator
from fsq_jax.runtime import preemption
from fsq_jax.workdir import files as workdirs
import launch

# The first test makes the run that all use.
pytestmark = pytest.mark.fast_limit(15)


@pytest.fixture
def run(untrained_run, capsys, monkeypatch):
  """Runs launch.main on a run; returns exit code, output and errors."""
  monkeypatch.setattr('fsq_jax.runtime.host.keep_freed_memory', lambda: None)

  def run(*args, kind='masked', workdir=None):
    workdir = workdir or untrained_run(kind)
    with flagsaver.flagsaver():
      args = launch.parse_flags(['launch.py', f'--workdir={workdir}', *args])
      code = launch.main(args)
    return code, *capsys.readouterr()

  return run


@pytest.fixture
def nothing_is_sampled(monkeypatch):
  """Makes the restoring of a model, which precedes all work, an error."""

  def restore(*args):
    raise AssertionError('The model was restored.')

  monkeypatch.setattr(saved_generator, 'restore', restore)


def _copy(untrained_run, tmp_path, kind='masked'):
  folder = tmp_path / 'copy'
  shutil.copytree(untrained_run(kind), folder)
  return folder


def _files(folder):
  return {
      str(x.relative_to(folder)): x.read_bytes()
      for x in folder.rglob('*')
      if x.is_file() and x.name != workdirs.LOCK
  }


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['masked', 'autoregressive'])
def test_images_are_written_to_folders_and_files(
    run, untrained_run, tmp_path, kind
):
  folder, file = tmp_path / 'images', tmp_path / 'samples.npz'
  code, out, _ = run(
      '--mode=generate', f'--images={folder}', f'--npz={file}',
      '--config.sample.num_images=11', '--config.sample.classes=(2,0,-1)',
      '--config.sample.temperature=0.5', kind=kind,
  )
  assert code == 0
  record = file.with_suffix('.json')
  assert out.split() == [str(x) for x in (folder, file, record)]
  assert sorted(x.name for x in folder.iterdir()) == [
      'contact_sheets', 'images', 'samples.json',
  ]
  classes = ['0000_cat', '0002_a_b_c', 'unconditional']
  assert sorted(x.name for x in (folder / 'images').iterdir()) == classes
  sheets = folder / 'contact_sheets'
  assert sorted(x.stem for x in sheets.glob('*.png')) == classes
  # Partial results of an interrupted command are gone.
  assert {x.name for x in tmp_path.iterdir()} == {
      'images', 'samples.npz', 'samples.json',
  }
  content = json.loads(record.read_text())
  assert content == json.loads((folder / 'samples.json').read_text())
  assert (content['step'], content['num_images']) == (4, 11)
  assert content['classes'] == [2, 0, -1]
  assert content['sampler']['draw']['temperature'] == 0.5

  # By number and class, they are those of Python.
  paths = sorted(folder.glob('images/*/*.png'), key=lambda x: x.name)
  assert [x.name for x in paths] == [f'{i:06}.png' for i in range(11)]
  labels = [
      {'0000_cat': 0, '0002_a_b_c': 2, 'unconditional': -1}[x.parent.name]
      for x in paths
  ]
  assert sorted(collections.Counter(labels).values()) == [3, 4, 4]
  images = np.stack([np.asarray(Image.open(x)) for x in paths])
  generator = generators.Generator.from_workdir(untrained_run(kind))
  expected = generator.sample(labels, temperature=0.5)
  np.testing.assert_array_equal(images, expected.images)

  # The same images in another order.
  with np.load(file) as arrays:
    shuffled = list(zip(arrays['arr_0'], arrays['labels'], strict=True))
    assert arrays['arr_0'].shape == (11, 16, 16, 3)
    assert arrays['arr_0'].dtype == np.uint8
  pairs = [(x.tobytes(), int(label)) for x, label in shuffled]
  ordered = [(x.tobytes(), y) for x, y in zip(images, labels, strict=True)]
  assert sorted(pairs) == sorted(ordered)
  assert pairs != ordered
  assert zipfile.ZipFile(file).testzip() is None

  # The first images of fewer.
  folder = tmp_path / 'again'
  sampled = run(
      '--mode=generate', f'--images={folder}', '--checkpoint=best',
      '--config.sample.num_images=1', kind=kind,
  )
  assert sampled[0] == 0
  assert json.loads((folder / 'samples.json').read_text())['step'] == 2


@pytest.mark.slow
def test_an_interrupted_command_resumes(run, tmp_path, monkeypatch):
  def generate(name, *arguments):
    return run(
        '--mode=generate', f'--images={tmp_path / name}/images',
        f'--npz={tmp_path / name}/samples.npz', '--config.sample.num_images=11',
        '--config.sample.batch_size=4', *arguments,
    )

  assert generate('whole')[0] == 0
  answers = iter([False, False, True])
  with monkeypatch.context() as patch:
    patch.setattr(
        preemption.StopRequest, 'is_due', lambda self: next(answers)
    )
    code, _, errors = generate('stopped')
  assert code == 75
  assert 'Run the same command again' in errors
  folder = tmp_path / 'stopped' / 'images'
  pngs = {x: x.stat().st_mtime_ns for x in folder.rglob('*.png')}
  assert len(pngs) == 8
  for field, value, changed in (
      # The order of classes decides the labels of the images.
      ('temperature', '0.5', 'sampler'), ('classes', '(2,1,0)', 'classes'),
  ):
    code, _, errors = generate('stopped', f'--config.sample.{field}={value}')
    assert code == 2
    assert '8 images of an interrupted command with other' in errors
    assert f'settings ({changed})' in errors

  code, _, errors = generate('stopped')
  assert code == 0, errors
  assert {x: x.stat().st_mtime_ns for x in pngs} == pngs
  expected, found = (_files(tmp_path / x) for x in ('whole', 'stopped'))
  for files in (expected, found):
    for record in ('images/samples.json', 'samples.json'):
      del files[record]  # The command and its time.
  assert found == expected
  # A complete set is kept.
  code, _, errors = generate('stopped')
  assert code == 2
  assert 'is not empty' in errors


def test_labels_are_balanced_over_the_classes(make_config):
  config = make_config()
  config.sample.num_images = 100
  counts = collections.Counter(generation.choose_labels(config, 3).tolist())
  assert sorted(counts) == [0, 1, 2]
  assert sorted(counts.values()) == [33, 33, 34]
  config.sample.classes = (1,)
  assert set(generation.choose_labels(config, 3).tolist()) == {1}
  config.sample.classes = ()
  assert set(generation.choose_labels(config, 0).tolist()) == {-1}
  for classes, num_classes in (((3,), 3), ((0,), 0)):
    config.sample.classes = classes
    with pytest.raises(ValueError, match=r'^sample\.classes: labels contain'):
      generation.choose_labels(config, num_classes)


@pytest.mark.slow
def test_outputs_are_named(run):
  code, _, errors = run('--mode=generate')
  assert code == 2
  assert 'Give --images=FOLDER, --npz=FILE, or both' in errors


@pytest.mark.usefixtures('nothing_is_sampled')
@pytest.mark.parametrize(
    ('existing', 'argument', 'message'),
    [
        ('images/a.png', '--images={}/images', 'images is not empty'),
        ('images', '--images={}/images', r'images is not a folder|file'),
        ('x.npz', '--npz={}/x.npz', 'x.npz exists'),
        ('x.json', '--npz={}/x.npz', 'x.json exists'),
        ('other', '--npz={}/x.npy', 'does not end in .npz'),
    ],
)
def test_existing_outputs_are_kept(run, tmp_path, existing, argument, message):
  path = tmp_path / existing
  path.parent.mkdir(exist_ok=True)
  path.write_text('kept')
  code, _, errors = run('--mode=generate', argument.format(tmp_path))
  assert code == 2
  assert [x for x in message.split('|') if x in errors]
  assert _files(tmp_path) == {existing: b'kept'}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--config.sample.classes=(0,3)'], 'sample.classes: labels contain 3'),
        (['--config.sample.num_steps=17'], 'sample: '),
        (['--config.tokens.tokenizer='], 'tokens.tokenizer'),
        (['--config.model.depth=2'], 'has another model than the checkpoint'),
        (['--checkpoint=3'], 'has no checkpoint 3'),
    ],
)
def test_wrong_settings_are_refused_before_sampling(
    run, tmp_path, arguments, message
):
  code, _, errors = run(
      '--mode=generate', f'--images={tmp_path}/x', *arguments
  )
  assert code == 2
  assert message in errors


@pytest.mark.parametrize('mode', ['generate', 'eval'])
def test_another_tokenizer_is_refused(run, tmp_path, other_tokenizer, mode):
  arguments = [f'--images={tmp_path}/x'] if mode == 'generate' else []
  code, _, errors = run(
      f'--mode={mode}', *arguments,
      f'--config.tokens.tokenizer={other_tokenizer}',
  )
  assert code == 2
  if mode == 'generate':
    assert 'model_hash: ' in errors
  else:
    assert 'were made by the model with hash' in errors


def test_evaluation_of_other_tokens_is_refused(
    run, tmp_path, write_tokens, other_tokenizer
):
  folder = write_tokens(tmp_path / 'x', 3, label_names=('cat',))
  code, _, errors = run(
      '--mode=eval', f'--config.tokens.train={folder}',
      f'--config.tokens.eval={folder}',
  )
  assert code == 2
  assert 'trained on other tokens' in errors
  assert 'label_names: ' in errors


def test_a_signal_while_token_files_are_made_can_be_made_up_for(
    run, monkeypatch
):
  def stop(config):
    raise preemption.Interrupted

  monkeypatch.setattr(commands.token_files, 'open_files', stop)
  code, _, errors = run('--mode=eval')
  assert code == 75
  assert 'Run the same command again' in errors


@pytest.mark.slow
def test_evaluations_are_the_same(run, untrained_run, tmp_path):
  folder = _copy(untrained_run, tmp_path)
  results = []
  for _ in range(2):
    code, out, errors = run('--mode=eval', workdir=folder)
    assert code == 0, errors
    results.append((
        out, (folder / workdirs.EVALUATION).read_bytes(),
        _files(folder / workdirs.SAMPLES),
    ))
  assert results[0] == results[1]
  content = json.loads(results[0][1])
  assert content['step'] == 4
  assert f'bits_per_token: {content["metrics"]["bits_per_token"]:.6g}' in out
  assert set(results[0][2]) == {
      f'step_00000004{x}.png' for x in ('', '_inpainting', '_nearest')
  }
  # Another checkpoint leaves all that as it is.
  code, _, errors = run('--mode=eval', '--checkpoint=best', workdir=folder)
  assert code == 0, errors
  assert (folder / workdirs.EVALUATION).read_bytes() == results[0][1]
  (other,) = folder.glob('evaluation_*.json')
  assert json.loads(other.read_text())['step'] == 2
  assert '00000002' in other.name
  # To another folder.
  output = tmp_path / 'output'
  code, _, errors = run('--mode=eval', f'--output={output}', workdir=folder)
  assert code == 0, errors
  assert {x.name for x in output.iterdir()} == {
      'evaluation.json', 'report.html', 'samples',
  }


def test_the_report_is_written_again(run, untrained_run, tmp_path):
  folder = _copy(untrained_run, tmp_path)
  workdirs.write_json(
      folder / workdirs.EVALUATION,
      {'step': 4, 'metrics': {'bits_per_token': 7.654, 'bits_per_image': 122}},
  )
  code, out, errors = run('--mode=report', workdir=folder)
  assert code == 0, errors
  assert out.strip() == str(folder / workdirs.REPORT)
  assert '7.65' in (folder / workdirs.REPORT).read_text()
  code, out, _ = run(
      '--mode=report', f'--output={tmp_path}/x', workdir=folder
  )
  assert code == 0
  assert (tmp_path / 'x' / workdirs.REPORT).is_file()


@pytest.mark.parametrize('mode', ['tokenize', 'export', 'detokenize'])
def test_modes_of_tokenizers_are_refused(run, mode):
  code, _, errors = run(f'--mode={mode}')
  assert code == 2
  assert 'allowed: train, eval, report, generate' in errors


def test_runs_of_tokenizers_are_refused(run, make_config, tmp_path):
  run_of_a_tokenizer = make_config().tokens.tokenizer
  code, _, errors = run(
      '--mode=generate', f'--images={tmp_path}/x', workdir=run_of_a_tokenizer
  )
  assert code == 2
  assert 'for runs of generators' in errors
