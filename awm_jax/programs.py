"""Compiled programs, kept on disk: what one process has compiled, the next one need not."""

import hashlib
import pathlib
import platform

import jax

from awm_jax.data import cache_directory

_SETTING = "jax_compilation_cache_dir"


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
