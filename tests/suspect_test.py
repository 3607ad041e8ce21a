"""Networks and images as they come: grey ones, averages of weights, constant answers."""

import dataclasses
import json
import pathlib
import shutil
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import awm_jax
from awm_jax import checkpoint, defences, formats, masks, metrics, models, torch_compat
from awm_jax.command import jobs, main, normalisation, suspect, verdict
from awm_jax.data import given
from awm_jax.defences import AWMConfig, Status
from awm_jax.types import Arch, Batch, Params


def _lay_out(folder, network, per_class=1):
    """Images that a network gives each of its classes, in folders; its biases make room for all."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, *network.arch.image_shape)).astype(np.uint8)
    pixels = jnp.asarray(images, jnp.float32) / 255
    dense = network.weights["dense"]
    dense = {**dense, "bias": dense["bias"] - models.apply(network, pixels).mean(axis=0)}
    network = dataclasses.replace(network, weights={**network.weights, "dense": dense})
    found = metrics.predict(network, pixels)
    for label in range(network.arch.num_classes):
        (folder / str(label)).mkdir(parents=True)
        for i in np.flatnonzero(found == label)[:per_class]:
            Image.fromarray(images[i].squeeze()).save(folder / str(label) / f"{i}.png")
    return network


def test_a_grey_network_is_scanned_with_grey_images(tmp_path, capsys, torch):
    arch = Arch(name="cnn", num_classes=2, image_shape=(16, 16, 1), mean=(0.0,), std=(1.0,))
    network = _lay_out(tmp_path / "clean", models.create(jax.random.key(1), arch), per_class=3)
    torch_compat.save(tmp_path / "grey.pth", network)
    argv = ["scan", str(tmp_path / "grey.pth"), "--images", str(tmp_path / "clean"),
            "--normalise", "none"]
    assert main(argv) == 0
    assert "6 of 6 images their class" in capsys.readouterr().out
    assert (tmp_path / "grey-scan.html").exists()
    assert json.loads((tmp_path / "grey-scan.json").read_text())["network"]["image_shape"][2] == 1


def test_grey_values_are_those_of_the_standard(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    (tmp_path / "0").mkdir()
    Image.fromarray(pixels).save(tmp_path / "0" / "a.png")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "0" / "b.png")
    found = given.read(given.find(tmp_path), num_classes=2, size=(8, 8), channels=1).images
    theirs = np.asarray(Image.fromarray(pixels).convert("L"))
    assert found.shape == (2, 8, 8, 1)
    assert np.abs(found[0, ..., 0].astype(int) - theirs).max() <= 1  # PIL's is in whole numbers
    np.testing.assert_array_equal(found[1, ..., 0].ravel(), np.arange(64) * 4)
    with pytest.raises(ValueError, match=r"3 channels, or of 1 .grey., it takes 4"):
        given.read(given.find(tmp_path), num_classes=2, size=(8, 8), channels=4)


def test_a_constant_answer_is_not_most(tmp_path, tiny, capsys):
    """Three images of class 0 and one of each other: a network that always says 0 has half."""
    _lay_out(tmp_path / "clean", tiny)
    for i in range(2):
        Image.fromarray(np.full((8, 8, 3), 90 * i, np.uint8)).save(
            tmp_path / "clean" / "0" / f"more{i}.png")
    dense = {"kernel": 0 * tiny.weights["dense"]["kernel"], "bias": jnp.array([1.0, 0, 0, 0])}
    stuck = dataclasses.replace(tiny, weights={**tiny.weights, "dense": dense})
    checkpoint.save(tmp_path / "net", stuck)
    argv = ["scan", str(tmp_path / "net"), "--images", str(tmp_path / "clean")]
    assert main(argv) == 2
    assert "it gives 3 of 6, all the same class 0" in capsys.readouterr().err
    for i in range(2, 12):  # now most of them, and the same answer still
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(
            tmp_path / "clean" / "0" / f"more{i}.png")
    assert main(argv) == 2
    assert "it gives 13 of 16, all the same class 0" in capsys.readouterr().err


def test_images_of_one_class_tell_nothing_of_an_all_to_all_backdoor(tmp_path, tiny, capsys):
    network = _lay_out(tmp_path / "clean", tiny)
    for number in "123":
        shutil.rmtree(tmp_path / "clean" / number)
    checkpoint.save(tmp_path / "net", network)
    argv = ["scan", str(tmp_path / "net"), "--images", str(tmp_path / "clean")]
    assert main(argv) == 2
    assert "two classes or more, better one of each, got class 0 alone" in capsys.readouterr().err


def test_options_of_another_defence_are_named_before_the_network_is_read(tmp_path, capsys):
    for options, word in ((["--defence", "ft", "--alpha", ".5"], "--alpha"),
                          (["--defence", "clp", "--epochs", "3"], "--epochs")):
        assert main(["purify", str(tmp_path / "gone.pth"), "--images", str(tmp_path), "--out",
                     str(tmp_path / "out.pth"), *options]) == 2
        assert f"Expected no {word}" in capsys.readouterr().err


def test_copies_of_the_network_are_purified_too(tmp_path, small_params, torch):
    state = torch_compat.state_dict_from_params(small_params)
    ema = {f"module.{name}": value.half() if value.is_floating_point() else value
           for name, value in state.items()}
    optimiser = {"momentum": torch.ones(3)}
    torch.save({"state_dict": state, "state_dict_ema": ema, "optimiser": optimiser, "epoch": 3},
               tmp_path / "a.pth")
    assert torch_compat.copies(tmp_path / "a.pth") == ("state_dict_ema",)
    params, source = formats.read(tmp_path / "a.pth")
    assert any("again as state_dict_ema" in note for note in source.notes)
    purified = jax.tree.map(lambda leaf: leaf + 1, params)
    formats.write(tmp_path / "b.pth", purified, source)
    back = torch.load(tmp_path / "b.pth", weights_only=True)
    assert back["epoch"] == 3 and torch.equal(back["optimiser"]["momentum"], torch.ones(3))
    for name, value in torch_compat.state_dict_from_params(purified).items():
        if name.endswith("num_batches_tracked"):
            continue
        assert torch.equal(back["state_dict"][name], value)
        copied = back["state_dict_ema"][f"module.{name}"]
        assert copied.dtype == torch.float16 and torch.equal(copied, value.half())
    torch.save(state, tmp_path / "plain.pth")
    assert torch_compat.copies(tmp_path / "plain.pth") == ()


@pytest.mark.parametrize("prefix", ["backbone.", "1.", "module.net."])
def test_whatever_all_names_share_is_a_prefix(prefix, tmp_path, small_params, torch):
    state = torch_compat.state_dict_from_params(small_params)
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "a.pth")
    params, source = formats.read(tmp_path / "a.pth")
    formats.write(tmp_path / "b.pth", params, source)
    back = torch.load(tmp_path / "b.pth", weights_only=True)
    assert list(back) == [prefix + name for name in state]


def test_a_tensor_without_data_is_refused_in_a_line(tmp_path, small_params, torch):
    state = torch_compat.state_dict_from_params(small_params)
    state["classifier.bias"] = torch.empty(4, device="meta")
    with pytest.raises(ValueError, match=r"Expected plain tensors, classifier\.bias is"):
        torch_compat.arrays_from_state_dict(state)


def test_mean_and_std_can_be_said(tmp_path, small_params, torch):
    torch_compat.save(tmp_path / "a.pth", small_params)
    moments = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}
    params = torch_compat.load(tmp_path / "a.pth", image_shape=(8, 8, 3), **moments)
    images = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    mean, std = (np.float32(v) for v in moments.values())
    wanted = models.apply(small_params, jnp.asarray((images - mean) / std))
    found = models.apply(params, jnp.asarray(images))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    for wrong in ({"mean": (0.5,)}, {"std": (1.0, 0.0, 1.0)}, {"std": (1.0, np.nan, 1.0)}):
        with pytest.raises(ValueError, match=f"Expected {next(iter(wrong))}=.* to be 3"):
            torch_compat.load(tmp_path / "a.pth", image_shape=(8, 8, 3), **wrong)


def test_a_network_that_errs_is_warned_of(tiny, small_batch):
    """By AWM and any other defence, before they start; not where it does well."""
    own = metrics.predict(tiny, small_batch.images)
    wrong = small_batch._replace(labels=(own + 1) % 4)
    right = small_batch._replace(labels=np.r_[own[:4], (own[4:] + 1) % 4])  # four of six
    config = AWMConfig(variant="paper", epochs=1, inner_steps=1, outer_steps=1)
    with pytest.warns(UserWarning, match="gives 0 of 6 images their label.*arch.mean"):
        awm_jax.purify(tiny, wrong, config=config)
    with pytest.warns(UserWarning, match="0 of 6"):
        defences.ft(tiny, wrong, config=defences.ft.Config(epochs=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        awm_jax.purify(tiny, right, config=config)


def test_a_run_of_which_nothing_was_kept_says_so(tiny, small_batch):
    config = AWMConfig(variant="paper", epochs=3, inner_steps=1, outer_steps=1)
    first = awm_jax.purify(tiny, small_batch, config=config, every=1, on_epochs=lambda *_: True)
    assert first.status is Status.STOPPED and "nothing was erased" in first.status.advice
    assert all(len(values) == 0 for values in first.history.values())
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(tiny), strict=True):
        np.testing.assert_array_equal(a, b)
    second = awm_jax.purify(tiny, small_batch, config=config, every=1,
                            on_epochs=lambda done, *_: done == 2)
    assert second.status is not Status.STOPPED
    assert all(len(values) == 1 for values in second.history.values())


@pytest.mark.parametrize("count, stopped, alphas", [
    (4, 1, [None, 0.95]), (4, 2, [None, 0.95, 0.98]), (4, 3, None), (500, 1, [None, 0.95])])
def test_milder_runs_follow_one_of_which_nothing_was_kept(tiny, monkeypatch, count, stopped,
                                                          alphas):
    asked = []

    def run(suspect, batch, survey, config, key, notes):
        asked.append(config.alpha)
        status = Status.STOPPED if len(asked) <= stopped else Status.OK
        return types.SimpleNamespace(params=f"alpha {config.alpha}", status=status, survey=survey,
                                     masks=masks.init(tiny.weights))

    labels = np.minimum(np.arange(count), 3)  # too few of the first three to hold any out
    suspect = types.SimpleNamespace(params=tiny, batch=Batch(np.zeros((count, 8, 8, 3)), labels))
    monkeypatch.setattr(jobs, "_run_awm", run)
    args = types.SimpleNamespace(seed=0, epochs=None, alpha=None, flip=False, repair=False)
    findings = types.SimpleNamespace(survey="the scan's")
    if alphas is None:
        with pytest.raises(ValueError, match="Nothing was written"):
            jobs._awm(suspect, findings, args)
        return
    assert jobs._awm(suspect, findings, args).params == f"alpha {alphas[-1]}"
    assert asked == alphas


@pytest.mark.parametrize("count, lost, ends", [(10, 1, False), (10, 2, True), (4, 1, False),
                                               (4, 2, True), (43, 4, False), (43, 5, True)])
def test_when_a_run_ends(tiny, monkeypatch, count, lost, ends):
    """Over a tenth of the images, and over one: in counts, whatever floats make of shares."""
    heard = []

    def purify(params, batch, *, on_epochs, **options):
        latest = {"clean_loss": 0.0, "trigger_loss": 0.0}
        state = types.SimpleNamespace(masks=masks.init(tiny.weights))
        heard.append(on_epochs(1, 2, state, latest))

    suspect = types.SimpleNamespace(params=tiny)
    for before in range(lost, count + 1):
        shares = iter([before / count, (before - lost) / count])
        monkeypatch.setattr(jobs, "_accuracy", lambda *args, s=shares: next(s))
        monkeypatch.setattr(jobs.awm_purify, "purify", purify)
        monkeypatch.setattr(jobs.awm_purify, "network", lambda params, state: params)
        jobs._run_awm(suspect, Batch(np.zeros((count, 8, 8, 3)), np.zeros(count)), None,
                      AWMConfig(), jax.random.key(0), [])
    assert set(heard) == {ends}


def test_where_nothing_can_be_written_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file is no folder"):
        formats.check_target(tmp_path / "file" / "out.pth", tmp_path / "net.pth")
    formats.check_target(tmp_path / "new" / "deep" / "out.pth", tmp_path / "net.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    with pytest.raises(SystemExit):
        main(["scan", "x.pth", "--images", "y", "--seed", "1" + "0" * 20])
    assert "0 to 4294967295" in capsys.readouterr().err


def test_two_classes_are_too_few_to_call_suspicious():
    from detection_test import _findings

    two = verdict.of(_findings([9.0, 1.0], 0.5, 1.0), 10)
    assert two.level == "unclear" and "two classes are too few" in two.headline
    assert verdict.of(_findings([9.0, 1.0, 1.0], 0.5, 1.0), 10).level == "suspicious"
    spread = verdict.of(_findings([1.0, 1.0], 0.01, 0.9), 10)
    assert spread.level == "unclear" and "most images the other class" in spread.headline


@pytest.mark.parametrize("own, right, chosen", [
    (40, {40: 6}, 40),  # the images' own, and no other is tried
    (40, {40: 5, 32: 5, 64: 8}, 64),
    (40, {40: 5, 32: 4, 64: 3}, 40),
    (32, {32: 1, 64: 9}, 64),
    (250, {32: 6, 64: 7}, 64),  # photos
    (250, {32: 5, 64: 5, 250: 9}, 250),
    (500, {32: 5, 64: 4}, 32),  # too large to be tried
    (None, {32: 9, 64: 9}, 32),  # of several sizes
])
def test_an_image_size_that_nothing_tells(own, right, chosen, monkeypatch):
    """By how many of ten images get their class in each size."""
    ten, tried = np.arange(10), []

    def fitted(params, source, listing, normalise):
        tried.append(params.arch.image_shape[0])
        return suspect.Suspect(params, source, Batch(ten, ten), "", ("a", "image size b", "c"))

    def answers(self, params=None):
        return np.where(ten < right[self.params.arch.image_shape[0]], ten, (ten + 1) % 10)

    monkeypatch.setattr(suspect, "_own_size", lambda _: own and (own, own))
    monkeypatch.setattr(suspect, "_fitted", fitted)
    monkeypatch.setattr(suspect.Suspect, "answers", answers)
    network = Params({}, {}, Arch(name="resnet18", num_classes=10))
    source = formats.Source(pathlib.Path("a.pth"), "pytorch", ())
    groups = suspect._open_sizes(network, source, None, None)
    found = suspect._sized(network, source, None, groups, None)
    assert found.params.arch.image_shape == (chosen, chosen, 3) and tried == [*right]
    told = ("the given images' own" if len(right) == 1 else "told by how many images get their "
            f"class ({', '.join(f'{side}x{side} {n}' for side, n in right.items())})")
    assert found.notes == ("a", f"image size {chosen}x{chosen}, {told}", "c")

    # What tells it: the user, a checkpoint of ours, the classifier's inputs.
    assert suspect._open_sizes(network, source, None, (48, 48)) == ()
    assert suspect._open_sizes(network, dataclasses.replace(source, kind="orbax"), None, None) == ()
    fixed = Params({}, {}, Arch(name="small_vgg", num_classes=10))
    assert suspect._open_sizes(fixed, source, None, None) == ()


def test_the_likelihood_of_a_normalisation_by_hand():
    """A network of one number, the images' mean brightness less .1: the logit of class 1."""
    class Brightness(nn.Module):
        @nn.compact
        def __call__(self, x):
            shift = self.param("shift", nn.initializers.constant(0.1), ())
            z = x.mean((1, 2, 3))[:, None] - shift
            return jnp.concatenate([0 * z, z], axis=1)

    net = Brightness()
    params = Params.from_flax(net, net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))),
                              image_shape=(8, 8, 3))
    grey = np.array([0.9, 0.8, 0.2], np.float32)
    images = np.broadcast_to(grey[:, None, None, None], (3, 8, 8, 3))
    told = normalisation.tell(params, Batch(images, np.array([1, 1, 0])))
    logits = np.array([[np.mean((g - np.array(mean)) / std) - 0.1 for g in grey]
                       for mean, std in normalisation.KNOWN.values()])
    wanted = np.prod(1 / (1 + np.exp(logits * [-1, -1, 1])), axis=1) * ([9] + [1] * 9)
    np.testing.assert_allclose(list(told.probability.values()), wanted / wanted.sum(), rtol=1e-4)
    assert told.accuracy["half"] == 1.0 > told.accuracy["none"]
    assert told.name == max(told.probability, key=lambda name: told.probability[name])
    assert "as well possible" in told.note
