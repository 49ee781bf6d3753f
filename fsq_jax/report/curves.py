"""Curves of a report: metrics over steps as SVG, drawn by matplotlib."""

from collections.abc import Mapping, Sequence
import io
import math
import re
import types
from typing import Any

import numpy as np

# Curves with more points are drawn as means between minima and maxima.
_MAX_POINTS = 500
# (title, split, keys, scale of the y axis).
_CURVES = (
    # With the baselines as horizontal lines.
    (
        'Bits per token',
        'eval',
        (
            'bits_per_token', 'train_bits_per_token',
            'compression_bits_per_token',
        ),
        'linear',
    ),
    (
        'Generalization gap, bits per token',
        'eval',
        ('generalization_gap',),
        'linear',
    ),
    # The NLL, in nats per token, is the loss without label smoothing.
    (
        'Loss',
        'train',
        (
            'loss', 'reconstruction_loss', 'perceptual_loss', 'quantizer_loss',
            'distillation_loss', 'nll',
        ),
        'log',
    ),
    # Some of these losses are negative; before their start they are 0.
    (
        'Adversarial losses',
        'train',
        ('adversarial_loss', 'discriminator_loss', 'lecam_loss'),
        'linear',
    ),
    ('Logits', 'train', ('real_logits', 'fake_logits'), 'linear'),
    ('Adversarial weight', 'train', ('adversarial_weight',), 'linear'),
    ('R1 penalty', 'train', ('r1_penalty',), 'log'),
    ('PSNR, dB', 'eval', ('psnr',), 'linear'),
    ('SSIM', 'eval', ('ssim',), 'linear'),
    ('LPIPS', 'eval', ('lpips_alexnet', 'lpips_vgg16'), 'linear'),
    # One plot each: their units differ.
    ('rFID', 'eval', ('rfid', 'rfid_tf1'), 'linear'),
    ('Frechet distance, VGG16', 'eval', ('fd_vgg16',), 'linear'),
    ('Frechet distance, encoder', 'eval', ('fd_encoder',), 'linear'),
    ('FID', 'eval', ('fid', 'fid_tf1'), 'linear'),
    (
        'Frechet distance, PCA of pixels',
        'eval',
        ('fd_pixel_pca', 'fd_pixel_pca_within_class'),
        'linear',
    ),
    ('Inception score', 'eval', ('inception_score',), 'linear'),
    (
        'Precision and recall, PCA of pixels',
        'eval',
        ('precision_pixel_pca', 'recall_pixel_pca'),
        'linear',
    ),
    (
        'Nearest-neighbour accuracy',
        'eval',
        ('nearest_neighbour_accuracy',),
        'linear',
    ),
    ('Codebook usage', 'eval', ('usage',), 'linear'),
    ('Perplexity', 'eval', ('perplexity',), 'linear'),
    ('Masked fraction', 'train', ('masked_fraction',), 'linear'),
    ('Learning rate', 'train', ('learning_rate',), 'linear'),
    (
        'Gradient norm',
        'train',
        ('gradient_norm', 'discriminator_gradient_norm'),
        'log',
    ),
    ('Images per second', 'train', ('images_per_second',), 'linear'),
)
# As many as curves of the fullest plot.
_COLORS = ('#3f7fd6', '#e0862c', '#3fa377', '#a35fc0', '#c8506b')
# The sum of the other curves of its plot: a thin line on the wide, light lines
# of its terms, so that a sum of one term hides nothing.
_TOTAL = 'loss'
# The plot of held-out images, training images and baselines.
_BITS = 'bits_per_token'
_LABELS = {
    'bits_per_token': 'held-out',
    'train_bits_per_token': 'training',
    'compression_bits_per_token': 'held-out, compression cost',
    'nll': 'NLL',
}
# Distance of labels of horizontal lines, as a fraction of the y axis.
_LABEL_DISTANCE = 0.085
# Placeholder for the page's text color.
_TEXT_COLOR = '#010203'


def render(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    baselines: Mapping[str, float] = types.MappingProxyType({}),
) -> str:
  """Returns HTML with a small plot for each of _CURVES that has values.

  Args:
    rows: split -> rows with ascending 'step'; values may be missing or null.
    baselines: bits per token by name, horizontal lines in the plot of them.
  """
  figures = []
  for number, (title, split, keys, scale) in enumerate(_CURVES):
    curves = {}
    for key in keys:
      points = [
          (row['step'], row[key])
          for row in rows[split]
          if _can_be_drawn(row.get(key), scale)
      ]
      if points:
        curves[key] = np.array(points, np.float64)
    if curves:
      levels = baselines if _BITS in keys else {}
      drawing = plot(curves, scale, f'plot{number}-', levels=levels)
      figures.append(
          f'<figure><figcaption>{title}</figcaption>{drawing}</figure>'
      )
  return f'<div class="plots">{"".join(figures)}</div>' if figures else ''


def plot(
    curves: Mapping[str, np.ndarray],
    scale: str,
    prefix: str,
    *,
    x_label: str = 'step',
    y_label: str = '',
    x_scale: str = 'linear',
    levels: Mapping[str, float] = types.MappingProxyType({}),
) -> str:
  """Returns an SVG of curves.

  Args:
    curves: name to [points, (x, y)] float64.
    scale: scale of the y axis, 'linear' or 'log'.
    prefix: prefix of its ids.
    x_label: label of the x axis.
    y_label: label of the y axis.
    x_scale: scale of the x axis.
    levels: name to y of horizontal lines, with a linear y axis.
  """
  import matplotlib
  from matplotlib import figure

  style = {
      'svg.fonttype': 'none',
      'svg.hashsalt': 'report',
      'font.size': 9,
      'text.color': _TEXT_COLOR,
      'axes.edgecolor': _TEXT_COLOR,
      'axes.labelcolor': _TEXT_COLOR,
      'xtick.color': _TEXT_COLOR,
      'ytick.color': _TEXT_COLOR,
      'grid.color': _TEXT_COLOR,
      'grid.alpha': 0.12,
      'axes.grid': True,
      'axes.spines.top': False,
      'axes.spines.right': False,
      'axes.linewidth': 0.6,
      'axes.formatter.useoffset': False,
      'legend.frameon': False,
  }
  with matplotlib.rc_context(style):
    drawing = figure.Figure(figsize=(4.6, 2.6), layout='constrained')
    axes = drawing.subplots()
    for color, (name, points) in zip(_COLORS, curves.items(), strict=False):
      bins = np.array_split(points, min(len(points), _MAX_POINTS))
      steps, means = np.array([part.mean(axis=0) for part in bins]).T
      label = _LABELS.get(name, name.replace('_', ' '))
      line = {'label': label, 'c': color, 'lw': 1.5}
      if name == _TOTAL and len(curves) > 1:
        line |= {'label': 'total loss', 'lw': 1.2, 'zorder': 3}
      elif _TOTAL in curves:
        line |= {'lw': 5, 'alpha': 0.35}
      marker = 'o' if len(points) <= 20 else None
      axes.plot(steps, means, marker=marker, ms=3, **line)
      if len(points) > len(bins):
        low, high = zip(
            *((part[:, 1].min(), part[:, 1].max()) for part in bins),
            strict=True,
        )
        axes.fill_between(steps, low, high, color=color, alpha=0.25, lw=0)
    axes.set_yscale(scale)
    axes.set_xscale(x_scale)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _draw_levels(axes, levels)
    if len(curves) > 1:
      axes.legend()
    file = io.StringIO()
    drawing.savefig(file, format='svg', transparent=True)
  svg = file.getvalue()
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{prefix}', svg)
  svg = svg.replace(_TEXT_COLOR, 'currentColor')
  return svg[svg.index('<svg') :]


def _draw_levels(axes: Any, levels: Mapping[str, float]) -> None:
  """Draws horizontal lines, with their labels at the right of the axes."""
  levels = sorted(levels.items(), key=lambda level: level[1])
  for _, y in levels:
    axes.axhline(y, color=_TEXT_COLOR, lw=0.9, ls='--', alpha=0.55)
  low, high = axes.get_ylim()
  height = -math.inf
  for name, y in levels:
    # Labels are moved up where they would overlap.
    height = max((y - low) / (high - low), height + _LABEL_DISTANCE)
    axes.annotate(
        f'{name} {y:.2f}',
        (1, y),
        xycoords=axes.get_yaxis_transform(),
        xytext=(1.05, height),
        textcoords='axes fraction',
        fontsize=8,
        va='center',
        parse_math=False,
        arrowprops={'arrowstyle': '-', 'lw': 0.6, 'color': _TEXT_COLOR},
    )


def _can_be_drawn(value: Any, scale: str) -> bool:
  if not isinstance(value, int | float) or not math.isfinite(value):
    return False
  return scale == 'linear' or value > 0
