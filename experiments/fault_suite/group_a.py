"""Faults of quantizers: extreme, low-precision and NaN values; invalid levels.

Reference values are computed in NumPy float64 from the definitions.
"""

import math
import pathlib

import jax
from jax import numpy as jnp
import numpy as np

from experiments.fault_suite import fault
from fsq_jax import quantizers
from fsq_jax.quantizers import conventions
from fsq_jax.quantizers import convert

_LEVELS = (*conventions.LEVELS.values(), (7, 5, 5, 5), (4,) * 15)
_EXHAUSTIVE = 2**16
# Small quantizers of all kinds.
_KINDS = {
    'symmetric': lambda: quantizers.FSQ((8, 5, 5)),
    'clip': lambda: quantizers.FSQ((8, 5, 5), bound='clip'),
    'ifsq': lambda: quantizers.FSQ((8, 5, 5), bound='ifsq', bins='equal'),
    'paper': lambda: quantizers.FSQ((8, 5, 5), convention='paper'),
    'vqp': lambda: quantizers.FSQ((8, 5, 5), convention='vqp'),
    'preserve_symmetry': lambda: quantizers.FSQ(
        (8, 5, 5), convention='preserve_symmetry'
    ),
    'grouped': lambda: quantizers.GroupedFSQ((8, 5, 5), num_groups=2),
    'residual': lambda: quantizers.ResidualFSQ((5, 5, 5), num_stages=2),
    'lfq': lambda: quantizers.LFQ(num_bits=6),
    'bsq': lambda: quantizers.BSQ(num_bits=6),
    'vq': lambda: quantizers.VectorQuantizer(codebook_size=32, code_dim=4),
    'simvq': lambda: quantizers.SimVQ(codebook_size=32, code_dim=4),
}


def _apply(quantizer, z, **options):
  """Initializes, compiles and applies a quantizer."""
  variables = jax.jit(quantizer.init)(jax.random.key(0), z)
  options = {'rngs': {'quantizer': jax.random.key(1)}, **options}
  return jax.jit(lambda v, z: quantizer.apply(v, z, **options))(variables, z)


def _round_trips(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  count, mismatches = 0, 0
  for levels in _LEVELS:
    for name, convention in conventions.CONVENTIONS.items():
      if min(levels) < convention.lowest_level:
        continue
      quantizer = quantizers.FSQ(levels, convention=name)
      size = quantizer.codebook_size
      indices = np.arange(size, dtype=np.int32) if size <= _EXHAUSTIVE else (
          np.random.default_rng(0).integers(
              size, size=10**4 if quick else 10**6, dtype=np.int32
          )
      )
      codes = jax.jit(quantizer.indices_to_codes)(indices)
      back = np.asarray(jax.jit(quantizer.codes_to_indices)(codes))
      again = np.asarray(jax.jit(quantizer.indices_to_codes)(back))
      mismatches += int((back != indices).sum())
      mismatches += int((again != np.asarray(codes)).any(axis=-1).sum())
      count += len(indices)
  return fault.Outcome(
      mismatches == 0,
      f'{mismatches} mismatches in {count:,} codes of {len(_LEVELS)} level sets'
      ' and 4 conventions',
      {'mismatches': mismatches, 'codes': count},
  )


def _reference(z, levels, convention, bound):
  """Returns indices in float64, and where a rounding boundary is near."""
  L = np.array(levels)
  if convention == 'paper':
    half = (L - 1) * (1 - 1e-3) / 2
    offset = np.where(L % 2 == 0, 0.5, 0.0)
    steps = np.tanh(z + np.tan(offset / half)) * half - offset
    digits = np.rint(steps) + L // 2
    bases = np.cumprod([1, *levels[:-1]])
    boundary = steps - 0.5
  else:
    unit = np.tanh(z) if bound == 'tanh' else z
    steps = unit * (L - 1) / 2 + (L - 1) / 2
    digits = np.clip(np.rint(steps), 0, L - 1)
    bases = np.cumprod([1, *levels[:0:-1]])[::-1]
    boundary = steps - 0.5
  ulp = np.spacing(np.maximum(np.abs(L / 2), 1).astype(np.float32))
  near = np.abs(boundary - np.rint(boundary)) <= 4 * ulp
  return digits.astype(np.int64) @ bases, near.any(axis=-1)


def _narrow_inputs(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  rng = np.random.default_rng(0)
  shapes = ((10, 100), ()) if quick else ((25, 40, 100), (10**5,), ())
  others = near = count = out_of_range = 0
  for levels in ((8, 8, 8), (8, 5, 5, 5), (8, 8, 8, 5, 5, 5)):
    for convention, bound in (
        ('symmetric', 'tanh'), ('symmetric', 'clip'), ('paper', 'tanh')
    ):
      quantizer = quantizers.FSQ(levels, convention=convention, bound=bound)
      apply = jax.jit(lambda z, q=quantizer: q.apply({}, z).indices)
      for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        for shape in shapes:
          z = jnp.asarray(rng.normal(size=(*shape, len(levels))), dtype)
          expected, is_near = _reference(
              np.asarray(z.astype(jnp.float32), np.float64), levels, convention,
              bound,
          )
          for run in (apply, lambda z, q=quantizer: q.apply({}, z).indices):
            indices = run(z)
            wrong = np.asarray(indices) != expected
            others += int((wrong & ~is_near).sum())
            near += int(wrong.sum())
            count += wrong.size
            out_of_range += int(
                indices.dtype != jnp.int32
                or indices.shape != shape
                or (indices < 0).any()
                or (indices >= quantizer.codebook_size).any()
            )
  return fault.Outcome(
      not others and not out_of_range,
      f'{others} others and {near - others} within 4 ulp in {count:,} vectors;'
      f' {out_of_range} of another type, shape or range',
      {'others': others, 'near': near - others, 'vectors': count},
  )


def _extreme(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  values = np.array([
      0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, 1e4, 1e20, 1e30, -1e30, 3.4e38,
      -3.4e38, np.inf, -np.inf,
  ], np.float32)
  rng = np.random.default_rng(0)
  nans = not_corners = count = 0
  for name in _KINDS.keys() - {'vq', 'simvq'}:
    quantizer = _KINDS[name]()
    d = quantizer.code_dim
    z = np.concatenate([
        np.repeat(values[:, None], d, axis=1),
        rng.choice(values, (1000, d)),
    ])

    def loss(z, quantizer=quantizer):
      output = quantizer.apply(
          {}, z, train=True, rngs={'quantizer': jax.random.key(0)}
      )
      return jnp.sum(output.z_q), output

    gradient, output = jax.jit(jax.grad(loss, has_aux=True))(z)
    for array in (gradient, output.z_q):
      nans += int(np.isnan(array).sum())
    nans += int((np.asarray(output.indices) < 0).sum())
    if hasattr(quantizer, 'levels') and quantizer.index_shape == ():
      digits = np.asarray(quantizer.indices_to_digits(output.indices))
      top = np.asarray(quantizer.levels) - 1
      large = np.abs(z) >= 1e20
      corner = np.where(z > 0, top, 0)
      not_corners += int((large & (digits != corner)).sum())
      count += int(large.sum())
  return fault.Outcome(
      nans == 0 and not_corners == 0 and count > 1000,
      f'{nans} NaN in codes and gradients of {len(_KINDS) - 2} quantizers;'
      f' {not_corners} of {count:,} channels above 1e20 not at their corner',
      {'nan': nans, 'not_corners': not_corners},
  )


def _nan(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  rng = np.random.default_rng(0)
  silent = false = count = 0
  for build in _KINDS.values():
    quantizer = build()
    z = rng.normal(size=(20_000, quantizer.code_dim)).astype(np.float32)
    bad = rng.random(len(z)) < 0.1
    z[bad, rng.integers(0, quantizer.code_dim, bad.sum())] = np.nan
    indices = np.asarray(_apply(quantizer, z).indices)
    # One or several indices per vector; a NaN marks at least one of them.
    marked = (indices.reshape(len(z), -1) < 0).any(axis=1)
    silent += int((bad & ~marked).sum())
    false += int((marked & ~bad).sum())
    count += int(bad.sum())
  return fault.Outcome(
      silent == 0 and false == 0,
      f'{count - silent:,} of {count:,} marked by -1 in {len(_KINDS)}'
      f' quantizers, {false} others',
      {'silent': silent, 'false': false, 'vectors': count},
  )


def _too_many_codes(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  # 2^31 - 1 is prime; this is the largest product of allowed levels below it.
  largest = (2**15, 2**16 - 1)
  quantizer = quantizers.FSQ(largest)
  top = quantizer.codebook_size - 1
  code = quantizer.indices_to_codes(np.array([0, top]))
  fits = np.array_equal(quantizer.codes_to_indices(code), [0, top])
  refused = 0
  cases = ((2**15, 2**16), (8,) * 11, (4,) * 16)
  for levels in cases:
    error = fault.refusal(quantizers.FSQ, levels)
    refused += all(
        text in str(error) for text in (str(math.prod(levels)), 'GroupedFSQ')
    )
  return fault.Outcome(
      fits and refused == len(cases),
      f'{top + 1:,} codes return, {refused} of {len(cases)} products from 2^31'
      ' on are refused by number and remedy',
      {'largest': top + 1, 'refused': refused},
  )


def _impossible_levels(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  cases = [
      (1, 8), (0, 8), (-8, 8), (8.0, 8), (8.5,), (), None, 8, '888', (8, '8'),
      (math.nan, 8), (True, 8), (2**23,), (None,), ((8, 8),), {8: 8},
  ]
  refused = [x for x in cases if fault.refusal(quantizers.FSQ, x) is not None]
  one = quantizers.FSQ((9,)).apply({}, np.zeros((3, 1), np.float32)).indices
  return fault.Outcome(
      len(refused) == len(cases) and list(one) == [4, 4, 4],
      f'{len(refused)} of {len(cases)} refused with the rule; one dimension'
      ' works',
      {'refused': len(refused), 'cases': len(cases)},
  )


def _no_codebook(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  code = """if True:
    import time
    from experiments.fault_suite import fault
    from fsq_jax import quantizers
    quantizers.FSQ((8, 8, 8))
    before, started = fault.reset_peak(), time.perf_counter()
    quantizers.FSQ((4,) * 15)
    quantizers.GroupedFSQ((4,) * 8, num_groups=2)
    seconds = time.perf_counter() - started
    print(fault.peak_mb() - before, seconds)
  """
  memory, seconds = map(float, fault.run_python(code).stdout.split())
  return fault.Outcome(
      memory < 50 and seconds < 0.1,
      f'{memory:.1f} MB, {seconds * 1e3:.1f} ms for 4^15 codes and for 4^16 in'
      ' two groups',
      {'mb': round(memory, 2), 'seconds': round(seconds, 5)},
  )


def _noise(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  z = np.random.default_rng(0).normal(
      0, 2, (10**4 if quick else 10**6, 4)
  ).astype(np.float32)
  wrong = unmoved = 0
  for convention in conventions.CONVENTIONS:
    quantizer = quantizers.FSQ((8, 5, 5, 5), convention=convention, noise=0.5)
    noisy = _apply(quantizer, z, train=True)
    clean = _apply(quantizer, z)
    indices = np.asarray(noisy.indices)
    wrong += int((indices != np.asarray(clean.indices)).sum())
    wrong += int(((indices < 0) | (indices >= 1000)).sum())
    unmoved += int((np.asarray(noisy.z_q) == np.asarray(clean.z_q)).all())
  return fault.Outcome(
      wrong == 0 and unmoved == 0,
      f'{wrong} changed or out of range in {4 * len(z):,}, while codes moved',
      {'wrong': wrong},
  )


def _gradient(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  z = np.random.default_rng(0).uniform(-3, 3, (10**5, 3)).astype(np.float32)
  z64, half = z.astype(np.float64), np.array([7, 5, 4]) / 2
  slopes = {
      'tanh': half * (1 - np.tanh(z64) ** 2),
      'ifsq': half * 0.8 * (1 - np.tanh(0.8 * z64) ** 2),
      'clip': half * np.ones_like(z64),
  }
  worst = {}
  for bound, expected in slopes.items():
    quantizer = quantizers.FSQ((8, 6, 5), bound=bound)
    gradient = jax.jit(
        jax.grad(lambda z, q=quantizer: jnp.sum(q.apply({}, z).z_q))
    )(z)
    error = np.abs(np.asarray(gradient, np.float64) - expected)
    # Relative to the slope at 0: float32 resolves 1 - tanh^2 only absolutely.
    worst[bound] = float((error / expected.max(axis=0)).max())
  return fault.Outcome(
      max(worst.values()) <= 1e-6,
      'largest error over the slope at 0: ' + ', '.join(
          f'{name} {value:.1e}' for name, value in worst.items()
      ),
      worst,
  )


def _conventions(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  pairs = refused = mismatches = codes = 0
  for levels in ((8, 8, 8), (8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5)):
    variants = {
        name: quantizers.FSQ(levels, convention=name)
        for name in conventions.CONVENTIONS
    }
    for one in variants.values():
      for other in variants.values():
        if one is other:
          continue
        pairs += 1
        specs = one.spec(), other.spec()
        refused += (
            fault.refusal(quantizers.check_same_spec, *specs) is not None
        )
        indices = np.arange(one.codebook_size, dtype=np.int32)
        converted = convert.convert_indices(indices, *specs)
        level_indices = one.indices_to_digits(indices)
        mismatches += int(
            np.sum(other.indices_to_digits(converted) != level_indices)
        )
        expected = convert.convert_codes(one.indices_to_codes(indices), *specs)
        mismatches += int(
            (np.asarray(other.indices_to_codes(converted)) != expected).sum()
        )
        codes += len(indices)
  return fault.Outcome(
      refused == pairs and mismatches == 0,
      f'{refused} of {pairs} pairs refused; {mismatches} mismatches in'
      f' {codes:,} converted tokens',
      {'pairs': pairs, 'refused': refused, 'mismatches': mismatches},
  )


FAULTS = {
    'A1': fault.Fault(
        'every code of every named level set',
        'index to code to index and back, 0 mismatches', _round_trips,
    ),
    'A2': fault.Fault(
        'float16, bfloat16 and float32 latents of any rank, compiled and not',
        'int32 in range, as NumPy in float64 but within 4 ulp of a boundary',
        _narrow_inputs,
    ),
    'A3': fault.Fault(
        'up to 1e30, denormals, infinities',
        'corner codes, no NaN in codes and gradients', _extreme,
    ),
    'A4': fault.Fault('NaN in latents', '100 % reported', _nan),
    'A5': fault.Fault(
        'products of levels about 2^31',
        'the largest below works, from it on an error with product and remedy',
        _too_many_codes,
    ),
    'A6': fault.Fault(
        'levels of 1, 0, less, no integers, none', 'an error with the rule',
        _impossible_levels,
    ),
    'A7': fault.Fault(
        '2^30 codes, 4^16 in groups', '< 50 MB, < 0.1 s', _no_codebook
    ),
    'A8': fault.Fault(
        'noise in training', 'indices are those without it', _noise
    ),
    'A9': fault.Fault(
        'straight-through gradients', 'analytic ones within 1e-6', _gradient
    ),
    'A10': fault.Fault(
        'tokens of another dialect',
        'refused unless converted, 0 mismatches then', _conventions,
    ),
}
