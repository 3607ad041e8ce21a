"""AWM's gradients and steps against finite differences and PyTorch, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awm_jax import losses, masks, models, projections
from awm_jax.defences import awm_losses, chunks
from awm_jax.defences import awm_purify as awm
from awm_jax.defences.survey import log_odds
from awm_jax.types import Arch


def test_trigger_and_mask_gradients_equal_finite_differences(tiny64, small_batch):
    params = tiny64
    x = jnp.asarray(small_batch.images, jnp.float64)
    y = jnp.asarray(small_batch.labels)
    rng = np.random.default_rng(1)
    delta = jnp.asarray(0.01 * rng.normal(size=(8, 8, 3)))
    m = masks.init(params.weights)
    settings = awm.AWMConfig(variant="paper", epochs=2, tau=100.0).resolve(6, (8, 8, 3))

    def trigger_loss(d):
        return losses.cross_entropy(models.apply(params, x + d[None], masks=m), y)

    def mask_loss(m):
        return awm_losses.mask_loss(params, m, delta, x, y, settings)[0]

    along = jnp.asarray(rng.normal(size=delta.shape))
    slope = (trigger_loss(delta + 1e-6 * along) - trigger_loss(delta - 1e-6 * along)) / 2e-6
    gradient, _ = awm_losses.trigger_gradient(params, m, delta, x, y, clamp=False)
    np.testing.assert_allclose((gradient * along).sum(), slope, rtol=1e-4)

    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), m)

    def move(step):
        return jax.tree.map(lambda a, b: a + step * b, m, along)

    slope = (mask_loss(move(1e-7)) - mask_loss(move(-1e-7))) / 2e-7
    total = sum((a * b).sum() for a, b in zip(
        jax.tree.leaves(jax.grad(mask_loss)(m)), jax.tree.leaves(along), strict=True))
    np.testing.assert_allclose(total, slope, rtol=1e-4)


@pytest.mark.parametrize("own_triggers", [False, True])
def test_a_large_batch_in_parts_makes_the_same_mask_step(tiny64, monkeypatch, own_triggers):
    """24 images as two parts of 12, against one pass; labels and logits by turns."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.uniform(keys[0], (24, 8, 8, 3), jnp.float64)
    delta = 0.1 * jax.random.normal(keys[1], (24, 8, 8, 3) if own_triggers else (8, 8, 3))
    m = jax.tree.map(lambda leaf: 0.9 * leaf, masks.init(tiny64.weights))
    classes = tiny64.arch.num_classes
    target = (jax.nn.softmax(jax.random.normal(keys[2], (24, classes))) if own_triggers
              else jax.random.randint(keys[3], (24,), 0, classes))
    settings = awm.AWMConfig(variant="paper", epochs=2, gamma=0.01).resolve(24, (8, 8, 3))
    passes = []
    whole_loss = awm_losses.mask_loss

    def watched(params, m, delta, images, *rest):
        passes.append(len(images))
        return whole_loss(params, m, delta, images, *rest)

    monkeypatch.setattr(awm_losses, "mask_loss", watched)
    found = jax.jit(lambda m: awm_losses.mask_gradient(tiny64, m, delta, x, target, settings, 0.8)
                    )(m)
    assert set(passes) == {12}
    expected = jax.grad(
        lambda m: whole_loss(tiny64, m, delta, x, target, settings, 0.8), has_aux=True)(m)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count, size, parts", [
    (128, 16, [16]), (24, 16, [12]), (16, 16, [16]), (7, 16, [7]),
    (43, 16, [43]),  # no divisor of at least half the size: everything at once
])
def test_parts_are_equal_and_not_too_small(count, size, parts):
    seen = []

    def fun(x):
        seen.append(len(x))
        return x.mean()

    found = chunks.mean(fun, [jnp.arange(float(count))], size)
    np.testing.assert_allclose(found, (count - 1) / 2, rtol=1e-6)
    assert sorted(set(seen)) == parts


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
    steepest = jax.jit(awm_losses.trigger_gradient, static_argnames="clamp")
    delta = delta + 10.0 * steepest(params, jmasks, delta, jx, jy, clamp=False)[0]
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
    (value, _), gradients = jax.jit(jax.value_and_grad(
        lambda m: awm_losses.mask_loss(params, m, delta, jx, jy, settings), has_aux=True))(jmasks)
    adam = optax.adam(0.01)
    updates, _ = adam.update(gradients, adam.init(jmasks), jmasks)
    jmasks = masks.clip(optax.apply_updates(jmasks, updates))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    for i, m in enumerate(tmasks, start=1):
        expected = m.detach().clamp(0, 1).numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(jmasks[f"conv{i}"]["kernel"], expected, rtol=1e-6)


def test_gradient_towards_a_class_equals_finite_differences(tiny64, small_batch):
    params = tiny64
    x = jnp.asarray(small_batch.images, jnp.float64)
    rng = np.random.default_rng(2)
    delta, along = (jnp.asarray(0.01 * rng.normal(size=(8, 8, 3))) for _ in range(2))
    m = masks.init(params.weights)

    def value(d):
        return log_odds(models.apply(params, x + d[None], masks=m), 3)

    slope = (value(delta + 1e-5 * along) - value(delta - 1e-5 * along)) / 2e-5
    gradient, _ = awm_losses.trigger_gradient(params, m, delta, x, jnp.zeros(len(x), jnp.int32),
                                             clamp=False, towards=(jnp.array(True), jnp.array(3)))
    np.testing.assert_allclose((gradient * along).sum(), slope, rtol=1e-5)
