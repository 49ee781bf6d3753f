"""Reads tokenizers that other projects have published."""

import os

import jax
import ml_collections

from fsq_jax.configuration import loading as config_loading
from fsq_jax.models import variables as variables_lib
from fsq_jax.models.pretrained import maskgit
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import files
from fsq_jax.workdir import urls

# Fields of a config of MaskGIT's VQGAN; sizes are compared with the file.
_MASKGIT = {
    'data.channels': 3,
    'model.encoder.name': 'conv',
    'model.encoder.conv.pixel_range': maskgit.PIXEL_RANGE,
    'model.latent_statistics': '',
    'model.projector_in.name': 'none',
    'model.quantizer.name': 'vq',
    'model.quantizer.vq.codebook_update': 'gradient',
    'model.quantizer.vq.metric': 'euclidean',
    'model.projector_out.name': 'none',
    'model.decoder.name': 'conv',
    'model.decoder.conv.pixel_range': maskgit.PIXEL_RANGE,
}


def read_maskgit(
    path: str | os.PathLike[str],
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    dtype: str | None = None,
) -> files.SavedModel:
  """Reads published weights of MaskGIT's VQGAN; nothing is unpickled.

  Args:
    path: as in `maskgit.load_variables`.
    config: a whole config of the same model, such as
      configs/imagenet256_vq_1024.py.
    mesh: devices for the variables, sharded by the config's
      partitioning.rules.
    dtype: as in `files.build_model`.

  Returns:
    The model, at step 0 of a run that is initialized from the file.

  Raises:
    ValueError: a file that is missing, corrupted, a pickle, or of another model
      than the config; the differences are listed.
  """
  path = urls.local_path(path, 'path')
  fields = dict(config_loading.flatten(config))
  differences = [
      f"{name} is {fields[name]!r}; MaskGIT's VQGAN has {value!r}."
      for name, value in _MASKGIT.items()
      if fields[name] != value
  ]
  if differences:
    raise ValueError(
        '\n  '.join([
            f"{path} is to be read as MaskGIT's VQGAN, but the config has"
            ' another model; use configs/imagenet256_vq_1024.py, or set:',
            *differences,
        ])
    )
  config_loading.check_config(config, mode='reconstruct')
  config = config.copy_and_resolve_references()
  config.train.init_from = os.fspath(path)
  config = config_loading.resolve(config)
  model = files.build_model(config, dtype)
  abstract = partitioning.place_abstract(
      variables_lib.abstract_variables(model, config.data.image_size),
      mesh,
      config.partitioning.rules,
      config.partitioning.fsdp_min_size,
  )
  variables = maskgit.load_variables(path, model, abstract)
  return files.SavedModel(config, model, variables, files.Metadata(step=0))
