"""Package metadata; pyproject.toml holds the settings of the tools."""

import pathlib
import re

import setuptools

_INIT = pathlib.Path(__file__).parent / 'fsq_jax' / '__init__.py'

setuptools.setup(
    name='fsq_jax',
    # Read as text: importing the package would need its dependencies.
    version=re.search(r"__version__ = '(.+)'", _INIT.read_text())[1],
    description='Image tokenizers with Finite Scalar Quantization in JAX',
    license='Apache-2.0',
    packages=setuptools.find_packages(include=['fsq_jax', 'fsq_jax.*']),
    # Tokenizers that ship with the package.
    package_data={'fsq_jax.tokenizer': ['pretrained/*/*']},
    python_requires='>=3.11',
    install_requires=[
        'absl-py',
        'array-record',
        'einops',
        # jax.export needs it and does not say so.
        'flatbuffers',
        'flax>=0.12.8',
        'grain>=0.2.17',
        # tensorflow-datasets needs it and does not say so.
        'importlib_resources',
        'jax>=0.10.2',
        'matplotlib',
        'ml_collections>=1.1',
        'numpy>=2.2',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12.3,<1.0',
        'pillow',
        # tensorflow-datasets brings it too.
        'pyarrow>=17',
        'safetensors>=0.5',
        'scikit-image',
        'scikit-learn',
        'tensorflow-datasets>=4.9.10',
        'tqdm',
    ],
    extras_require={
        # Runs in Google Cloud Storage, --workdir=gs://...
        'gcs': ['gcsfs', 'google-cloud-storage>=3'],
        # Models and data sets of the Hugging Face Hub.
        'hub': ['huggingface_hub'],
        # Trackers, train.trackers.
        'mlflow': ['mlflow-skinny'],
        # Conversion of data sets that TFDS cannot prepare without TensorFlow.
        'prepare': ['tensorflow-cpu'],
        'tensorboard': ['tensorboardX'],
        'test': [
            'chex', 'hypothesis', 'ipykernel', 'nbclient', 'pytest',
            'pytest-xdist', 'ruff', 'webdataset',
        ],
        'wandb': ['wandb'],
    },
)
