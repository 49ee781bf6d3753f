"""Files of a run: names, atomic writes, lock, metrics."""

from fsq_jax.workdir.files import CHECKPOINTS
from fsq_jax.workdir.files import CONFIG
from fsq_jax.workdir.files import DAMAGED
from fsq_jax.workdir.files import EVALUATION
from fsq_jax.workdir.files import LOCK
from fsq_jax.workdir.files import METRICS
from fsq_jax.workdir.files import PROFILE
from fsq_jax.workdir.files import QUANTIZER
from fsq_jax.workdir.files import RECONSTRUCTIONS
from fsq_jax.workdir.files import REFERENCES
from fsq_jax.workdir.files import REPORT
from fsq_jax.workdir.files import RUN
from fsq_jax.workdir.files import TENSORBOARD
from fsq_jax.workdir.files import create
from fsq_jax.workdir.files import lock
from fsq_jax.workdir.files import read_json
from fsq_jax.workdir.files import write_bytes
from fsq_jax.workdir.files import write_json
from fsq_jax.workdir.metric_log import MetricWriter
from fsq_jax.workdir.metric_log import read_metrics

__all__ = [
    'CHECKPOINTS',
    'CONFIG',
    'DAMAGED',
    'EVALUATION',
    'LOCK',
    'METRICS',
    'PROFILE',
    'QUANTIZER',
    'RECONSTRUCTIONS',
    'REFERENCES',
    'REPORT',
    'RUN',
    'TENSORBOARD',
    'MetricWriter',
    'create',
    'lock',
    'read_json',
    'read_metrics',
    'write_bytes',
    'write_json',
]
