"""Evaluated images as files, read by the rules of other FID implementations."""

import os
import pathlib
import zipfile

from absl.testing import flagsaver
import numpy as np
from PIL import Image
import pytest

from fsq_jax import configuration
from fsq_jax.evaluation import image_arrays
from fsq_jax.evaluation import results
from fsq_jax.evaluation import saved_run
import launch

_ROOT = pathlib.Path(__file__).parents[2]
# A trained run; its evaluation split has 256 images of 16 x 16 pixels.
_RUN = _ROOT / 'tests' / 'testdata' / 'run'
# pytorch-fid 0.3.0, fid_score.py.
_PYTORCH_FID = {
    'bmp', 'jpg', 'jpeg', 'pgm', 'png', 'ppm', 'tif', 'tiff', 'webp'
}


def _list_as_pytorch_fid(folder):
  """compute_statistics_of_path."""
  return sorted(
      file
      for extension in _PYTORCH_FID
      for file in pathlib.Path(folder).glob(f'*.{extension}')
  )


def _list_as_torch_fidelity(folder):
  """glob_samples_paths of torch-fidelity 0.3.0, without samples_find_deep."""
  files = [os.path.join(folder, x) for x in os.listdir(folder)]
  return sorted(
      pathlib.Path(x)
      for x in files
      if os.path.splitext(x)[1].lower() in ('.png', '.jpg', '.jpeg')
  )


def _load(path):
  """ImagePathDataset and ImagesPathDataset, without conversion to tensors."""
  return np.asarray(Image.open(path).convert('RGB'))


def _evaluate(tmp_path, *, npz=None, **fields):
  config = configuration.config_from_json((_RUN / 'config.json').read_text())
  config.update_from_flattened_dict(fields)
  return saved_run.evaluate_workdir(
      config, _RUN, output=tmp_path / 'evaluation', images=tmp_path / 'images',
      npz=npz,
  )


def _read_as_adm(path):
  """NpzArrayReader of guided-diffusion's evaluator.py, all rows."""
  with zipfile.ZipFile(path) as archive, archive.open('arr_0.npy') as member:
    assert np.lib.format.read_magic(member) == (1, 0)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    assert (dtype, fortran) == (np.uint8, False)
    return np.frombuffer(member.read(), dtype).reshape(shape)


@pytest.mark.fast_limit(10)
def test_files_are_the_images_that_were_measured(tmp_path):
  evaluation = _evaluate(tmp_path, npz=tmp_path / 'arrays' / 'x.npz')
  folders = [tmp_path / 'images' / x for x in ('originals', 'reconstructions')]
  images = []
  for folder in folders:
    files = _list_as_pytorch_fid(folder)
    assert files == _list_as_torch_fidelity(folder)
    assert len(files) == evaluation.protocol['num_images'] == 256
    assert [x.name for x in files[:2]] == ['00000000.png', '00000001.png']
    images.append(np.stack([_load(x) for x in files]))
    assert images[-1].shape == (256, 16, 16, 3)
    np.testing.assert_array_equal(
        _read_as_adm(tmp_path / 'arrays' / f'x_{folder.name}.npz'), images[-1]
    )
  assert len(list((tmp_path / 'arrays').iterdir())) == 2
  error = np.subtract(*images, dtype=np.float64) / 255
  mse = np.mean(error**2, axis=(1, 2, 3))
  assert evaluation.metrics['mse'] == pytest.approx(mse.mean(), rel=1e-5)
  assert evaluation.metrics['psnr'] == pytest.approx(
      np.mean(-10 * np.log10(mse)), rel=1e-5
  )
  # The grid of the evaluation shows some of them.
  rows = np.linspace(0, 256, len(evaluation.originals), endpoint=False)
  np.testing.assert_array_equal(
      images[0][rows.astype(int)], evaluation.originals
  )
  np.testing.assert_array_equal(
      images[1][rows.astype(int)], evaluation.reconstructions
  )


@pytest.mark.slow
def test_the_loaders_of_other_implementations_read_the_files(tmp_path):
  torch = pytest.importorskip('torch')
  fid_score = pytest.importorskip('pytorch_fid.fid_score')
  datasets = pytest.importorskip('torch_fidelity.datasets')
  utils = pytest.importorskip('torch_fidelity.utils')
  _evaluate(tmp_path, npz=tmp_path / 'x.npz')
  for kind in ('originals', 'reconstructions'):
    folder = tmp_path / 'images' / kind
    paths = utils.glob_samples_paths(
        str(folder), samples_find_deep=False, samples_find_ext='png',
        verbose=False,
    )
    expected = torch.from_numpy(np.load(tmp_path / f'x_{kind}.npz')['arr_0'])
    expected = expected.permute(0, 3, 1, 2)
    read = datasets.ImagesPathDataset(paths)
    assert torch.equal(torch.stack(list(read)), expected)
    files = _list_as_pytorch_fid(folder)
    read = fid_score.ImagePathDataset(
        files, transforms=lambda x: torch.from_numpy(np.array(x))
    )
    images = torch.stack([read[i] for i in range(len(read))])
    assert torch.equal(images.permute(0, 3, 1, 2), expected)


def test_arrays_have_the_order_of_the_data_set(tmp_path):
  arrays = image_arrays.ImageArrays(tmp_path / 'x.npz')
  images = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)
  # Two batches of two processes; an image is unreadable, another is padding.
  for index, mask in (
      ([0, 2, 1, 3], [1, 1, 1, 0]), ([4, 6, 5, 7], [1, 0, 1, 0]),
  ):
    batch = images[np.minimum(index, 5)]
    metadata = {'index': np.array(index), 'mask': np.array(mask, bool)}
    arrays.write(
        {'image': batch, **metadata}, results.EvalOutput({}, None, 255 - batch)
    )
  assert not list(tmp_path.iterdir())
  arrays.finish()
  kept = images[[0, 1, 2, 4, 5]]
  for kind, expected in (('originals', kept), ('reconstructions', 255 - kept)):
    found = _read_as_adm(tmp_path / f'x_{kind}.npz')
    np.testing.assert_array_equal(found, expected)


def test_outputs_are_checked_first(tmp_path):
  with pytest.raises(ValueError, match='use --mode=reconstruct for whole'):
    _evaluate(
        tmp_path,
        **{
            'eval.native_size': True,
            'data.source': 'folder',
            'data.data_dir': str(tmp_path),
        },
    )
  (tmp_path / 'images').mkdir()
  (tmp_path / 'images' / 'kept').touch()
  with pytest.raises(ValueError, match=r'--images=.*images is not empty'):
    _evaluate(tmp_path)
  (tmp_path / 'images' / 'kept').unlink()
  (tmp_path / 'x_originals.npz').touch()
  with pytest.raises(ValueError, match=r'x_originals\.npz exists; give'):
    _evaluate(tmp_path, npz=tmp_path / 'x.npz')
  with pytest.raises(ValueError, match=r'x does not end in \.npz'):
    _evaluate(tmp_path, npz=tmp_path / 'x')
  assert not list((tmp_path / 'evaluation').glob('*.json'))


@pytest.mark.parametrize('flag', ['images', 'npz'])
def test_generators_have_a_mode_of_their_own(flag, tmp_path, capsys):
  with flagsaver.flagsaver():
    code = launch.main(
        launch.parse_flags([
            'launch.py', '--mode=eval', f'--{flag}={tmp_path}',
            f'--config={_ROOT}/configs/digits_maskgit.py',
        ])
    )
  assert code == 2
  assert '--mode=generate writes images' in capsys.readouterr().err
