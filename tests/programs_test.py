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


@pytest.mark.parametrize("before, version, changed, after", [
    ("", "0.10.2", True, "--xla_cpu_experimental_ynn_fusion_type=reduce"),
    ("--a=1", "0.10.0", True, "--a=1 --xla_cpu_experimental_ynn_fusion_type=reduce"),
    ("--xla_cpu_experimental_ynn_fusion_type=", "0.10.2", False,
     "--xla_cpu_experimental_ynn_fusion_type="),
    ("--a=1", "0.11.0", False, "--a=1"),
])
def test_tuning_leaves_other_versions_and_the_users_choice_alone(monkeypatch, before, version,
                                                                 changed, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(programs.jaxlib, "__version__", version)
    assert programs.tune() is changed
    assert os.environ["XLA_FLAGS"] == after
    assert not programs.tune()  # once is enough


def test_this_jaxlib_takes_the_tuning():
    """In a fresh process, as XLA ends one at an option that it does not know."""
    job = ("from awm_jax import programs; programs.tune(); import jax.numpy as jnp; "
           "print(jnp.ones(3).sum())")
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
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
