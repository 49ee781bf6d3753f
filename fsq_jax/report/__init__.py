"""Report of a run: one self-contained HTML page and grids of images."""

from fsq_jax.report.grid import reconstruction_grid
from fsq_jax.report.grid import save_png
from fsq_jax.report.report import ANALYSIS_VERSION
from fsq_jax.report.report import write_report

__all__ = [
    'ANALYSIS_VERSION',
    'reconstruction_grid',
    'save_png',
    'write_report',
]
