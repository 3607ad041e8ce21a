"""Compiled programs: kept on disk, so that the next process need not compile them, and tuned."""

import hashlib
import os
import pathlib
import platform

import jax
import jaxlib

from awm_jax.data import cache_directory

_SETTING = "jax_compilation_cache_dir"
_FUSION = "--xla_cpu_experimental_ynn_fusion_type"


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


def tune() -> bool:
    """Has XLA do a CPU's convolutions on all cores; before JAX computes anything, else in vain.

    jaxlib 0.10 hands convolutions and matrix products to a library (YNNPACK) that does many of them
    on one core. This leaves it the sums only: `docs/performance.md` has the times. It goes by the
    variable ``XLA_FLAGS``, which stays as it is if it names that option, or with another jaxlib, as
    XLA ends the process at an option that it does not know.

    Returns:
      Whether the variable was changed.

    Example:
      >>> tune()  # doctest: +SKIP
      True
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _FUSION in flags or not jaxlib.__version__.startswith("0.10."):
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {_FUSION}=reduce".strip()
    return True
