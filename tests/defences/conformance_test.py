"""What every registered defence must do. A new one adds one row to CASES."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import defences
from awm_jax.defences import DEFENCES, Status
from awm_jax.types import Batch

# Each defence with settings that make it short: the registry's defaults are for real networks.
_AWM = {"epochs": 1, "inner_steps": 1, "outer_steps": 2, "batch_size": 4}
_TUNE = {"epochs": 2, "batch_size": 4, "crop": 1}
CASES = {
    "awm": _AWM,
    "awm_paper": _AWM,
    "awm_official": _AWM,
    "swm_atr": _AWM,
    "awm_no_clip": _AWM,
    "awm_no_shrink": _AWM,
    "awm_nc_ns": _AWM,
    "awm_l2_reg": _AWM,
    "awm_l2_reg_nc": _AWM,
    "ft": _TUNE,
    "anp": {"steps": 2, "batch_size": 4, "crop": 1, "prune": "number", "number": 3},
    "swm": {"steps": 2, "batch_size": 4},
    "ft_sam": _TUNE,
    "weight_norm": _TUNE,
    "ngd": {"steps": 5, "batch_size": 4},
    "mcr": {**_TUNE, "end_epochs": 1},
    "fst": _TUNE,
    "ibau": {"rounds": 2, "batch_size": 4, "fixed_point_steps": 2},
    "ibau_official": {"rounds": 1, "batch_size": 4, "fixed_point_steps": 1},
    "clp": {"u": 1.0},
    "fp": _TUNE,
    "nad": {**_TUNE, "teacher_epochs": 1},
    "ac": {"epochs": 2, "batch_size": 4, "crop": 1},
    "abl": {"tune_epochs": 1, "finetune_epochs": 1, "unlearn_epochs": 1, "batch_size": 4,
            "crop": 1, "lr": 0.02, "finetune_lr": 0.02},
    "nc": {**_TUNE, "search_epochs": 3, "search_batch_size": 4, "always": True},
    "nft": {"epochs": 2, "batch_size": 4, "crop": 1},
    "rnp": {"unlearn_steps": 2, "recover_steps": 2, "batch_size": 4, "prune": "number",
            "number": 3},
    "sau": {"epochs": 2, "batch_size": 4, "ascent_steps": 2, "lr": 1e-3, "crop": 1},
}
# The scope keeps a defence's tests together, so that one process compiles it for all of them.
EVERY = pytest.mark.parametrize("name", list(DEFENCES), scope="module")
# A variant of AWM or of I-BAU is the same program with other constants: one speaks for them.
PROGRAMS = pytest.mark.parametrize("name", [
    name for name, defence in DEFENCES.items() if name in ("awm", "ibau")
    or defence.method not in (DEFENCES["awm_paper"].method, DEFENCES["ibau"].method)],
    scope="module")


@pytest.fixture(scope="module")
def three(tiny_batch):
    """Fewer images than a batch."""
    return Batch(tiny_batch.images[:3], tiny_batch.labels[:3])


def _config(name):
    return dataclasses.replace(DEFENCES[name].default, **CASES[name])


def _data(name, batch):
    """What the defence needs, on the device."""
    if DEFENCES[name].needs == "training":
        images = np.concatenate([np.asarray(batch.images)] * 4)
        return Batch(np.round(images * 255).astype(np.uint8), np.tile(batch.labels, 4))
    return batch


def _arguments(name, params, batch):
    data = _data(name, batch)
    return params, jnp.asarray(data.images), jnp.asarray(data.labels), _config(name)


def _assert_close(one, other, suspect, atol=1e-4):
    """Adam's and sign steps turn rounding into whole steps: 3% of what was changed may differ.

    Of what was changed, as some defences change little: a suspect network would be close to them.
    """
    assert jax.tree.structure(one) == jax.tree.structure(other)
    a, b, before = (np.concatenate([np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(tree)])
                    for tree in (one, other, suspect))
    changed = (a != before) | (b != before)
    assert changed.any()
    assert np.isclose(a, b, atol=atol, rtol=1e-3)[changed].mean() > 0.97


@pytest.fixture(scope="module")
def found(one_block, three):
    """Each defence's outcome, computed once."""
    kept = {}

    def outcome(name):
        if name not in kept:
            args = _arguments(name, one_block, three)
            kept[name] = DEFENCES[name]._jitted(jax.random.key(3), *args)
        return kept[name]

    return outcome


def test_every_defence_has_a_row_and_its_own_name():
    assert set(CASES) == set(DEFENCES)
    for name, defence in DEFENCES.items():
        assert defence.name == name and getattr(defences, name) is defence
        assert name in defences.__all__


@EVERY
def test_settings_are_plain_frozen_values(name):
    """No array, function or path among them: nothing through which test data could come in."""
    default = DEFENCES[name].default
    assert hash(default) == hash(dataclasses.replace(default))
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        flat = value if isinstance(value, tuple) else (value,)
        assert all(isinstance(v, (int, float, str, bool, type(None))) for v in flat), field.name
    assert list(inspect.signature(DEFENCES[name].method).parameters) == [
        "key", "params", "images", "labels", "config"]


@EVERY
def test_settings_are_made_from_its_own_and_stay_its_own(name):
    """A baseline that is run with settings of one's own is still that baseline."""
    defence = DEFENCES[name]
    assert defence.Config() == defence.default
    config = defence.Config(**CASES[name])
    assert config == dataclasses.replace(defence.default, **CASES[name])
    others = {"variant": "distilled", "patching": "paper"}
    for field in defence.fixed:
        with pytest.raises(ValueError, match=f"{field}=.* of {name}, got .* another defence"):
            defence.Config(**{field: others[field]})
    if name not in ("awm", "ibau") and defence.method in (DEFENCES["awm"].method,
                                                          DEFENCES["ibau"].method):
        assert defence.fixed


@EVERY
def test_shapes_dtypes_and_remit(name, one_block, found):
    outcome = found(name)
    assert bool(outcome.finite)
    before, after = jax.tree.leaves(one_block), jax.tree.leaves(outcome.params)
    assert jax.tree.structure(one_block) == jax.tree.structure(outcome.params)
    assert [(a.shape, a.dtype) for a in before] == [(a.shape, a.dtype) for a in after]
    remit = DEFENCES[name].remit
    allowed = jax.tree.leaves(remit.allows(one_block))
    changed = [bool((a != b).any()) for a, b in zip(
        jax.tree.leaves(one_block.weights), jax.tree.leaves(outcome.params.weights), strict=True)]
    assert all(may or not did for may, did in zip(allowed, changed, strict=True))
    assert any(changed)
    if not remit.batch_stats:
        assert all((a == b).all() for a, b in zip(
            jax.tree.leaves(one_block.batch_stats), jax.tree.leaves(outcome.params.batch_stats),
            strict=True))


@EVERY
def test_the_key_decides(name, one_block, three, found):
    again = DEFENCES[name]._jitted(jax.random.key(3), *_arguments(name, one_block, three))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(
        jax.tree.leaves(found(name)), jax.tree.leaves(again), strict=True))


@PROGRAMS
def test_jit_is_eager(name, one_block, three, found):
    """Called without `jit`, each operation runs by itself, but for the bodies of scans."""
    eager = DEFENCES[name].run(jax.random.key(3), *_arguments(name, one_block, three))
    _assert_close(eager.params, found(name).params, one_block)


@PROGRAMS
def test_vmap_is_a_loop(name, one_block, three, found):
    args = _arguments(name, one_block, three)
    run = DEFENCES[name].run
    keys = jnp.stack([jax.random.key(3), jax.random.key(4)])
    both = jax.jit(jax.vmap(lambda key: run(key, *args)))(keys)
    _assert_close(jax.tree.map(lambda leaf: leaf[0], both.params), found(name).params, one_block)


@EVERY
def test_call_compiles_once_and_needs_no_full_batch(name, one_block, three):
    data = _data(name, three)
    config = _config(name)
    defence = DEFENCES[name]
    first = defence(one_block, data, key=jax.random.key(0), config=config)
    size = defence._jitted._cache_size()
    second = defence(one_block, data, key=jax.random.key(1), config=config)
    assert defence._jitted._cache_size() == size
    assert Status.NONFINITE not in (first.status, second.status)


@EVERY
def test_bad_input_is_refused(name, one_block, three):
    defence, data = DEFENCES[name], _data(name, three)
    weights = jax.tree.map(lambda w: w * jnp.nan, one_block.weights)
    broken = dataclasses.replace(one_block, weights=weights)
    with pytest.raises(ValueError, match="finite weights"):
        defence(broken, data)
    with pytest.raises(TypeError, match="Expected config"):
        defence(one_block, data, config=object())
    with pytest.raises(TypeError, match="Expected key to be one PRNG key"):
        defence(one_block, data, key="0")
    if defence.needs == "nothing":
        return
    with pytest.raises(ValueError, match="Expected a batch"):
        defence(one_block)
    with pytest.raises(ValueError, match="labels"):
        defence(one_block, Batch(data.images, np.full(len(data.labels), 9)))
    if defence.needs == "clean":
        images = np.array(data.images)
        images[0, 0, 0, 0] = np.nan
        with pytest.raises(ValueError, match="NaN"):
            defence(one_block, Batch(images, data.labels))
