"""Compiled programs are kept where they should be, and found again by another process."""

import os
import subprocess
import sys

import jax
import pytest

from awm_jax import programs

JOB = """
import jax, jax.numpy as jnp
from awm_jax import programs
found = []
jax.monitoring.register_event_listener(lambda event, **more: found.append(event))
programs.keep()
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))
print(sum(event == "/jax/compilation_cache/cache_hits" for event in found))
"""


def test_another_process_need_not_compile_again(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"AWM_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu"}
    hits = [int(subprocess.run([sys.executable, "-c", JOB], env=env, check=True, text=True,
                               capture_output=True).stdout) for _ in range(2)]
    assert hits[0] == 0 < hits[1]
    (folder,) = (tmp_path / "programs").iterdir()
    assert len(list(folder.iterdir())) >= hits[1]


@pytest.fixture
def untuned(monkeypatch):
    """JAX as if nobody had said how to compute, on a processor without bfloat16 products."""
    monkeypatch.setattr(programs, "_processor", lambda: "x86_64 flags : avx512f amx_tile")
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", None)
    yield
    jax.config.update("jax_default_matmul_precision", before)


_AMX = "x86_64 flags : avx512f amx_tile amx_bf16"
_NAME = "--xla_cpu_experimental_ynn_fusion_type="


@pytest.mark.parametrize("before, version, after", [
    ("", "0.10.2", f"{_NAME}reduce"), ("--a=1", "0.10.0", f"--a=1 {_NAME}reduce"),
    (_NAME, "0.10.2", _NAME), ("--a=1", "0.11.0", "--a=1"),
])
def test_tuning_leaves_other_versions_and_the_users_choice_alone(untuned, monkeypatch, before,
                                                                 version, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(programs.jaxlib, "__version__", version)
    for _ in range(2):  # the second time nothing is added
        assert programs.tune() == programs.convolutions() == "float32"
        assert os.environ["XLA_FLAGS"] == after


@pytest.mark.parametrize("told, asked, processor, version, expected", [
    (None, None, _AMX, "0.10.2", "bfloat16"), (None, None, _AMX, "0.11.0", "float32"),
    (None, None, "x86_64", "0.10.2", "float32"), ("float32", None, _AMX, "0.10.2", "float32"),
    ("highest", None, _AMX, "0.10.2", "float32"), (None, "float32", _AMX, "0.10.2", "float32"),
    ("bfloat16", None, "arm64", "0.10.2", "bfloat16"),
    ("bfloat16", "float32", _AMX, "0.10.2", "float32"),
    ("float32", "bfloat16", "arm64", "0.10.2", "bfloat16"),
])
def test_bfloat16_where_the_processor_multiplies_it_and_nobody_objects(
        untuned, monkeypatch, told, asked, processor, version, expected):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(programs, "_processor", lambda: processor)
    monkeypatch.setattr(programs.jaxlib, "__version__", version)
    jax.config.update("jax_default_matmul_precision", told)
    assert programs.tune(asked) == programs.convolutions() == expected
    if expected == "float32" and told != "bfloat16":  # what the user said of other products stays
        assert jax.config.jax_default_matmul_precision == told
    wanted = {"bfloat16": "reduce,individual_dot", "float32": "reduce"}[expected]
    assert os.environ["XLA_FLAGS"] == (f"{_NAME}{wanted}" if version == "0.10.2" else "")


def test_another_precision_is_refused(untuned):
    with pytest.raises(ValueError, match="precision='float16' to be one of: bfloat16, float32"):
        programs.tune("float16")


def test_this_jaxlib_takes_the_tuning():
    """In a fresh process, as XLA ends one at an option that it does not know."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    for precision in programs.PRECISIONS:
        job = (f"from awm_jax import programs; programs.tune({precision!r}); "
               "import jax.numpy as jnp; print(jnp.ones(3).sum())")
        done = subprocess.run([sys.executable, "-c", job], env=env, check=True, text=True,
                              capture_output=True)
        assert done.stdout.strip() == "3.0"


@pytest.fixture
def untold():
    """JAX as if nobody had said where programs are kept."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_users_own_place_and_the_processor_count(untold, tmp_path, monkeypatch):
    monkeypatch.setenv("AWM_CACHE_DIR", str(tmp_path))
    first = programs.keep()
    assert first.parent == tmp_path / "programs"
    monkeypatch.setattr(programs, "_processor", lambda: "another one")
    assert programs.keep() == first  # told already
    jax.config.update("jax_compilation_cache_dir", None)
    assert programs.keep() != first and programs.keep().parent == first.parent
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert programs.keep() == tmp_path / "mine"
