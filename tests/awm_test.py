"""Adversarial Weight Masking: against PyTorch, by hand, and by its properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awm_jax
from awm_jax import losses, masks, models, projections
from awm_jax.defences import awm, awm_steps
from awm_jax.defences.survey import Survey, log_odds
from awm_jax.types import Arch, Batch

QUICK = {"epochs": 2, "inner_steps": 2, "outer_steps": 2, "batch_size": 4, "tau": 100.0}
VARIANTS = ["distilled", "paper", "official"]


def _config(variant, **overrides):
    return awm.AWMConfig(variant=variant, **{**QUICK, **overrides})


def _numbers(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_bound_and_history(variant, small_params, small_batch):
    config = _config(variant)
    out = awm_jax.purify(small_params, small_batch, config=config)
    values = _numbers(out.masks)
    assert 0 <= values.min() and values.max() <= 1 and (values < 1).any()
    bound = 100.0 * 8 * 8 / 1024 * (2 if variant == "distilled" else 1)  # the survey's is twice
    assert np.abs(out.trigger).sum() <= bound * (1 + 1e-5)
    assert np.abs(out.trigger).sum() > 0
    assert {len(v) for v in out.history.values()} == {2}
    assert isinstance(out.params, awm_jax.Params) and out.params.arch == small_params.arch
    np.testing.assert_allclose(
        models.apply(out.params, small_batch.images),
        models.apply(small_params, small_batch.images, masks=out.masks), rtol=1e-5, atol=1e-5)
    for name in ("bn1", "dense"):
        np.testing.assert_array_equal(_numbers(out.params.weights[name]),
                                      _numbers(small_params.weights[name]))


def test_same_key_same_masks_other_key_other_masks(small_params, small_batch):
    def purify(seed):
        return _numbers(awm_jax.purify(small_params, small_batch, config=_config("paper"),
                                       key=jax.random.key(seed)).masks)

    np.testing.assert_array_equal(purify(1), purify(1))
    assert not np.array_equal(purify(1), purify(2))


def test_second_call_compiles_nothing(small_params, small_batch):
    config = _config("distilled")
    awm_jax.purify(small_params, small_batch, config=config, key=jax.random.key(1))
    with jax.log_compiles(), _forbid_compilation():
        awm_jax.purify(small_params, small_batch, config=config, key=jax.random.key(2))


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


def test_vmap_over_keys_is_the_loop(x64, small_params, small_batch):
    """In float64: Adam's first steps are +-lr whatever the gradient's size, so in float32 a sign
    that is zero up to rounding moves a mask either way."""
    params = dataclasses.replace(small_params, weights=_as64(small_params.weights),
                                 batch_stats=_as64(small_params.batch_stats))
    data = (jnp.asarray(small_batch.images, jnp.float64), jnp.asarray(small_batch.labels),
            _config("distilled").resolve(6, (8, 8, 3)))
    keys = jax.random.split(jax.random.key(3), 2)
    run = jax.jit(awm_steps.run, static_argnums=4)
    together, info = jax.jit(jax.vmap(awm_steps.run, in_axes=(0, None, None, None, None)),
                             static_argnums=4)(keys, params, *data)
    for i, key in enumerate(keys):
        alone, alone_info = run(key, params, *data)
        ours = _numbers(jax.tree.map(lambda x, i=i: x[i], together.masks))
        assert ours.dtype == np.float64 and (ours < 1).any()
        assert np.isclose(ours, _numbers(alone.masks), atol=1e-6).mean() > 0.9999
        np.testing.assert_allclose(info.clean_loss[i], alone_info.clean_loss, rtol=1e-6)


def test_stretches_do_not_matter(small_params, small_batch):
    seen = []
    one = awm_jax.purify(small_params, small_batch, config=_config("paper"), every=1,
                         on_epochs=lambda done, total, state, latest: seen.append((done, total)))
    two = awm_jax.purify(small_params, small_batch, config=_config("paper"), every=2)
    assert seen == [(1, 2), (2, 2)]
    np.testing.assert_allclose(_numbers(one.masks), _numbers(two.masks), atol=1e-6)
    with pytest.raises(ValueError, match="divisor"):
        awm_jax.purify(small_params, small_batch, config=_config("paper"), every=3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_jit_is_eager(variant, small_params, small_batch):
    """Each of Algorithm 1's steps, traced and not."""
    settings = _config(variant).resolve(6, (8, 8, 3))
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    state = awm_steps.init(small_params, settings)
    fled = awm_steps._fled(small_params, state.masks, images, labels, settings)
    problem = awm_steps._problem(small_params, images, labels, fled, state.triggers + 0.1,
                                 jnp.array(2), settings)
    outer, key, index = (state.masks, state.opt_state), jax.random.key(5), jnp.array(1)
    delta = problem.start(key, index, outer)
    eager = problem.settle(index, problem.ascend(key, index, delta, outer))
    compiled = problem.settle(index, jax.jit(problem.ascend)(key, index, delta, outer))
    np.testing.assert_allclose(eager, compiled, atol=1e-4)
    assert np.abs(eager).max() > 0
    (masks_eager, _), info_eager = problem.descend(key, index, eager, outer)
    (masks_jit, _), info_jit = jax.jit(problem.descend)(key, index, eager, outer)
    np.testing.assert_allclose(info_eager.clean_loss, info_jit.clean_loss, rtol=1e-5)
    assert np.isclose(_numbers(masks_eager), _numbers(masks_jit), atol=1e-5).mean() > 0.995


def test_nan_is_refused_and_nonfinite_runs_say_so(small_params, small_batch):
    bad = Batch(np.full_like(small_batch.images, np.nan), small_batch.labels)
    with pytest.raises(ValueError, match="finite"):
        awm_jax.purify(small_params, bad)
    weights = jax.tree.map(lambda w: w * jnp.nan, small_params.weights)
    with pytest.raises(ValueError, match="weights"):
        awm_jax.purify(dataclasses.replace(small_params, weights=weights), small_batch)
    huge = jax.tree.map(lambda w: w * 1e30, small_params.weights)
    out = awm_jax.purify(dataclasses.replace(small_params, weights=huge), small_batch,
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
def test_bad_batches(small_params, images, labels, match):
    with pytest.raises((ValueError, TypeError), match=match):
        awm_jax.purify(small_params, Batch(images, np.array(labels, np.int32)))


@pytest.mark.parametrize("options, match", [
    ({"variant": "papper"}, "official"), ({"alpha": 1.5}, "alpha=1.5"), ({"tau": -1.0}, "tau=-1"),
    ({"epochs": 0}, "epochs=0"), ({"gamma": float("nan")}, "gamma=nan"), ({"copies": -1}, "copies"),
    ({"inner_lr": 0.0}, "inner_lr"), ({"replay": 1.5}, "replay=1.5")])
def test_bad_settings_name_the_value(options, match):
    with pytest.raises(ValueError, match=match):
        awm.AWMConfig(**options)


def test_paper_and_official_constants():
    """Appendix A and Table 7; guides/peers.md for the published code."""
    paper = awm.AWMConfig(variant="paper").resolve(43, (32, 32, 3))
    assert (paper.epochs, paper.inner_steps, paper.outer_steps) == (100, 10, 10)
    assert paper.batch_size == 16
    assert (paper.alpha, paper.gamma, paper.taus, paper.inner_lr) == (0.9, 1e-8, (1000.0,), 10.0)
    assert (paper.outer_lr, paper.decay_epoch) == (0.01, 50)
    official = awm.AWMConfig(variant="official", copies=9).resolve(10, (32, 32, 3))
    assert (official.batch_size, official.inner_steps, official.outer_steps) == (32, 15, 15)
    assert (official.alpha, official.taus, official.epochs) == (0.99, (100.0,), 20)
    assert awm.AWMConfig(variant="paper").resolve(10, (64, 64, 3)).taus == (4000.0,)


def test_status_reads_the_end(small_params):
    state = awm_steps.init(small_params, _config("paper").resolve(6, (8, 8, 3)))
    good, bad = {"mask_mean": np.full(20, 0.9)}, {"mask_mean": np.linspace(1.0, 0.8, 20)}
    assert awm._status(state, good, 1.0) is awm.Status.OK
    assert awm._status(state, bad, 1.0) is awm.Status.NOT_CONVERGED
    assert awm._status(state, {"mask_mean": np.array([0.9])}, 1.0) is awm.Status.NOT_CONVERGED
    assert awm._status(state, good, 0.5) is awm.Status.CLEAN_ACCURACY_LOST


def test_replay_gives_images_earlier_triggers(small_params):
    """Each image gets this epoch's trigger, one of those before it, or one of the survey's."""
    settings = _config("distilled", epochs=4, batch_size=400).resolve(6, (8, 8, 3))
    now, key = jnp.zeros((8, 8, 3)), jax.random.key(0)

    def drawn(stored, epoch):
        triggers = jnp.asarray(stored)[:, None, None, None] * jnp.ones((1, 8, 8, 3))
        out = awm_steps._replayed(key, now, triggers, jnp.array(epoch), settings)[:, 0, 0, 0]
        values, counts = np.unique(out, return_counts=True)
        return dict(zip(values.tolist(), counts / 400, strict=True))

    assert drawn([1.0, 2.0, 3.0, 4.0], 0) == {0.0: 1.0}  # nothing is earlier than the first
    third = drawn([1.0, 2.0, 3.0, 4.0], 2)
    assert list(third) == [0.0, 1.0, 2.0]  # never one of its own future
    np.testing.assert_allclose(list(third.values()), [0.25, 0.375, 0.375], atol=0.08)
    surveyed = drawn([1.0, 2.0, 3.0, 4.0, 8.0, 9.0], 1)
    assert list(surveyed) == [0.0, 1.0, 8.0, 9.0]
    np.testing.assert_allclose(list(surveyed.values()), [0.25] * 4, atol=0.08)


def test_masks_of_the_default_never_rise(small_params, small_batch):
    """Epoch by epoch no mask goes up; the paper's steps let some."""
    rises = {}
    for variant in ("distilled", "paper"):
        seen = []
        awm_jax.purify(small_params, small_batch, config=_config(variant), every=1,
                       on_epochs=lambda done, total, state, latest, seen=seen: seen.append(
                           _numbers(state.masks)))
        rises[variant] = bool((seen[1] > seen[0]).any())
    assert rises == {"distilled": False, "paper": True}


def test_every_trigger_is_kept_for_replay(small_params, small_batch):
    """The stored triggers are the ones the epochs found, in order; without replay only the last."""
    for variant, kept in (("distilled", 2 + 4), ("paper", 1)):
        seen = []
        out = awm_jax.purify(small_params, small_batch, config=_config(variant), every=1,
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


def test_layers_can_be_chosen(small_params, small_batch):
    out = awm_jax.purify(small_params, small_batch, config=_config("paper", layers=("conv2",)))
    assert list(masks.by_layer(out.masks)) == ["conv2"]
    np.testing.assert_array_equal(out.params.weights["conv1"]["kernel"],
                                  small_params.weights["conv1"]["kernel"])


def _as64(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), tree)


def test_trigger_and_mask_gradients_equal_finite_differences(x64, small_params, small_batch):
    params = dataclasses.replace(small_params, weights=_as64(small_params.weights),
                                 batch_stats=_as64(small_params.batch_stats))
    x = jnp.asarray(small_batch.images, jnp.float64)
    y = jnp.asarray(small_batch.labels)
    rng = np.random.default_rng(1)
    delta = jnp.asarray(0.01 * rng.normal(size=(8, 8, 3)))
    m = masks.init(params.weights)
    settings = _config("paper").resolve(6, (8, 8, 3))

    def trigger_loss(d):
        return losses.cross_entropy(models.apply(params, x + d[None], masks=m), y)

    def mask_loss(m):
        return awm_steps.mask_loss(params, m, delta, x, y, settings)[0]

    along = jnp.asarray(rng.normal(size=delta.shape))
    slope = (trigger_loss(delta + 1e-6 * along) - trigger_loss(delta - 1e-6 * along)) / 2e-6
    gradient = awm_steps.trigger_gradient(params, m, delta, x, y, clamp=False)
    np.testing.assert_allclose((gradient * along).sum(), slope, rtol=1e-4)

    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), m)

    def move(step):
        return jax.tree.map(lambda a, b: a + step * b, m, along)

    slope = (mask_loss(move(1e-7)) - mask_loss(move(-1e-7))) / 2e-7
    total = sum((a * b).sum() for a, b in zip(
        jax.tree.leaves(jax.grad(mask_loss)(m)), jax.tree.leaves(along), strict=True))
    np.testing.assert_allclose(total, slope, rtol=1e-4)


def test_one_trigger_step_one_mask_step_and_the_projection_equal_pytorch(x64):
    """A float64 PyTorch module written here, from the equations, with its own autograd and Adam."""
    torch = pytest.importorskip("torch")
    from awm_jax import torch_compat
    from experiments import benchmark_torch

    torch.manual_seed(0)
    net = benchmark_torch.torch_small_vgg(10).double()
    for module in net.features:
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.normal_(module.running_mean, 0.0, 0.2)
    params = torch_compat.params_from_state_dict(net.state_dict(),
                                                 Arch(name="small_vgg", num_classes=10))
    # The reader gives float32, as users want; the test wants the float64 numbers themselves.
    def exact(tensor):
        return jnp.asarray(tensor.detach().numpy(), jnp.float64)

    numbers = [0, 3, 8, 11, 16, 19]
    weights, stats = dict(params.weights), {}
    for i, n in enumerate(numbers, start=1):
        conv, norm = net.features[n], net.features[n + 1]
        weights[f"conv{i}"] = {"kernel": exact(conv.weight).transpose(2, 3, 1, 0),
                               "bias": exact(conv.bias)}
        weights[f"bn{i}"] = {"scale": exact(norm.weight), "bias": exact(norm.bias)}
        stats[f"bn{i}"] = {"mean": exact(norm.running_mean), "var": exact(norm.running_var)}
    dense = exact(net.classifier.weight).reshape(10, 128, 4, 4).transpose(2, 3, 1, 0)
    weights["dense"] = {"kernel": dense.reshape(2048, 10), "bias": exact(net.classifier.bias)}
    params = dataclasses.replace(params, weights=weights, batch_stats=stats)

    rng = np.random.default_rng(0)
    images, labels = rng.random((4, 32, 32, 3)), rng.integers(0, 10, 4)
    x = torch.tensor(images.transpose(0, 3, 1, 2))
    y = torch.tensor(labels)
    kernels = [net.features[n].weight.detach().clone() for n in numbers]
    mask_rng = np.random.default_rng(1)
    tmasks = [torch.tensor(mask_rng.uniform(0.2, 0.8, k.shape), requires_grad=True)
              for k in kernels]

    def forward(x):
        return torch.func.functional_call(
            net, {f"features.{n}.weight": k * m
                  for n, k, m in zip(numbers, kernels, tmasks, strict=True)}, (x,))

    ones = masks.init(params.weights)
    jmasks = jax.tree.map(lambda m: m, ones)
    for i, m in enumerate(tmasks, start=1):
        jmasks[f"conv{i}"]["kernel"] = exact(m).transpose(2, 3, 1, 0)

    tdelta = torch.zeros(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    # autograd.grad, not backward(): that would leave its gradient on the masks too.
    tloss = torch.nn.functional.cross_entropy(forward(x + tdelta), y)
    tdelta = (tdelta + 10.0 * torch.autograd.grad(tloss, tdelta)[0]).detach()
    jx, jy = jnp.asarray(images), jnp.asarray(labels)
    delta = jnp.zeros((32, 32, 3), jnp.float64)
    delta = delta + 10.0 * awm_steps.trigger_gradient(params, jmasks, delta, jx, jy, clamp=False)
    np.testing.assert_allclose(delta, tdelta[0].numpy().transpose(1, 2, 0), rtol=1e-6, atol=1e-12)

    tau = 0.3 * float(tdelta.abs().sum())
    tdelta = tdelta * min(1.0, tau / float(tdelta.abs().sum()))
    delta = projections.scale_to_l1(delta, tau)
    np.testing.assert_allclose(delta, tdelta[0].numpy().transpose(1, 2, 0), rtol=1e-6, atol=1e-12)

    optimiser = torch.optim.Adam(tmasks, lr=0.01)
    ce = torch.nn.functional.cross_entropy
    loss = (0.9 * ce(forward(x), y) + (1 - 0.9) * ce(forward(x + tdelta), y)
            + 1e-8 * sum(m.abs().sum() for m in tmasks))
    loss.backward()
    optimiser.step()
    settings = awm.AWMConfig(variant="paper").resolve(4, (32, 32, 3))
    (value, _), gradients = jax.value_and_grad(
        lambda m: awm_steps.mask_loss(params, m, delta, jx, jy, settings), has_aux=True)(jmasks)
    adam = optax.adam(0.01)
    updates, _ = adam.update(gradients, adam.init(jmasks), jmasks)
    jmasks = masks.clip(optax.apply_updates(jmasks, updates))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    for i, m in enumerate(tmasks, start=1):
        expected = m.detach().clamp(0, 1).numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(jmasks[f"conv{i}"]["kernel"], expected, rtol=1e-6)


def test_what_the_trigger_flees_is_the_masked_networks_own_answer(small_params, small_batch):
    m = jax.tree.map(lambda leaf: 0.5 * leaf, masks.init(small_params.weights))
    x, y = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    own = models.apply(small_params, x, masks=m).argmax(axis=1)
    # Batches of 4 do not divide the 6 images.
    settings = _config("official", batch_size=4).resolve(len(x), small_params.arch.image_shape)
    np.testing.assert_array_equal(awm_steps._fled(small_params, m, x, y, settings), own)
    settings = _config("paper").resolve(len(x), small_params.arch.image_shape)
    assert awm_steps._fled(small_params, m, x, y, settings) is y
    settings = _config("distilled").resolve(len(x), small_params.arch.image_shape)
    assert awm_steps._fled(small_params, m, x, y, settings) is None


def test_every_second_trigger_pursues_the_suspect(small_params, small_batch):
    """It raises that class's log-odds, and its L1 norm may be four times the others'."""
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    settings = dataclasses.replace(_config("distilled", inner_lr=0.5).resolve(6, (8, 8, 3)),
                                   taus=(0.5,))
    state = awm_steps.init(small_params, settings)
    outer = (state.masks, state.opt_state)

    def trigger(suspect, epoch):
        problem = awm_steps._problem(small_params, images, labels, None, state.triggers,
                                     jnp.array(suspect), settings)
        delta = problem.start(None, epoch, outer)
        for key in jax.random.split(jax.random.key(1), 8):
            delta = problem.ascend(key, epoch, delta, outer)
        return delta

    def odds(delta, target):
        logits = models.apply(small_params, jnp.clip(images + delta[None], 0, 1))
        return float(log_odds(logits, jnp.array(target)))

    pursued = {k: trigger(k, 3) for k in (0, 2)}
    for target, delta in pursued.items():
        assert odds(delta, target) > odds(jnp.zeros_like(delta), target)
        assert 0.5 * 1.01 < float(jnp.abs(delta).sum()) <= 4 * 0.5 * (1 + 1e-5)
    assert np.abs(pursued[0] - pursued[2]).max() > 0
    # Its turn has not come, the survey's own trigger is gone on from, there was no survey.
    for suspect, epoch in ((2, 0), (2, 1), (-1, 3)):
        assert 0 < float(jnp.abs(trigger(suspect, epoch)).sum()) <= 0.5 * (1 + 1e-5)


def test_second_epoch_starts_from_the_worst_surveyed_trigger(small_params, small_batch):
    images, labels = jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels)
    settings = _config("distilled").resolve(6, (8, 8, 3))
    rng = np.random.default_rng(0)
    found = Survey(jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32),
                   jnp.array([1.0, 2.0, 9.0, 3.0]))

    def start(found, epoch):
        state = awm_steps.init(small_params, settings, found)
        problem = awm_steps._problem(small_params, images, labels, None, state.triggers,
                                     state.suspect, settings)
        return np.asarray(problem.start(jax.random.key(0), jnp.array(epoch), None))

    np.testing.assert_array_equal(start(found, 1), found.triggers[2])
    for arguments in ((found, 0), (found, 2), (found, 3), (None, 1)):
        np.testing.assert_array_equal(start(*arguments), 0.0)


def test_gradient_towards_a_class_equals_finite_differences(x64, small_params, small_batch):
    params = dataclasses.replace(small_params, weights=_as64(small_params.weights),
                                 batch_stats=_as64(small_params.batch_stats))
    x = jnp.asarray(small_batch.images, jnp.float64)
    rng = np.random.default_rng(2)
    delta, along = (jnp.asarray(0.01 * rng.normal(size=(8, 8, 3))) for _ in range(2))
    m = masks.init(params.weights)

    def value(d):
        return log_odds(models.apply(params, x + d[None], masks=m), 3)

    slope = (value(delta + 1e-5 * along) - value(delta - 1e-5 * along)) / 2e-5
    gradient = awm_steps.trigger_gradient(params, m, delta, x, jnp.zeros(len(x), jnp.int32),
                                          clamp=False, towards=(jnp.array(True), jnp.array(3)))
    np.testing.assert_allclose((gradient * along).sum(), slope, rtol=1e-5)
