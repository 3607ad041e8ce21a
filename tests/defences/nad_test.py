"""NAD: attention by hand and by PyTorch, and fine-tuning where its weight is zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import defences, losses, models
from awm_jax.defences import tuning
from awm_jax.defences.nad import NADConfig, _student_loss, attention, distance

CONFIG = NADConfig(epochs=2, teacher_epochs=1, batch_size=4, crop=1)


def test_attention_by_hand():
    """Channels (1, 2) and (2, 4) at two pixels: 1 + 4 = 5 and 4 + 16 = 20, over sqrt(425)."""
    block = jnp.array([[[[1.0, -2.0], [2.0, 4.0]]]])
    np.testing.assert_allclose(attention(block), [[5 / 425**0.5, 20 / 425**0.5]], rtol=1e-6)
    np.testing.assert_allclose(attention(block, 1.0), [[3 / 45**0.5, 6 / 45**0.5]], rtol=1e-6)


def test_distance_by_hand():
    """One image, two pixels: the maps (1, 0) and (0, 1) differ by (1, -1), whose mean square is 1.

    So each of the blocks counts its own weight: 500 the first, 1000 each other.
    """
    here, there = (jnp.array(v).reshape(1, 1, 2, 1) for v in ([3.0, 0.0], [0.0, 0.5]))
    teacher = {"block1": here, "block2": here, "block3": here}
    student = {"block1": there, "block2": here, "block3": there}
    assert float(distance(teacher, student, NADConfig())) == 1500.0
    assert float(distance(teacher, student, NADConfig(first_beta=2.0, beta=0.0))) == 2.0


@pytest.mark.parametrize("power", [2.0, 1.5])
def test_distance_and_its_gradient_are_pytorchs(x64, power):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    shapes = [(3, 4, 4, 5), (3, 2, 2, 6)]
    teacher, student = ({f"block{i}": rng.normal(size=shape) for i, shape in enumerate(shapes)}
                        for _ in range(2))
    config = NADConfig(power=power)
    value, gradient = jax.value_and_grad(lambda s: distance(
        jax.tree.map(jnp.asarray, teacher), s, config))(jax.tree.map(jnp.asarray, student))

    tensors = {name: torch.tensor(block, requires_grad=True) for name, block in student.items()}

    def maps(block):
        total = block.abs().pow(power).sum(dim=3).flatten(1)
        return torch.nn.functional.normalize(total, dim=1)

    wanted = sum(beta * torch.nn.functional.mse_loss(maps(tensors[name]),
                                                     maps(torch.tensor(teacher[name])))
                 for name, beta in zip(student, (500.0, 1000.0), strict=True))
    wanted.backward()
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-10)
    for name in student:
        np.testing.assert_allclose(gradient[name], tensors[name].grad.numpy(), rtol=1e-8,
                                   atol=1e-12)


def test_a_silent_block_has_a_finite_gradient():
    blocks = {"block1": jnp.zeros((2, 3, 3, 4))}
    other = {"block1": jnp.ones((2, 3, 3, 4))}
    value, gradient = jax.value_and_grad(lambda s: distance(other, s, NADConfig()))(blocks)
    assert float(value) == pytest.approx(500 / 9, rel=1e-5)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_a_network_without_pixels_is_refused(plain_mlp, tiny_batch):
    with pytest.raises(ValueError, match=r"block of more than one pixel.*got block1, block2"):
        defences.nad(plain_mlp, tiny_batch, config=CONFIG)


def test_students_loss(tiny, tiny_batch):
    """Cross-entropy and attention in training mode, against the teacher in evaluation mode."""
    teacher = dataclasses.replace(tiny, weights=jax.tree.map(lambda w: 1.1 * w, tiny.weights))
    images, labels = map(jnp.asarray, tiny_batch)
    key = jax.random.key(2)
    value, batch_stats = _student_loss(teacher, CONFIG)(key, tiny, images, labels)
    _, wanted, _ = models.activations(teacher, images)
    logits, blocks, moved = models.activations(tiny, images, key=key)
    terms = [500 * np.square(np.asarray(attention(wanted["block1"]) - attention(
        blocks["block1"]))).mean(), 1000 * np.square(np.asarray(attention(
            wanted["block2"]) - attention(blocks["block2"]))).mean()]
    assert min(terms) > 0.1
    np.testing.assert_allclose(value, losses.cross_entropy(logits, labels) + sum(terms), rtol=1e-5)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(batch_stats), jax.tree.leaves(moved),
                                              strict=True))


def test_without_attention_it_is_fine_tuning(tiny, tiny_batch):
    """The student starts from the suspect network, not from the teacher."""
    config = dataclasses.replace(CONFIG, first_beta=0.0, beta=0.0)
    images, labels = map(jnp.asarray, tiny_batch)
    key = jax.random.key(3)
    found = jax.jit(defences.nad.run, static_argnames="config")(key, tiny, images, labels,
                                                                config=config)
    tuned, values = jax.jit(tuning.descend, static_argnames="config")(
        jax.random.split(key)[1], tiny, images, labels, config=config)
    np.testing.assert_allclose(found.info["loss"], values, rtol=1e-4)
    assert found.info["teacher_loss"].shape == (2,)
    for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(tuned), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("bad", [{"teacher_epochs": 0}, {"beta": -1.0}, {"power": 0.5}])
def test_refuses_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        NADConfig(**bad)
