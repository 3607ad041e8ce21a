"""The command that draws what a defence does inside a network, and FT-SAM's run watched."""

import doctest
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from awm_jax import data, defences, explain, metrics
from awm_jax.data import splits
from awm_jax.report import explanations
from experiments import visualise, watching

ARGV = ["--arch", "tiny_cnn", "--epochs", "1", "--samples", "20", "--images", "40", "--shown", "2",
        "--purify_epochs", "2"]


def test_draws_every_figure(tiny_dataset, capsys):
    out = tiny_dataset / "run"
    assert visualise.main([*ARGV, "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("badnets, ft_sam: ACC") == 1
    row, = json.loads((out / "visualise.json").read_text())["rows"]
    stems = sorted(row["pictures"])
    assert [stem.rpartition("-")[2] for stem in stems] == ["epochs.png", "features.png", "heat.png",
                                                          "neurons.png"]
    assert sorted(path.name for path in out.glob("[!.]*")) == [*stems, "visualise.json"]
    for stem in stems:
        with Image.open(out / stem) as image:
            assert np.asarray(image.convert("RGB")).std() > 1
    assert (row["layer"], row["heat_maps"]["block"], row["images"]) == ("conv2", "block2", 40)
    assert 0 < row["triggered"] < 40  # the attacker's class is left out
    for network in ("backdoored", "purified"):
        assert np.shape(row["tac"][network]) == np.shape(row["gradient_norms"][network]) == (8,)
        assert len(row["heat_maps"][network]) == 2
    assert row["tac"]["backdoored"] != row["tac"]["purified"]
    assert [epoch["epoch"] for epoch in row["epochs"]] == [1, 2]
    assert all(-1 <= epoch["spearman"] <= 1 for epoch in row["epochs"])


def test_the_same_seed_gives_the_same_numbers_for_another_defence(tiny_dataset):
    rows = [visualise.run(visualise._parser().parse_args(
        [*ARGV, "--defence", "clp", "--out", str(tiny_dataset / name)]))[0] for name in "ab"]
    assert "epochs" not in rows[0]
    np.testing.assert_array_equal(rows[0]["tac"]["purified"], rows[1]["tac"]["purified"])
    assert rows[0]["correlations"] == rows[1]["correlations"]
    features, = (name for name in rows[0]["pictures"] if name.endswith("features.png"))
    pictures = [(tiny_dataset / name / features).read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]


def test_another_seed_draws_its_own_pictures_and_lost_ones_come_again(tiny_dataset):
    def run(seed):
        argv = [*ARGV, "--defence", "clp", "--seed", seed, "--out", str(tiny_dataset / "run")]
        row, = visualise.run(visualise._parser().parse_args(argv))
        return {tiny_dataset / "run" / name for name in row["pictures"]}

    first, second = run("0"), run("1")
    assert not first & second and all(path.exists() for path in first | second)
    before = {path: path.read_bytes() for path in first}
    lost = min(first)
    lost.unlink()
    assert run("0") == first and {path: path.read_bytes() for path in first} == before


@pytest.mark.parametrize("argv, word", [
    (["--arch", "mlp"], "convolutions, mlp has none"),
    (["--arch", "cnn"], "images of 16x16 or more"),
    (["--defence", "ac", "--checkpoint", "."], "training set of a --checkpoint"),
    (["--samples", "1000"], "1000")])
def test_bad_input_is_refused_before_any_work(tiny_dataset, monkeypatch, capsys, argv, word):
    monkeypatch.setattr(visualise.scene, "make", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(visualise.scene, "arch_of", lambda args, dataset: visualise.scene.Arch(
        name=args.arch, num_classes=10, image_shape=(8, 8, 3)))
    assert visualise.main([*argv, "--out", str(tiny_dataset / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and word in err and not (tiny_dataset / "run").exists()


def test_images_of_the_attackers_class_alone_are_refused(tiny_dataset, monkeypatch, capsys):
    monkeypatch.setattr(visualise.scene, "make", lambda *_: pytest.fail("work was begun"))
    dataset = data.load("digits")
    first = dataset.test_labels[splits.defender_split(dataset).eval_indices[0]]
    assert visualise.main([*ARGV, "--images", "1", "--target", str(first)]) == 2
    assert "got 1 of it. Raise --images." in capsys.readouterr().err


@pytest.mark.parametrize("argv, word", [
    (["--defence", "none"], "invalid choice"), (["--images", "0"], "whole number > 0"),
    (["--seed", "-1"], "from 0 to"), (["--samples", "x"], "'one-shot' or a whole number")])
def test_wrong_values_get_one_line(argv, word, capsys):
    with pytest.raises(SystemExit) as caught:
        visualise.main(argv)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and word in err


def test_the_run_that_is_watched_is_the_defences_own(tiny, small_batch):
    key, config = jax.random.key(3), defences.ft_sam.Config(epochs=3, batch_size=4)
    triggered = jnp.asarray(small_batch.images).at[:, :2, :2].set(1.0)
    given = (key, tiny, small_batch.images, small_batch.labels, config, triggered)
    wanted = jnp.asarray(metrics.predict(tiny, triggered)).at[:2].add(1)
    seen = watching.watch(*given, wanted)
    own = defences.ft_sam(tiny, small_batch, key=key, config=config).params
    for found, expected in zip(jax.tree.leaves(seen.params), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert seen.norms.shape == (3, 8) and np.isclose(seen.asr[0], 4 / 6)
    # The first epoch of three is the same whether the others are watched or not.
    first = watching.watch(*given, wanted, count=1)
    np.testing.assert_allclose(first.norms, seen.norms[:1], rtol=1e-4)
    # What looks on does not steer.
    other = watching.watch(*given, wanted + 1, count=1)
    np.testing.assert_array_equal(other.norms, first.norms)
    with pytest.raises(ValueError, match="label_smoothing=0"):
        watching.watch(*given[:4], defences.ft_sam.Config(label_smoothing=0.1), triggered, wanted)


def test_watched_norms_are_those_at_the_worst_point(tiny, small_batch):
    """One step of all images with rho near 0: the plain gradient in training mode."""
    from awm_jax.defences import tuning

    key = jax.random.key(0)
    config = defences.ft_sam.Config(epochs=1, batch_size=6, crop=0, rho=1e-6)
    seen = watching.watch(key, tiny, small_batch.images, small_batch.labels, config,
                          jnp.asarray(small_batch.images), jnp.asarray(small_batch.labels))
    key_order, key_steps = jax.random.split(key)
    picks = tuning.minibatches(key_order, 6, 6, 1)[0]
    key_loss = jax.random.split(jax.random.split(key_steps, 1)[0])[1]
    gradients, _, _ = tuning.plain(tuning.cross_entropy)(
        key_loss, tiny, jnp.asarray(small_batch.images)[picks],
        jnp.asarray(small_batch.labels)[picks])
    np.testing.assert_allclose(seen.norms[0], explain.neuron_norms(gradients, "conv2"), rtol=1e-3)


def test_correlations_by_hand():
    """Ranks (1, 2, 3.5, 3.5) and (2, 1, 3, 4): covariance 3.5 over sqrt(4.5 * 5)."""
    found = visualise.correlations(np.array([0., 1., 5., 5.]), np.array([1., 0., 2., 9.]))
    assert np.isclose(found["spearman"], 3.5 / np.sqrt(4.5 * 5))
    assert np.isclose(found["pearson"], np.corrcoef([0, 1, 5, 5], [1, 0, 2, 9])[0, 1])
    assert visualise.correlations(np.ones(3), np.arange(3.0)) == {"pearson": None,
                                                                  "spearman": None}


def test_spearman_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(0).integers(0, 9, (2, 50))
    assert np.isclose(visualise.correlations(a, b)["spearman"], stats.spearmanr(a, b).statistic)


def test_embedding_keeps_clusters_apart():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(20, 5)), 50 + rng.normal(size=(20, 5))])
    found = visualise.embed(points, 1)
    np.testing.assert_array_equal(found, visualise.embed(points, 1))
    centres = found[:20].mean(axis=0), found[20:].mean(axis=0)
    radius = np.linalg.norm(found[:20] - centres[0], axis=1).max()
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * radius


@pytest.mark.parametrize("points", [np.ones((2, 4)), np.zeros((9, 3)),
                                    1e6 + 1e-3 * np.eye(5)])
def test_features_that_are_all_alike_are_one_point(points):
    np.testing.assert_array_equal(visualise.embed(points.astype(np.float32), 0), 0)


def test_two_points_are_enough():
    found = visualise.embed(np.eye(2, 5, dtype=np.float32), 0)
    assert np.isfinite(found).all() and (found[0] != found[1]).any()


def test_pictures_by_hand_and_their_errors(tmp_path):
    half = explanations.overlay(np.ones((1, 1, 3)), np.zeros((1, 1)))
    np.testing.assert_allclose(half[0, 0], [0.5, 0.5, 0.75], atol=0.01)  # jet begins at (0, 0, .5)
    path, images = tmp_path / "x.png", np.zeros((2, 4, 4, 3))
    with pytest.raises(ValueError, match="values for 3 neurons"):
        explanations.neurons(path, {"a": {"b": np.ones(2)}}, np.ones(3), "t")
    with pytest.raises(ValueError, match="at least one network"):
        explanations.heat_maps(path, images, {}, {})
    with pytest.raises(ValueError, match="'a' of shape"):
        explanations.heat_maps(path, images, {"a": np.zeros((2, 2, 2))}, {})
    with pytest.raises(ValueError, match=r"\(3, 2\), got a \(2, 2\)"):
        explanations.scatter(path, {"a": np.zeros((2, 2))}, np.zeros(3, int), np.zeros(3, bool),
                             ["a"], "t")
    assert not list(tmp_path.iterdir())
    many = np.arange(30)
    explanations.scatter(path, {"a": np.stack([many, many], 1)}, many, many > 20,
                         [str(i) for i in many], "t")
    with Image.open(path) as image:
        assert min(image.size) > 50


@pytest.mark.parametrize("module", [explanations, visualise])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
