"""Feature Shift Tuning: the norm by hand, whole runs against PyTorch, the shift itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_network import linear_case

from awm_jax.defences import tuning
from awm_jax.defences.fst import FSTConfig, _method, fresh_classifier, rescale, shifted


def test_rescaling_by_hand():
    np.testing.assert_allclose(rescale(jnp.array([[3.0], [-4.0]]), jnp.array(1.0)), [[0.6], [-0.8]],
                               rtol=1e-6)
    assert (rescale(jnp.zeros((2, 2)), jnp.array(1.0)) == 0).all()


def test_a_new_classifier_owes_nothing_to_the_old():
    dense = {"kernel": jnp.full((100, 10), 5.0), "bias": jnp.full(10, 5.0)}
    drawn = fresh_classifier(jax.random.key(0), dense)
    other = fresh_classifier(jax.random.key(1), dense)
    for name, leaf in drawn.items():
        assert leaf.shape == dense[name].shape and (jnp.abs(leaf) <= 0.1).all()
        assert (leaf != other[name]).all()
    assert np.isclose(drawn["kernel"].std(), 0.1 / np.sqrt(3), rtol=0.1)


def test_the_shift_adds_alpha_times_the_suspect_kernel(x64, monkeypatch):
    params, images, labels = linear_case(monkeypatch)
    args = jax.random.key(0), params, images, labels
    suspect = jnp.asarray(np.random.default_rng(0).normal(
        size=params.weights["dense"]["kernel"].shape))
    plain = jax.jit(tuning.plain(tuning.cross_entropy))(*args)
    found = jax.jit(tuning.plain(shifted(tuning.cross_entropy, "dense", suspect, 0.3)))(*args)
    inner = float((params.weights["dense"]["kernel"] * suspect).sum())
    assert np.isclose(found[2], plain[2] + 0.3 * inner, rtol=1e-10)
    np.testing.assert_allclose(found[0]["dense"]["kernel"],
                               plain[0]["dense"]["kernel"] + 0.3 * suspect, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found[0]["dense"]["bias"], plain[0]["dense"]["bias"], rtol=1e-9)


def test_whole_run_is_pytorchs(x64, monkeypatch):
    torch = pytest.importorskip("torch")
    params, x, y = linear_case(monkeypatch)
    key = jax.random.key(0)
    config = FSTConfig(epochs=6, crop=0, lr=0.1)
    tuned, info = _method(key, params, x, y, config)

    drawn = fresh_classifier(jax.random.split(key)[0], params.weights["dense"])
    kernel, bias = (torch.tensor(np.asarray(drawn[name]), requires_grad=True)
                    for name in ("kernel", "bias"))
    rule = torch.optim.SGD([kernel, bias], 0.1, momentum=0.9)
    old, flat, targets = (torch.tensor(np.asarray(a)) for a in (
        params.weights["dense"]["kernel"], x.reshape(7, -1), y))
    values = []
    for step in range(6):
        rule.param_groups[0]["lr"] = 0.1 * (1 + np.cos(np.pi * step / 6)) / 2
        rule.zero_grad()
        loss = torch.nn.functional.cross_entropy(flat @ kernel + bias, targets)
        loss = loss + 0.2 * (kernel * old).sum()
        loss.backward()
        values.append(loss.item())
        rule.step()
        kernel.data = kernel.data * old.norm() / kernel.data.norm()
    np.testing.assert_allclose(info["loss"], values, rtol=1e-10)
    np.testing.assert_allclose(tuned.weights["dense"]["kernel"], kernel.detach(), rtol=1e-9)
    np.testing.assert_allclose(tuned.weights["dense"]["bias"], bias.detach(), rtol=1e-9)


def test_the_norm_is_kept_and_the_classifier_turns_away(monkeypatch):
    params, images, labels = linear_case(monkeypatch, jnp.float32)
    old = params.weights["dense"]["kernel"]
    cosines = []
    for alpha in (0.0, 2.0):
        config = FSTConfig(epochs=5, batch_size=4, crop=0, alpha=alpha)
        tuned, info = _method(jax.random.key(0), params, images, labels, config)
        new = tuned.weights["dense"]["kernel"]
        assert np.isclose(jnp.linalg.norm(new), jnp.linalg.norm(old), rtol=1e-5)
        assert np.isclose(info["cosine"], (new * old).sum() / (old**2).sum(), rtol=1e-4, atol=1e-5)
        cosines.append(float(info["cosine"]))
    assert cosines[1] < cosines[0] - 0.1


def test_settings():
    with pytest.raises(ValueError, match="alpha"):
        FSTConfig(alpha=-0.1)
