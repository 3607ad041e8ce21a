"""Adversarial Weight Masking: its properties, its errors and its settings."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awm_jax
from awm_jax import defences, detection, masks, models
from awm_jax.defences import awm_batches, awm_spare, awm_steps
from awm_jax.defences import awm_purify as awm
from awm_jax.defences.survey import Survey
from awm_jax.types import Arch, Batch

QUICK = {"epochs": 2, "inner_steps": 2, "outer_steps": 2, "batch_size": 4, "tau": 100.0}


def _config(variant, **overrides):
    return awm.AWMConfig(variant=variant, **{**QUICK, **overrides})


def _numbers(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("variant", ["distilled", "paper"])  # conformance has the third
def test_masks_bound_and_history(variant, tiny, small_batch):
    config = _config(variant)
    out = awm_jax.purify(tiny, small_batch, config=config)
    values = _numbers(out.masks)
    assert 0 <= values.min() and values.max() <= 1 and (values < 1).any()
    bound = 100.0 * 8 * 8 / 1024 * (2 if variant == "distilled" else 1)  # the survey's is twice
    assert np.abs(out.trigger).sum() <= bound * (1 + 1e-5)
    assert np.abs(out.trigger).sum() > 0
    assert {len(v) for v in out.history.values()} == {2}
    assert isinstance(out.params, awm_jax.Params) and out.params.arch == tiny.arch
    masked = dataclasses.replace(tiny, batch_stats=out.params.batch_stats)
    np.testing.assert_allclose(
        models.apply(out.params, small_batch.images),
        models.apply(masked, small_batch.images, masks=out.masks), rtol=1e-5, atol=1e-5)
    for name in ("bn1", "dense"):
        np.testing.assert_array_equal(_numbers(out.params.weights[name]),
                                      _numbers(tiny.weights[name]))


def test_statistics_follow_the_masks_where_asked(tiny, small_batch):
    """After the masks, which are learnt without; and after every stretch, for those who watch."""
    states = []
    out = awm_jax.purify(tiny, small_batch, config=_config("distilled", recalibration=3), every=1,
                         on_epochs=lambda done, total, state, latest: states.append(state))
    off = awm_jax.purify(tiny, small_batch, config=_config("distilled"), every=1)
    paper = awm_jax.purify(tiny, small_batch, config=_config("paper"))
    np.testing.assert_allclose(_numbers(out.masks), _numbers(off.masks), atol=1e-6)
    for still in (off, paper):
        np.testing.assert_array_equal(_numbers(still.params.batch_stats),
                                      _numbers(tiny.batch_stats))
    found = [_numbers(state.batch_stats) for state in states] + [_numbers(tiny.batch_stats)]
    np.testing.assert_array_equal(found[1], _numbers(out.params.batch_stats))
    assert all(np.abs(a - b).max() > 1e-5 for a, b in itertools.pairwise(found))
    np.testing.assert_allclose(  # nothing before it is masked
        _numbers(out.params.batch_stats["bn1"]), _numbers(tiny.batch_stats["bn1"]),
        rtol=1e-5, atol=1e-6)
    settings = _config("distilled", recalibration=3).resolve(6, (8, 8, 3))
    x, y = small_batch.images, small_batch.labels
    one_epoch = jax.jit(awm_steps.epochs, static_argnums=(5, 6))
    for suspect, still in ((0, False), (tiny.arch.num_classes, True)):  # a class; all-to-all
        state = awm_steps.init(tiny, settings)._replace(suspect=jnp.array(suspect))
        state, _ = one_epoch(jax.random.key(0), state, tiny, x, y, settings, 1)
        same = _numbers(state.batch_stats) == _numbers(tiny.batch_stats)
        assert same.all() == still, suspect
    with pytest.raises(ValueError, match="recalibration=-1"):
        _config("distilled", recalibration=-1)


def test_same_key_same_masks_other_key_other_masks(tiny, small_batch):
    def purify(seed):
        return _numbers(awm_jax.purify(tiny, small_batch, config=_config("paper"),
                                       key=jax.random.key(seed)).masks)

    np.testing.assert_array_equal(purify(1), purify(1))
    assert not np.array_equal(purify(1), purify(2))


@pytest.mark.parametrize("repair", [0, 1])
def test_second_call_compiles_nothing(tiny, small_batch, repair):
    config = _config("distilled", repair=repair)
    awm_jax.purify(tiny, small_batch, config=config, key=jax.random.key(1))
    with jax.log_compiles(), _forbid_compilation():
        awm_jax.purify(tiny, small_batch, config=config, key=jax.random.key(2))


class _forbid_compilation:
    """Fails when JAX logs that it compiled something."""

    def __enter__(self):
        import logging

        self._records = []
        self._handler = logging.Handler()
        self._handler.emit = self._records.append
        self._logger = logging.getLogger("jax")
        self._logger.addHandler(self._handler)

    def __exit__(self, *exc):
        self._logger.removeHandler(self._handler)
        compiled = [r.getMessage() for r in self._records if "Compiling" in r.getMessage()]
        assert not compiled, compiled[:3]


def test_the_compilation_guard_can_fail():
    with pytest.raises(AssertionError), jax.log_compiles(), _forbid_compilation():
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))


def test_stretches_do_not_matter(tiny, small_batch):
    seen = []
    one = awm_jax.purify(tiny, small_batch, config=_config("paper"), every=1,
                         on_epochs=lambda done, total, state, latest: seen.append((done, total)))
    two = awm_jax.purify(tiny, small_batch, config=_config("paper"), every=2)
    assert seen == [(1, 2), (2, 2)]
    np.testing.assert_allclose(_numbers(one.masks), _numbers(two.masks), atol=1e-6)
    with pytest.raises(ValueError, match="divisor"):
        awm_jax.purify(tiny, small_batch, config=_config("paper"), every=3)


def test_a_run_ends_where_its_watcher_says(tiny, small_batch):
    """With the masks from before the stretch that displeased it."""
    seen = []

    def watch(done, total, state, latest):
        seen.append(_numbers(state.masks))
        return done == 2

    out = awm_jax.purify(tiny, small_batch, config=_config("paper"), every=1, on_epochs=watch)
    assert len(seen) == 2 and np.abs(seen[1] - seen[0]).max() > 0
    np.testing.assert_array_equal(_numbers(out.masks), seen[0])


def test_a_survey_that_is_given_is_used(tiny, small_batch):
    config = _config("distilled")
    own = awm_jax.purify(tiny, small_batch, config=config, key=jax.random.key(1))
    same = awm_jax.purify(tiny, small_batch, config=config, key=jax.random.key(1),
                          survey=own.survey)
    np.testing.assert_array_equal(_numbers(own.masks), _numbers(same.masks))
    other = own.survey._replace(triggers=-own.survey.triggers, damage=own.survey.damage[::-1])
    changed = awm_jax.purify(tiny, small_batch, config=config, key=jax.random.key(1),
                             survey=other)
    assert np.abs(_numbers(changed.masks) - _numbers(own.masks)).max() > 0


def test_jit_is_eager(tiny, small_batch):
    """Each of Algorithm 1's steps, traced and not; the conformance suite has the default's run."""
    settings = _config("paper").resolve(6, (8, 8, 3))
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    state = awm_steps.init(tiny, settings)
    fled = awm_steps._fled(tiny, state.masks, images, labels, settings)
    problem = awm_steps._problem(tiny, images, labels, fled, state._replace(
        triggers=state.triggers + 0.1, suspect=jnp.array(2)), settings)
    outer, key, index = (state.masks, state.opt_state), jax.random.key(5), jnp.array(1)
    delta = problem.start(key, index, outer)
    eager = problem.settle(index, problem.ascend(key, index, delta, outer))
    compiled = problem.settle(index, jax.jit(problem.ascend)(key, index, delta, outer))
    np.testing.assert_allclose(eager[0], compiled[0], atol=1e-4)
    assert np.abs(eager[0]).max() > 0
    (masks_eager, _), info_eager = problem.descend(key, index, eager, outer)
    (masks_jit, _), info_jit = jax.jit(problem.descend)(key, index, eager, outer)
    np.testing.assert_allclose(info_eager.clean_loss, info_jit.clean_loss, rtol=1e-5)
    assert np.isclose(_numbers(masks_eager), _numbers(masks_jit), atol=1e-5).mean() > 0.995


def test_nan_is_refused_and_nonfinite_runs_say_so(tiny, small_batch):
    bad = Batch(np.full_like(small_batch.images, np.nan), small_batch.labels)
    with pytest.raises(ValueError, match="finite"):
        awm_jax.purify(tiny, bad)
    weights = jax.tree.map(lambda w: w * jnp.nan, tiny.weights)
    with pytest.raises(ValueError, match="weights"):
        awm_jax.purify(dataclasses.replace(tiny, weights=weights), small_batch)
    huge = jax.tree.map(lambda w: w * 1e30, tiny.weights)
    out = awm_jax.purify(dataclasses.replace(tiny, weights=huge), small_batch,
                         config=_config("paper"))
    assert out.status is awm.Status.NONFINITE and out.status.advice
    np.testing.assert_array_equal(_numbers(out.masks), 1.0)


@pytest.mark.parametrize("images, labels, match", [
    (np.zeros((2, 3, 16, 16), np.float32), [0, 1], "transpose"),
    (np.zeros((2, 8, 8, 3), np.uint8), [0, 1], "255"),
    (np.full((2, 8, 8, 3), 2.0, np.float32), [0, 1], "normalisation"),
    (np.zeros((2, 8, 8, 3), np.float32), [0, 9], "labels in 0..3"),
    (np.zeros((2, 8, 8, 3), np.float32), [0], "labels of shape"),
    (np.zeros((0, 8, 8, 3), np.float32), [], "at least one"),
])
def test_bad_batches(tiny, images, labels, match):
    with pytest.raises((ValueError, TypeError), match=match):
        awm_jax.purify(tiny, Batch(images, np.array(labels, np.int32)))


@pytest.mark.parametrize("options, match", [
    ({"variant": "papper"}, "official"), ({"alpha": 1.5}, "alpha=1.5"), ({"tau": -1.0}, "tau=-1"),
    ({"epochs": 0}, "epochs=0"), ({"gamma": float("nan")}, "gamma=nan"), ({"copies": -1}, "copies"),
    ({"inner_lr": 0.0}, "inner_lr"), ({"replay": 1.5}, "replay=1.5")])
def test_bad_settings_name_the_value(options, match):
    with pytest.raises(ValueError, match=match):
        awm.AWMConfig(**options)


def test_paper_and_official_constants():
    """Appendix A and Table 7; the published code."""
    paper = awm.AWMConfig(variant="paper").resolve(43, (32, 32, 3))
    assert (paper.epochs, paper.inner_steps, paper.outer_steps) == (100, 10, 10)
    assert paper.batch_size == 16
    assert (paper.alpha, paper.gamma, paper.taus, paper.inner_lr) == (0.9, 1e-8, (1000.0,), 10.0)
    assert (paper.outer_lr, paper.decay_epoch) == (0.01, 50)
    official = awm.AWMConfig(variant="official", copies=9).resolve(10, (32, 32, 3))
    assert (official.batch_size, official.inner_steps, official.outer_steps) == (32, 15, 15)
    assert (official.alpha, official.taus, official.epochs) == (0.99, (100.0,), 20)
    assert awm.AWMConfig(variant="paper").resolve(10, (64, 64, 3)).taus == (4000.0,)


def test_many_images_come_in_smaller_batches_than_the_papers():
    """From 500 on, of the project's variant and only where nothing else was asked for."""
    def at(count, **options):
        settings = awm.AWMConfig(**options).resolve(count, (32, 32, 3))
        return settings.alpha, settings.all_to_all_alpha, settings.batch_size

    assert at(43) == (0.9, 0.5, 16) and at(499) == (0.9, 0.5, 32)
    assert at(500) == at(5000) == (0.9, 0.5, 32)
    assert at(500, alpha=0.8, batch_size=128) == (0.8, 0.8, 128)
    assert at(500, variant="paper")[::2] == (0.9, 128)
    assert at(500, variant="official")[::2] == (0.99, 32)


def test_status_reads_the_end(tiny):
    state = awm_steps.init(tiny, _config("paper").resolve(6, (8, 8, 3)))
    good, bad = {"mask_mean": np.full(20, 0.9)}, {"mask_mean": np.linspace(1.0, 0.8, 20)}
    assert awm._status(state, good, 1.0) is awm.Status.OK
    assert awm._status(state, bad, 1.0) is awm.Status.NOT_CONVERGED
    assert awm._status(state, {"mask_mean": np.array([0.9])}, 1.0) is awm.Status.NOT_CONVERGED
    assert awm._status(state, good, 0.5) is awm.Status.CLEAN_ACCURACY_LOST


def test_replay_gives_images_earlier_triggers(tiny):
    """Each image gets this epoch's trigger, one of those before it, or one of the survey's."""
    settings = _config("distilled", epochs=4, batch_size=400).resolve(6, (8, 8, 3))
    now, key = jnp.zeros((8, 8, 3)), jax.random.key(0)

    def drawn(stored, epoch):
        triggers = jnp.asarray(stored)[:, None, None, None] * jnp.ones((1, 8, 8, 3))
        out = awm_batches.replayed(key, now, triggers, jnp.array(epoch), settings)[:, 0, 0, 0]
        values, counts = np.unique(out, return_counts=True)
        return dict(zip(values.tolist(), counts / 400, strict=True))

    assert drawn([1.0, 2.0, 3.0, 4.0], 0) == {0.0: 1.0}  # nothing is earlier than the first
    third = drawn([1.0, 2.0, 3.0, 4.0], 2)
    assert list(third) == [0.0, 1.0, 2.0]  # never one of its own future
    np.testing.assert_allclose(list(third.values()), [0.25, 0.375, 0.375], atol=0.08)
    surveyed = drawn([1.0, 2.0, 3.0, 4.0, 8.0, 9.0], 1)
    assert list(surveyed) == [0.0, 1.0, 8.0, 9.0]
    np.testing.assert_allclose(list(surveyed.values()), [0.25] * 4, atol=0.08)


def test_masks_of_the_default_never_rise(tiny, small_batch):
    """Epoch by epoch no mask goes up; the paper's steps let some."""
    rises = {}
    for variant in ("distilled", "paper"):
        seen = []
        awm_jax.purify(tiny, small_batch, config=_config(variant), every=1,
                       on_epochs=lambda done, total, state, latest, seen=seen: seen.append(
                           _numbers(state.masks)))
        rises[variant] = bool((seen[1] > seen[0]).any())
    assert rises == {"distilled": False, "paper": True}


def test_every_trigger_is_kept_for_replay(tiny, small_batch):
    """The stored triggers are the ones the epochs found, in order; without replay only the last."""
    for variant, kept in (("distilled", 2 + 4), ("paper", 1)):
        seen = []
        out = awm_jax.purify(tiny, small_batch, config=_config(variant), every=1,
                             on_epochs=lambda d, t, state, latest, seen=seen: seen.append(state))
        first, last = (np.asarray(s.triggers) for s in seen)
        assert len(first) == len(last) == kept
        if variant == "distilled":
            assert np.abs(first[0]).max() > 0 and not first[1].any() and last[1].any()
            np.testing.assert_array_equal(first[0], last[0])
            order = (-out.survey.damage).argsort()
            np.testing.assert_array_equal(last[2:], out.survey.triggers[order])
            np.testing.assert_array_equal(out.trigger, out.survey.triggers[order[0]])
        else:
            assert np.abs(first - last).max() > 0 and out.survey is None


def test_layers_can_be_chosen(tiny, small_batch):
    out = awm_jax.purify(tiny, small_batch, config=_config("paper", layers=("conv2",)))
    assert list(masks.by_layer(out.masks)) == ["conv2"]
    np.testing.assert_array_equal(out.params.weights["conv1"]["kernel"],
                                  tiny.weights["conv1"]["kernel"])


def test_the_first_resolution_is_masked_against_all_to_all_alone(tiny, small_batch):
    settings = _config("distilled", epochs=1).resolve(6, tiny.arch.image_shape)
    x, y = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    begin = awm_steps.init(tiny, settings)
    step = jax.jit(awm_steps.step, static_argnames="settings")
    for suspect, moved in ((0, ["conv2"]), (tiny.arch.num_classes, ["conv1", "conv2"])):
        state = begin._replace(suspect=jnp.array(suspect))
        state, _ = step(jax.random.key(0), state, tiny, x, y, settings)
        found = masks.by_layer(state.masks)
        assert [name for name, m in found.items() if (m != 1).any()] == moved


@pytest.mark.parametrize("all_to_all", [False, True])
def test_a_known_survey_spares_work_and_changes_nothing(tiny64, small_batch, all_to_all):
    """Two epochs either way, in float64, as Adam's first steps make much of a gradient's sign."""
    settings = _config("distilled", epochs=2).resolve(6, tiny64.arch.image_shape)
    x, y = jnp.asarray(small_batch.images, jnp.float64), jnp.asarray(small_batch.labels)
    found = jax.jit(awm_steps.look, static_argnames="settings")(
        jax.random.key(0), tiny64, x, y, settings)
    found = found._replace(stay=jnp.array(0.0 if all_to_all else 1.0), kept=jnp.array(4.0))
    assert (int(found.suspect) == tiny64.arch.num_classes) == all_to_all
    known = awm_spare.after_survey(settings, found, tiny64.arch)
    assert (known.spare, known.spared) == (not all_to_all, not all_to_all)
    epochs = jax.jit(awm_steps.epochs, static_argnames=("settings", "length"))
    ends = [epochs(jax.random.key(0), awm_steps.init(tiny64, settings, found), tiny64, x, y, s, 2)
            for s in (settings, known)]
    for a, b in zip(*(jax.tree.leaves((state.masks, info)) for state, info in ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
    assert (ends[1][0].masks["conv1"]["kernel"] == 1).all() != all_to_all
    assert (ends[1][0].masks["conv2"]["kernel"] != 1).any()


def test_spared_layers_are_not_derived(tiny, small_batch):
    """Their kernel's gradients, a product of patches each, are gone from the mask step."""
    settings = _config("distilled", epochs=1).resolve(6, tiny.arch.image_shape)
    x, y = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    state = awm_steps.init(tiny, settings)

    def flops(settings):
        lowered = jax.jit(awm_steps.step, static_argnames="settings").lower(
            jax.random.key(0), state, tiny, x, y, settings)
        return lowered.compile().cost_analysis()["flops"]

    assert flops(awm_spare.after_survey(settings, None, tiny.arch)) < 0.95 * flops(settings)


def test_deep_masks_are_those_of_the_deep_convolutions(tiny):
    settings = _config("paper", layers="deep").resolve(6, tiny.arch.image_shape)
    assert masks.layer_names(awm_steps.init(tiny, settings).masks) == ["conv2"]


def test_a_network_without_convolutions_is_masked_all_the_same():
    arch = Arch(name="mlp", num_classes=3, image_shape=(8, 8, 1))
    params = models.create(jax.random.key(0), arch)
    settings = _config("distilled", layers="deep").resolve(6, arch.image_shape)
    assert masks.layer_names(awm_steps.init(params, settings).masks) == ["fc1", "fc2", "fc3", "fc4"]


def test_what_the_trigger_flees_is_the_masked_networks_own_answer(tiny, small_batch):
    m = jax.tree.map(lambda leaf: 0.5 * leaf, masks.init(tiny.weights))
    x, y = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    own = models.apply(tiny, x, masks=m).argmax(axis=1)
    # Batches of 4 do not divide the 6 images.
    settings = _config("official", batch_size=4).resolve(len(x), tiny.arch.image_shape)
    np.testing.assert_array_equal(awm_steps._fled(tiny, m, x, y, settings), own)
    settings = _config("paper").resolve(len(x), tiny.arch.image_shape)
    assert awm_steps._fled(tiny, m, x, y, settings) is y
    settings = _config("distilled").resolve(len(x), tiny.arch.image_shape)
    assert awm_steps._fled(tiny, m, x, y, settings) is None


def test_lists_do_for_tuples():
    """A config is a static argument of `jit`, so what it holds is hashable."""
    lists, tuples = (awm_jax.AWMConfig(variant="paper", tau=kind([100.0, 50.0]),
                                       layers=kind(["conv1"])) for kind in (list, tuple))
    assert hash(lists) == hash(tuples)


def test_purify_names_another_defences_config_and_another_networks_survey(tiny, small_batch):
    with pytest.raises(TypeError, match="type AWMConfig, got TuneConfig"):
        awm.purify(tiny, small_batch, config=defences.ft.default)
    survey = Survey(*(jnp.zeros(1) for _ in Survey._fields))._replace(
        triggers=jnp.zeros((7, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"survey of this network.*got \[7, 8, 8, 3\]"):
        awm.purify(tiny, small_batch, survey=survey)
    with pytest.raises(ValueError, match="Expected no survey"):
        awm.purify(tiny, small_batch, survey=survey, config=awm_jax.AWMConfig(variant="paper"))


@pytest.mark.parametrize("call", [awm.purify, detection.scan, defences.ft])
def test_a_network_or_a_batch_of_another_kind_is_named(tiny, small_batch, call):
    with pytest.raises(TypeError, match=r"awm_jax\.Params, got dict"):
        call({"conv1": 1}, small_batch)
    with pytest.raises(TypeError, match=r"awm_jax\.Batch.*got ndarray"):
        call(tiny, np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"One image is images\[None\]"):
        call(tiny, (np.zeros((8, 8, 3), np.float32), [0]))
