"""Report of a run: one self-contained HTML page and grids of images."""

from fsq_jax.report.grid import contact_sheet
from fsq_jax.report.grid import inpainting_sheet
from fsq_jax.report.grid import nearest_sheet
from fsq_jax.report.grid import reconstruction_grid
from fsq_jax.report.grid import save_png
from fsq_jax.report.report import ANALYSIS_VERSION
from fsq_jax.report.report import write_report

__all__ = [
    'ANALYSIS_VERSION',
    'contact_sheet',
    'inpainting_sheet',
    'nearest_sheet',
    'reconstruction_grid',
    'save_png',
    'write_report',
]
