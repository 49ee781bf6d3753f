"""Eight CPU devices and the settings that every test runs under."""

import os

# XLA reads these once, when the first device is asked for.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
)

import jax

# Toy programs spend their time in the compiler, not in the arithmetic.
jax.config.update('jax_disable_most_optimizations', True)
