"""Grey and RGBA images through training, evaluation, tokenizer and tokens."""

import json
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import optax
from PIL import Image
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import tokens
from fsq_jax import train
from fsq_jax.adversarial import builder
from fsq_jax.analysis import reconstruction
from fsq_jax.data import pixel_formats
from fsq_jax.evaluation import native_evaluation
from fsq_jax.evaluation import pixel_pca
from fsq_jax.evaluation import sample_metrics
from fsq_jax.generators import token_files
from fsq_jax.models import native_size
from fsq_jax.models import variables as variables_lib
from fsq_jax.report import grid
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.tokenizer import export
from fsq_jax.tokenizer import files

_ROOT = pathlib.Path(__file__).parents[1]
_CONV = {
    'model.encoder.name': 'conv',
    'model.decoder.name': 'conv',
    'model.encoder.conv.filters': 32,
    'model.encoder.conv.channel_multipliers': (1, 1),
    'model.encoder.conv.num_res_blocks': 1,
}


def _config(channels, fields=()):
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.data.channels = channels
  config.update_from_flattened_dict(dict(fields))
  return config


def _images(num, channels, size=(16, 16)):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (num, *size, channels), np.uint8)


# Fast: parts of the path.


@pytest.mark.fast_variants('1-vit', '4-conv')
@pytest.mark.parametrize('fields', [{}, _CONV], ids=['vit', 'conv'])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_models_take_and_make_the_channels(channels, fields):
  config = _config(channels, fields)
  configuration.check_config(config)
  model = models.build_autoencoder(
      config.model, config.data.image_size, channels
  )
  assert model.channels == channels
  variables = variables_lib.abstract_variables(model, (16, 16))
  images = jax.ShapeDtypeStruct((2, 16, 16, channels), jnp.float32)
  output = jax.eval_shape(model.apply, variables, images)
  assert output.reconstructions.shape == images.shape


@pytest.mark.parametrize('name', ['patch', 'stylegan'])
@pytest.mark.parametrize('channels', [1, 4])
def test_discriminators_take_the_channels(channels, name):
  fields = {'discriminator.name': name, 'discriminator.stylegan.filters': 32}
  fields['discriminator.stylegan.multipliers'] = (1, 2)
  config = _config(channels, fields)
  configuration.check_config(config)
  built = builder.build_adversary(config, optax.identity())
  params = jax.eval_shape(built.init, jax.random.key(0)).params
  kernels = [x.shape for x in jax.tree.leaves(params) if x.ndim == 4]
  assert channels in {shape[2] for shape in kernels}


@pytest.mark.parametrize(
    ('fields', 'channels', 'message'),
    [
        ({'data.channels': 2}, 2, r'allowed: 1 \(grey\), 3 \(RGB\) or 4'),
        ({'data.channels': True}, True, r'allowed: 1 \(grey\)'),
        ({'data.color_jitter': 0.1}, 1, 'color_jitter is 0.1, data.channels'),
        ({'losses.perceptual.name': 'vit'}, 4, "'none', or with RGB images"),
        ({'eval.networks.rfid': 'x'}, 1, "networks.rfid is 'x', data.channels"),
        ({'discriminator.name': 'dino'}, 1, "'dino' only with RGB images"),
        (
            {
                'discriminator.name': 'patch',
                'discriminator.augment_probability': 0.5,
            },
            4, 'change alpha as a colour',
        ),
        ({'model.encoder.name': 'pretrained'}, 1, 'its images are RGB'),
        ({'model.decoder.name': 'mae'}, 4, 'its images are RGB'),
    ],
)  # fmt: skip
def test_options_that_need_rgb_are_rejected(fields, channels, message):
  config = _config(channels, fields)
  with pytest.raises(ValueError, match=message):
    configuration.check_config(config)


def test_configs_of_earlier_versions_have_three_channels():
  config = _config(3)
  values = json.loads(configuration.config_to_json(config))
  del values['data']['channels']
  restored = configuration.config_from_json(json.dumps(values))
  assert restored.data.channels == 3


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_pictures_have_the_channels_of_their_images(tmp_path, channels):
  images = _images(4, channels)
  images[..., 3:] = 255
  masked = np.zeros((4, 2, 2), bool)
  sheets = [
      grid.reconstruction_grid(images, images),
      grid.contact_sheet(images, np.array([0, 1, 1, -1]), ('a', 'b')),
      grid.inpainting_sheet(images, masked, images[:, None]),
      grid.nearest_sheet(images, images, np.zeros(4)),
      grid.side_by_side(images[0], images[1], captions=('a', 'b')),
  ]
  for sheet in sheets:
    assert sheet.shape[2] == channels
    # Text and background are opaque.
    assert sheet[..., 3:].min(initial=255) == 255
    grid.save_png(tmp_path / 'sheet.png', sheet)
    with Image.open(tmp_path / 'sheet.png') as image:
      assert image.mode == pixel_formats.MODES[channels]
      np.testing.assert_array_equal(pixel_formats.to_array(image), sheet)
  laid = native_evaluation.lay_on_white([images[0], images[1, :5]])
  assert laid.shape == (2, 16, 16, channels)


@pytest.mark.parametrize('channels', [1, 4])
def test_samples_are_measured_with_any_channels(channels):
  images = _images(40, channels, (33, 34))
  labels = np.zeros(40, np.int64)
  sets = [
      sample_metrics.ImageSet(images[rows], labels[rows])
      for rows in (np.s_[:20], np.s_[20:])
  ]
  evaluator = sample_metrics.SampleEvaluator(sets[:1], sets[1:])
  result = evaluator.run(sets[1:])
  assert result.metrics['copies'] == 20
  assert result.metrics['nearest_train_distance'] == 0
  assert np.isfinite(result.metrics['fd_pixel_pca'])
  assert result.protocol['image_size'] == [33, 34]
  assert pixel_pca.reduce(images).shape == (40, 32, 32, channels)
  rgb = sample_metrics.ImageSet(_images(5, 3, (33, 34)), labels[:5])
  with pytest.raises(ValueError, match='same height, width and channels'):
    evaluator.run([rgb])


def test_networks_of_samples_need_rgb():
  networks = {'inception': '', 'vgg16': 'file'}
  token_files.check_networks(networks, 3)
  token_files.check_networks({'inception': ''}, 1)
  with pytest.raises(ValueError, match=r'has vgg16, which take RGB .* 4 chan'):
    token_files.check_networks(networks, 4)


# Slow: the whole path.


@pytest.mark.slow
@pytest.mark.parametrize(
    ('channels', 'fields'),
    [(1, {}), (4, _CONV)],
    ids=['grey_vit', 'rgba_conv'],
)
def test_a_run_from_arrays_to_decoded_tokens(tmp_path, channels, fields):
  images, mode = _images(8, channels), pixel_formats.MODES[channels]
  for split in ('train', 'validation'):
    np.save(tmp_path / f'{split}.npy', images)
  run, saved, out = (tmp_path / x for x in ('run', 'saved', 'out'))
  config = _config(channels, fields)
  config.data.source, config.data.data_dir = 'arrays', str(tmp_path)
  config.train.num_steps = config.train.eval_every_steps = 2
  config.optim.warmup_steps = 1
  train.train_and_evaluate(config, run)

  protocol = json.loads((run / 'evaluation.json').read_text())['protocol']
  assert protocol['channels'] == channels
  assert protocol['num_images'] == 8
  (picture,) = (run / 'reconstructions').glob('*.png')
  with Image.open(picture) as image:
    assert image.mode == mode

  tokenizer = Tokenizer.from_workdir(run, batch_size=8)
  indices = tokenizer.encode(images)
  restored = tokenizer.decode(indices)
  assert restored.shape == images.shape
  with pytest.raises(ValueError, match=rf'\[B, H, W, {channels}\]'):
    tokenizer.encode(_images(1, 3))
  tokenizer.save_pretrained(saved)
  again = Tokenizer.from_pretrained(saved, batch_size=8)
  assert again.model_hash == tokenizer.model_hash
  np.testing.assert_array_equal(again.decode(indices), restored)
  card = (saved / files.CARD).read_text()
  assert f'[B, H, W, {channels}] uint8' in card
  assert f'{256 * 8 * channels:,} bits of pixels' in card
  encode = export.export_programs(again)['encode']
  assert encode.in_avals[-1].shape[1:] == (16, 16, channels)

  manifest = tokens.tokenize_workdir(config, run, folder=tmp_path / 'tokens')
  assert manifest.job.channels == channels
  text = manifest.summary['definitions']['compression_of_pixels']
  assert text.startswith(f'{8 * channels} bits of each pixel')
  tokens.detokenize_workdir(run, tmp_path / 'tokens', out)
  with Image.open(out / '3.png') as image:
    assert image.mode == mode
    np.testing.assert_array_equal(pixel_formats.to_array(image), restored[3])

  # Whole images, whose files have other channels.
  Image.fromarray(_images(1, 3, (18, 21))[0]).save(tmp_path / 'a.png')
  whole = tokenizer.reconstruct(tmp_path / 'a.png', 'pad', tiles='overlapping')
  assert whole.shape == (18, 21, channels)
  reconstruction.reconstruct_files(saved, tmp_path / 'a.png', tmp_path / 'x')
  with Image.open(tmp_path / 'x' / 'originals' / 'a.png') as image:
    assert image.mode == mode
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  reconstruct = native_size.Reconstructor(tokenizer.model, (16, 16), mesh)
  variables = jax.device_get(tokenizer.variables)
  assert reconstruct(variables, whole).image.shape == whole.shape
