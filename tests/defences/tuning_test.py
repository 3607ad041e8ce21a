"""The scan that fine-tunes, and fine-tuning (FT), which is nothing else."""

import jax
import numpy as np
import pytest
from linear_network import linear_case

from awm_jax import defences
from awm_jax.defences import tuning
from awm_jax.defences.tuning import MinibatchConfig, TuneConfig


@pytest.mark.parametrize("count, size, steps", [(7, 3, 3), (6, 3, 2), (4, 9, 1)])
def test_every_epoch_shows_every_image(count, size, steps):
    """A last batch that lacks images takes them from the epoch's start."""
    order = np.asarray(tuning.minibatches(jax.random.key(0), count, size, 5))
    assert order.shape == (5 * steps, min(size, count))
    epochs = order.reshape(5, -1)
    for epoch in epochs:
        assert sorted(epoch[:count]) == list(range(count))
        assert (epoch[count:] == epoch[: len(epoch) - count]).all()
    assert any((epoch != epochs[0]).any() for epoch in epochs)


@pytest.mark.parametrize("steps, count, batch, passes", [
    (2000, 500, 128, 500), (2000, 43, 128, 2000), (3, 129, 128, 2), (1, 1, 1, 1)])
def test_passes(steps, count, batch, passes):
    assert tuning.passes(steps, count, batch) == passes
    config = tuning.for_steps(steps, count, TuneConfig(batch_size=batch, crop=3))
    assert config == MinibatchConfig(epochs=passes, batch_size=batch, crop=3)


def test_fine_tuning_is_pytorchs_sgd(x64, monkeypatch):
    """A linear network: momentum, decay and cosine, full batches, as PyTorch has them."""
    torch = pytest.importorskip("torch")
    params, images, labels = linear_case(monkeypatch)
    config = TuneConfig(epochs=6, lr=0.3, momentum=0.8, weight_decay=0.05, crop=0)
    tuned, info = defences.ft.method(jax.random.key(0), params, images, labels, config)

    dense = params.weights["dense"]
    w = [torch.tensor(np.asarray(dense[name]), requires_grad=True) for name in ("kernel", "bias")]
    rule = torch.optim.SGD(w, config.lr, config.momentum, weight_decay=config.weight_decay)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(rule, config.epochs)
    x, y = torch.tensor(np.asarray(images).reshape(7, -1)), torch.tensor(np.asarray(labels))
    values = []
    for _ in range(config.epochs):
        rule.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ w[0] + w[1], y)
        loss.backward()
        rule.step()
        decay.step()
        values.append(loss.item())
    np.testing.assert_allclose(info["loss"], values, rtol=1e-10)
    for name, theirs in zip(("kernel", "bias"), w, strict=True):
        np.testing.assert_allclose(tuned.weights["dense"][name], theirs.detach().numpy(),
                                   rtol=1e-9, atol=1e-12)


def test_minibatches_alone_do_not_say_how_to_step(tiny, tiny_batch):
    with pytest.raises(TypeError, match="Expected an optimiser"):
        tuning.descend(jax.random.key(0), tiny, tiny_batch.images, tiny_batch.labels,
                       MinibatchConfig(epochs=1))


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"lr": 0.0}, {"momentum": 2.0}, {"crop": -1},
                                 {"weight_decay": -1.0}, {"batch_size": 0}])
def test_refuses_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TuneConfig(**bad)
