"""Image files by path: found at any depth, read, unreadable ones named."""

import numpy as np
from PIL import Image
import pytest

from fsq_jax.data import image_files


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / 'images'
  (folder / 'sub').mkdir(parents=True)
  for i, name in enumerate(('b.png', 'sub/a.jpg', 'sub/c.png')):
    Image.new('RGB', (3 + i, 2), (10, 20, 30)).save(folder / name)
  (folder / 'notes.txt').write_text('no image')
  return folder


def test_a_folder_has_its_images_at_any_depth(folder, tmp_path, monkeypatch):
  names = ['b.png', 'sub/a.jpg', 'sub/c.png']
  found = image_files.find_images(folder)
  assert found == {name: folder / name for name in names}
  link = tmp_path / 'link'
  link.symlink_to(folder, target_is_directory=True)
  assert list(image_files.find_images(link)) == names
  monkeypatch.chdir(folder)
  assert list(image_files.find_images('.')) == names
  assert image_files.find_images('sub/a.jpg') == {
      'a.jpg': folder / 'sub' / 'a.jpg'
  }


def test_missing_images_are_named(folder, tmp_path):
  with pytest.raises(ValueError, match='none is neither an image file nor'):
    image_files.find_images(tmp_path / 'none')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match=r'empty holds no images; known.*\.png'):
    image_files.find_images(tmp_path / 'empty')
  (tmp_path / 'empty' / 'a.heic').touch()
  with pytest.raises(ValueError, match=r'no images; .* Skipped: 1 \.heic\.'):
    image_files.find_images(tmp_path / 'empty')
  with pytest.raises(ValueError, match='none cannot be read: No such file'):
    image_files.read_image(tmp_path / 'none')


def test_images_are_read_as_rgb(folder):
  image = image_files.read_image(folder / 'b.png')
  np.testing.assert_array_equal(image, np.full((2, 3, 3), (10, 20, 30)))
  assert image.dtype == np.uint8


def test_skipped_files_are_counted(folder, caplog):
  for name in ('x.heic', 'sub/y.HEIC', 'z.tga'):
    (folder / name).touch()
  assert len(image_files.find_images(folder)) == 3
  assert f'{folder}: skipped 2 .heic, 1 .tga, 1 .txt.' in caplog.text


def _cut(path):
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])


def test_every_unreadable_image_is_named(folder, caplog):
  paths = image_files.find_images(folder)
  assert image_files.find_unreadable(paths) == {}
  for name in ('b.png', 'sub/c.png'):
    _cut(folder / name)
  problems = image_files.find_unreadable(paths)
  assert list(problems) == ['b.png', 'sub/c.png']
  for name, problem in problems.items():
    assert f'{folder / name} cannot be read: ' in problem
    assert f'Skipped. {problem}' in caplog.text
  _cut(folder / 'sub' / 'a.jpg')
  with pytest.raises(ValueError, match='None of 3 images can be') as error:
    image_files.find_unreadable(paths)
  for path in paths.values():
    assert str(path) in str(error.value)
