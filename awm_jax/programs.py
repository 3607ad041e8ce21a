"""Compiled programs: kept on disk, so that the next process need not compile them, and tuned."""

import hashlib
import os
import pathlib
import platform

import jax
import jaxlib

from awm_jax import validate
from awm_jax.data import cache_directory

_SETTING = "jax_compilation_cache_dir"
_PRECISION = "jax_default_matmul_precision"
_FUSION = "--xla_cpu_experimental_ynn_fusion_type"


PRECISIONS = ("bfloat16", "float32")


def _multiplies_bfloat16() -> bool:
    """Whether the processor has a unit for products of bfloat16 matrices, and jaxlib uses it."""
    return "amx_bf16" in _processor().split() and jaxlib.__version__.startswith("0.10.")


def _processor() -> str:
    """What a program compiled here may use: the processor's instruction sets, where Linux tells."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.startswith(("flags", "Features"))]
    return f"{platform.machine()} {told[0] if told else platform.processor()}"


def keep() -> pathlib.Path:
    """From here on keeps what takes over a second to compile, unless JAX was told where already.

    ``JAX_COMPILATION_CACHE_DIR`` names another place, ``JAX_ENABLE_COMPILATION_CACHE=0`` keeps
    nothing. Programs for other processors are kept apart, as a home directory may be shared.

    Returns:
      The directory.

    Example:
      >>> keep()  # doctest: +SKIP
      PosixPath('/home/me/.cache/awm_jax/programs/1d0c3a5e')
    """
    if getattr(jax.config, _SETTING) is None:
        name = hashlib.sha256(_processor().encode()).hexdigest()[:8]
        jax.config.update(_SETTING, str(cache_directory() / "programs" / name))
    return pathlib.Path(getattr(jax.config, _SETTING))


def tune(precision: str | None = None) -> str:
    """Makes convolutions on a CPU fast; before JAX computes anything, else half in vain.

    On a processor that multiplies bfloat16 matrices (Intel's AMX), convolutions in steps of one
    pixel become such products (`awm_jax.models.bfloat16`), within .5%: networks take 1.2 to 1.9
    times less time. It goes by JAX's own ``jax_default_matmul_precision``, so
    ``JAX_DEFAULT_MATMUL_PRECISION=float32`` keeps float32; `awm_jax.metrics` scores in float32
    always.

    And jaxlib 0.10 hands convolutions and matrix products to a library (YNNPACK) that does many of
    them on one core. This leaves it the sums, and bfloat16 products, only: `docs/performance.md`
    has the times. It goes by the variable ``XLA_FLAGS``, which stays as it is if it names that
    option, or with another jaxlib, as XLA ends the process at an option that it does not know.

    Args:
      precision: 'bfloat16' or 'float32'; None for what the processor does best.

    Returns:
      The precision of convolutions from here on: 'bfloat16' or 'float32'.

    Raises:
      ValueError: another ``precision``.

    Example:
      >>> tune()  # doctest: +SKIP
      'bfloat16'
    """
    told = getattr(jax.config, _PRECISION)
    if precision is None:
        precision = told or ("bfloat16" if _multiplies_bfloat16() else "float32")
    else:
        validate.choice(PRECISIONS, precision=precision)
    if "bfloat16" in (precision, told):
        jax.config.update(_PRECISION, "bfloat16" if precision == "bfloat16" else None)
    flags = os.environ.get("XLA_FLAGS", "")
    if _FUSION not in flags and jaxlib.__version__.startswith("0.10."):
        kinds = "reduce,individual_dot" if precision == "bfloat16" else "reduce"
        os.environ["XLA_FLAGS"] = f"{flags} {_FUSION}={kinds}".strip()
    return convolutions()


def convolutions() -> str:
    """The precision of convolutions on a CPU: 'bfloat16' or 'float32'.

    Example:
      >>> with jax.default_matmul_precision('bfloat16'):
      ...     convolutions()
      'bfloat16'
    """
    return "bfloat16" if getattr(jax.config, _PRECISION) == "bfloat16" else "float32"
