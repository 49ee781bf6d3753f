"""Configs: loading, checking, JSON, and differences between two configs."""

from fsq_jax.configuration.compatibility import check_resumable
from fsq_jax.configuration.compatibility import diff_models
from fsq_jax.configuration.loading import Config
from fsq_jax.configuration.loading import check_config
from fsq_jax.configuration.loading import config_from_json
from fsq_jax.configuration.loading import config_to_json
from fsq_jax.configuration.loading import describe_unknown
from fsq_jax.configuration.loading import diff_configs
from fsq_jax.configuration.loading import find_fields
from fsq_jax.configuration.loading import is_generator
from fsq_jax.configuration.loading import load_config
from fsq_jax.configuration.loading import resolve
from fsq_jax.configuration.loading import resolve_paths
from fsq_jax.configuration.schema import PATHS

__all__ = [
    'PATHS',
    'Config',
    'check_config',
    'check_resumable',
    'config_from_json',
    'config_to_json',
    'describe_unknown',
    'diff_configs',
    'diff_models',
    'find_fields',
    'is_generator',
    'load_config',
    'resolve',
    'resolve_paths',
]
