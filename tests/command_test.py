"""``awm-jax scan`` and ``purify``: a network from a file to a verdict, a network and a report."""

import dataclasses
import json
import shlex
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from awm_jax import checkpoint, masks, metrics, models, warps
from awm_jax.command import changes, jobs, main, normalisation
from awm_jax.defences import Status, awm_steps
from awm_jax.defences.survey import Survey
from awm_jax.detection import Findings
from awm_jax.types import Batch


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny):
    """A network and images that it gives their class: as many of each of its four."""
    folder = tmp_path_factory.mktemp("desk")
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (400, 1, 1, 3)) + rng.integers(-40, 40, (400, 8, 8, 3))
    images = np.clip(colours, 0, 255).astype(np.uint8)
    pixels = jnp.asarray(images, jnp.float32) / 255
    dense = tiny.weights["dense"]  # each class as likely as the others
    dense = {**dense, "bias": dense["bias"] - models.apply(tiny, pixels).mean(axis=0)}
    network = dataclasses.replace(tiny, weights={**tiny.weights, "dense": dense})
    checkpoint.save(folder / "net", network)
    found = metrics.predict(network, pixels)
    for label in range(4):
        own = np.flatnonzero(found == label)[:3]
        assert len(own) == 3, f"no three images of class {label}"
        (folder / "images" / str(label)).mkdir(parents=True)
        for i in own:
            Image.fromarray(images[i]).save(folder / "images" / str(label) / f"{i}.png")
    return folder


def test_purify_writes_a_network_and_a_report(desk, tiny, capsys):
    out = desk / "purified"
    before = checkpoint.load(desk / "net")[0]
    assert main(["purify", str(desk / "net"), "--images", str(desk / "images"), "--out", str(out),
                 "--epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert "12 of 12 images their class" in said and "awm:" in said and "purifying: 2/2" in said
    purified = checkpoint.load(out)[0]
    assert purified.arch == before.arch
    kernels = [p.weights["conv2"]["kernel"] for p in (before, purified)]
    assert (np.abs(kernels[1]) <= np.abs(kernels[0]) + 1e-7).all()
    assert np.abs(kernels[1] - kernels[0]).max() > 0
    for name in ("conv1", "bn1", "dense"):  # the first resolution is spared
        for a, b in zip(*(jax.tree.leaves(p.weights[name]) for p in (before, purified)),
                        strict=True):
            np.testing.assert_array_equal(a, b)
    again = jax.tree.leaves(checkpoint.load(desk / "net")[0])
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(before), again, strict=True))
    report = json.loads((desk / "purified-report.json").read_text())
    correct = int((metrics.predict(purified, _images(desk).images) == _images(desk).labels).sum())
    assert report["clean"]["after"]["correct"] == correct
    assert report["clean"]["before"]["correct"] == 12 and report["clean"]["before"]["high"] == 1.0
    assert set(report["layers"]) == {"conv1", "conv2"}
    assert all(sum(row) == pytest.approx(100) for row in report["layers"].values())
    page = (desk / "purified-report.html").read_text()
    command = shlex.split(report["reproduce"]["command"])
    assert command[:4] == ["python", "-m", "awm_jax", "purify"] and str(out) in command
    assert report["verdict"]["headline"].split(":")[0] in page
    assert main(["purify", str(desk / "net"), "--images", str(desk / "images"), "--out", str(out),
                 "--epochs", "2"]) == 2
    assert str(out) in capsys.readouterr().err


def _images(desk):
    files = sorted((desk / "images").rglob("*.png"), key=lambda f: (f.parent.name, f.name))
    return Batch(np.stack([np.asarray(Image.open(f), np.float32) / 255 for f in files]),
                 np.array([int(f.parent.name) for f in files]))


def test_a_run_that_loses_the_images_is_stopped(desk, monkeypatch, tmp_path, capsys):
    """Pretended: the accuracy that is watched falls by over a tenth in the second stretch."""
    shares, heard = iter([1.0, 0.95, 0.5]), []

    def purify(params, batch, *, config, on_epochs, survey, **options):
        assert survey is not None  # the scan's, which need not be made twice
        latest = {"clean_loss": 1.0, "trigger_loss": 1.0}
        state = awm_steps.init(params, config.resolve(len(batch.labels), params.arch.image_shape))
        heard.extend(on_epochs(done, 3, state, latest) for done in (1, 2))
        return types.SimpleNamespace(params=params, masks=masks.init(params.weights),
                                     status=Status.OK)

    monkeypatch.setattr(jobs, "_accuracy", lambda *args: next(shares))
    monkeypatch.setattr(jobs.awm_purify, "purify", purify)
    assert main(["purify", str(desk / "net"), "--images", str(desk / "images"), "--out",
                 str(tmp_path / "out")]) == 0
    assert heard == [False, True]
    report = json.loads((tmp_path / "out-report.json").read_text())
    assert "stopped in epoch 2 of 3: 50%" in report["defence"]["advice"]
    assert "stopped in epoch 2 of 3: 50%" in capsys.readouterr().out


@pytest.mark.parametrize("given, alphas", [
    (None, [None, 0.95, 0.98]), (0.7, [0.7, 0.95, 0.98]), (0.95, [0.95, 0.98])])
def test_what_is_held_out_was_seen_by_nothing_before(tiny, monkeypatch, given, alphas):
    """Neither by the survey, which is then made anew and kept, nor by the masks."""
    labels = np.repeat(np.arange(4), 10)
    images = np.linspace(0, 1, 40, dtype=np.float32)[:, None, None, None]
    suspect = types.SimpleNamespace(params=tiny, batch=Batch(images, labels))
    mine, held_out = jobs._held_out(suspect, 0)
    asked = []

    def purify(params, batch, *, config, survey, **options):
        assert np.array_equal(np.ravel(batch.images), np.ravel(images[mine]))
        asked.append((config.alpha, survey))
        return types.SimpleNamespace(params=params, masks=masks.init(params.weights),
                                     status=Status.OK, survey="its own")

    accuracies = iter([1.0, 1.0, 0.9, 1.0, 0.9, 1.0, 0.9])  # held out, given, held out, ...
    monkeypatch.setattr(jobs, "_accuracy", lambda *args: next(accuracies))
    monkeypatch.setattr(jobs.awm_purify, "purify", purify)
    args = types.SimpleNamespace(seed=0, epochs=None, alpha=given, flip=False, repair=False)
    done = jobs._awm(suspect, types.SimpleNamespace(survey="of all images"), args)
    assert asked == [*zip(alphas, [None, "its own", "its own"], strict=False)]
    assert "no alpha kept" in done.notes[-1] and len(held_out) == 20
    assert done.notes[0].startswith(f"alpha {given or 'as usual'}: 100.0% -> 90.0% of 20")


@pytest.mark.parametrize("each, held_out", [(10, 20), (9, 0), (11, 24)])
def test_half_of_each_class_is_held_out_where_there_are_enough(tiny, each, held_out):
    """Ten of each of four classes, or none; an odd one out is held out too."""
    labels = np.repeat(np.arange(4), each)
    suspect = types.SimpleNamespace(params=tiny, batch=Batch(np.zeros((len(labels), 8, 8, 3)),
                                                             labels))
    mine, others = jobs._held_out(suspect, 0)
    assert len(others) == held_out and sorted([*mine, *others]) == list(range(len(labels)))
    assert np.bincount(labels[mine]).tolist() == [each - held_out // 4] * 4
    again, other = (jobs._held_out(suspect, seed)[0].tolist() for seed in (0, 1))
    assert again == mine.tolist() and (other != again) == bool(held_out)


def test_scan_writes_a_report_and_never_over_what_is_none(desk, tmp_path, capsys):
    argv = ["scan", str(desk / "net"), "--images", str(desk / "images"), "--report",
            str(desk / "scan.html")]
    assert main(argv) == 0
    report = json.loads((desk / "scan.json").read_text())
    assert report["verdict"]["level"] in ("suspicious", "unclear", "clean-looking")
    assert "after" not in report["clean"] and "defence" not in report
    assert len(report["scan"]["damage"]) == 4 and len(report["flips"]) == 6
    assert report["flips"][-1]["name"] == "warp"
    assert "what it changes in the image" in (desk / "scan.html").read_text()
    assert report["verdict"]["level"] in capsys.readouterr().out
    (tmp_path / "mine.json").write_text('{"precious": 1}')
    assert main([*argv[:-1], str(tmp_path / "mine.html")]) == 2
    assert "mine.json" in capsys.readouterr().err
    assert (tmp_path / "mine.json").read_text() == '{"precious": 1}'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json"]


@pytest.mark.parametrize("change, words", [
    ({"model": "nowhere.pth"}, ["nowhere.pth"]),
    ({"model": "text.pth"}, ["text.pth"]),
    ({"model": "images"}, ["images"]),
    ({"images": "nowhere"}, ["nowhere"]),
    ({"images": "empty"}, ["empty"]),
    ({"images": "few"}, ["each of the 4 classes", "2, 3", "--force"]),
    ({"images": "wrong"}, ["most of the given images", "--force"]),
    ({"images": "out_of_range"}, ["9", "0"]),
    ({"images": "named"}, ["Expected 4 folders", "found 3", "numbers"]),
    ({"images": "broken"}, ["0.png"]),
    ({"images": "table.csv"}, ["table.csv"]),
    ({"out": "net"}, ["net"]),
    ({"out": "there.pth"}, ["there.pth"]),
    ({"out": "new.onnx"}, [".pth", ".safetensors"]),
    ({"--report": "page.pdf"}, [".html"]),
    ({"--defence": "pepper"}, ["ibau", "pepper"]),
    ({"--defence": "abl"}, ["ibau", "abl"]),
    ({"--defence": "clp", "--epochs": "3"}, ["--epochs", "clp"]),
    ({"--defence": "fst", "--alpha": ".3"}, ["--alpha=0.3", "fst", "awm"]),
    ({"--normalise": "pepper"}, ["MEAN/STD", "imagenet", "0.485"]),
    ({"--normalise": ".5,.5/.2"}, ["MEAN/STD", "3 channels"]),
    ({"--normalise": ".5/0"}, ["STD above 0"]),
    ({"--arch": "vgg99"}, ["resnet18"]),
    ({"--image_size": "64"}, ["64"]),
])
def test_bad_input_is_one_line_and_nothing_is_written(desk, tmp_path, change, words, capsys):
    _spoil(desk, tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    values = {"model": "net", "images": "images", "out": "new", **change}
    argv = ["purify", str(tmp_path / values.pop("model")), "--images",
            str(tmp_path / values.pop("images")), "--out", str(tmp_path / values.pop("out"))]
    for name, value in values.items():
        argv += [name, str(tmp_path / value) if name == "--report" else value]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("awm-jax purify: error: ")
    assert all(word in err for word in words), err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_epochs_and_alpha_reach_the_defence():
    args = types.SimpleNamespace(defence="awm_official", epochs=2, alpha=0.0, repair=False,
                                 flip=True)
    found = jobs._config(args)
    assert (found.variant, found.epochs, found.alpha, found.flip) == ("official", 2, 0.0, True)


@pytest.mark.parametrize("name", ["ft", "anp", "awm_paper", "ibau", "clp"])
def test_flip_reaches_every_defence_that_mirrors(name):
    args = types.SimpleNamespace(defence=name, epochs=None, alpha=None, repair=False, flip=True)
    found = jobs._config(args)
    assert getattr(found, "flip", True) and hasattr(found, "flip") == (name not in ("ibau", "clp"))


@pytest.mark.parametrize("small, note", [(True, "repaired:"), (False, "not repaired:")])
def test_repair_reaches_awm_and_what_came_of_it_is_said(tiny, monkeypatch, small, note):
    batch = Batch(np.zeros((4, 8, 8, 3), np.float32), np.arange(4))
    asked = []

    def purify(params, batch, *, config, **options):
        asked.append(config.repair)
        return types.SimpleNamespace(params=params, masks=masks.init(params.weights),
                                     status=Status.OK, survey=types.SimpleNamespace(small=small))

    monkeypatch.setattr(jobs.awm_purify, "purify", purify)
    args = types.SimpleNamespace(seed=0, epochs=None, alpha=None, flip=False, repair=True)
    done = jobs._awm(types.SimpleNamespace(params=tiny, batch=batch),
                     types.SimpleNamespace(survey=None), args)
    assert asked == [10] and done.notes[-1].startswith(note)


def test_repair_is_awms_alone(desk, tmp_path, capsys):
    _spoil(desk, tmp_path)
    assert main(["purify", str(tmp_path / "net"), "--images", str(tmp_path / "images"), "--out",
                 str(tmp_path / "new"), "--defence", "fst", "--repair"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--repair" in err and "fst" in err and "awm" in err


def test_a_defence_that_ends_in_nan_writes_nothing(desk, monkeypatch, tmp_path, capsys):
    """What it gives back then is the suspect network."""
    monkeypatch.setattr(jobs, "_other", lambda suspect, config, args: jobs.Purification(
        suspect.params, Status.NONFINITE, {}, 1.0))
    assert main(["purify", str(desk / "net"), "--images", str(desk / "images"), "--out",
                 str(tmp_path / "new"), "--defence", "ft"]) == 2
    err = capsys.readouterr().err
    assert "ft" in err and "Nothing was written" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("status, code", [
    (Status.OK, 0), (Status.NOT_CONVERGED, 0), (Status.CLEAN_ACCURACY_LOST, 3)])
def test_a_script_can_tell_what_should_be_looked_at(desk, monkeypatch, tmp_path, capsys, status,
                                                    code):
    monkeypatch.setattr(jobs, "_other", lambda suspect, config, args: jobs.Purification(
        suspect.params, status, {}, 1.0))
    assert main(["purify", str(desk / "net"), "--images", str(desk / "images"), "--out",
                 str(tmp_path / "new"), "--defence", "ft"]) == code
    assert checkpoint.exists(tmp_path / "new") and status.name in capsys.readouterr().out
    assert json.loads((tmp_path / "new-report.json").read_text())["defence"]["status"] == (
        status.name)


@pytest.mark.parametrize("text", ["1.1", "-.1", "nan", "inf", "much"])
def test_an_alpha_beyond_its_range_is_refused_at_once(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["purify", "net", "--images", "images", "--out", "out", f"--alpha={text}"])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "from 0 to 1" in err and text in err


def _spoil(desk, folder):
    """A desk with everything that can be wrong on it."""
    shutil.copytree(desk / "net", folder / "net")
    shutil.copytree(desk / "images", folder / "images")
    (folder / "text.pth").write_text("<html>not found</html>")
    (folder / "there.pth").write_bytes(b"precious")
    (folder / "empty").mkdir()
    for name, names in (("few", (0, 1)), ("out_of_range", (0, 1, 2, 9)),
                        ("named", ("cat", "dog", "elk"))):
        for i, called in enumerate(names):
            shutil.copytree(desk / "images" / str(i), folder / name / str(called))
    for i in range(4):
        shutil.copytree(desk / "images" / str(i), folder / "wrong" / str((i + 1) % 4))
        shutil.copytree(desk / "images" / str(i), folder / "broken" / str(i))
    (folder / "broken" / "0" / "0.png").write_bytes(b"\x89PNG nothing more")
    (folder / "table.csv").write_text("file,label\n../outside.png,0\n")


def test_normalisations_are_listed_and_can_be_numbers(capsys):
    with pytest.raises(SystemExit) as ended:  # as --help, before anything that is missing
        main(["scan", "--normalise", "help"])
    assert ended.value.code == 0
    assert "\nimagenet (mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225)\n" in (
        capsys.readouterr().out)
    assert normalisation.moments("1,2,3/.5", 3) == ((1.0, 2.0, 3.0), (0.5, 0.5, 0.5))
    assert normalisation.moments(".5/.25", 1) == ((0.5,), (0.25,))
    assert normalisation.moments("mnist", 1) == (pytest.approx((0.1307,)),
                                                 pytest.approx((0.3081,)))


def test_normalisation_is_told_by_what_the_network_then_says(tiny):
    """A network that expects (x - .5) / .5 errs on plain images, and is recognised.

    It is as sure of its answers as trained ones are.
    """
    dense = {**tiny.weights["dense"], "kernel": 50 * tiny.weights["dense"]["kernel"]}
    tiny = dataclasses.replace(tiny, weights={**tiny.weights, "dense": dense})
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.random((200, 8, 8, 3)), jnp.float32)
    labels = jnp.asarray(metrics.predict(normalisation.with_known(tiny, "half"), images))
    told = normalisation.tell(tiny, Batch(images, labels))
    assert told.name == "half" and told.accuracy["half"] == 1.0 > told.accuracy["none"]
    assert "'half'" in told.note and "none" in told.note
    np.testing.assert_allclose(
        models.apply(normalisation.with_known(tiny, "half"), images),
        models.apply(tiny, (images - 0.5) / 0.5), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bent, elsewhere, first", [
    (0.9, 0.0, ["warp"]), (0.1, 0.0, ["trigger towards class 3", "trigger towards class 2"]),
    (0.1, 4.1, ["trigger towards class 3", "trigger towards class 3, on other pixels"]),
])
def test_changes_are_shown_with_the_suspects_first(tiny, desk, bent, elsewhere, first):
    """What each does is counted by hand, and its picture is what it makes of the image."""
    rng = np.random.default_rng(0)
    images = _images(desk).images
    survey = Survey(rng.normal(size=(4, 8, 8, 3)).astype(np.float32), np.arange(4.0),
                    rng.normal(size=(8, 8, 3)).astype(np.float32), np.array(0.5), np.array(1.0),
                    rng.uniform(-0.7, 0.7, (6, 6, 2)).astype(np.float32),
                    np.array([0, bent, 0, 0]), np.array(9.0),
                    rng.normal(size=(8, 8, 3)).astype(np.float32), np.array(elsewhere))
    findings = Findings(survey, np.zeros(4), np.zeros((8, 8, 3), np.float32), *np.zeros(3))
    every = changes.of(findings)
    assert list(every)[:len(first)] == first and len(every) == 6 + (elsewhere > 0)
    if elsewhere:
        np.testing.assert_array_equal(every[first[1]].pattern, survey.elsewhere)
    bend = np.asarray(warps.bend(jnp.asarray(images), jnp.asarray(survey.warp)))
    own, moved = (metrics.predict(tiny, x) for x in (images, bend))
    rows = {row["name"]: row for row in changes.flips(images, every, tiny, None)}
    assert rows["warp"]["before"] == pytest.approx((own != moved).mean())
    assert rows["warp"]["after"] is None
    added = np.clip(images + survey.triggers[3], 0, 1)
    both = {row["name"]: row for row in changes.flips(images, every, tiny, tiny)}
    expected = (own != metrics.predict(tiny, added)).mean()
    towards = both["trigger towards class 3"]
    assert [towards["before"], towards["after"]] == pytest.approx([expected] * 2)
    shown = changes.pictures(images[0], every)
    np.testing.assert_allclose(shown["the image with the warp"], bend[0], atol=1e-6)
    np.testing.assert_allclose(shown["the image with the trigger towards class 3"], added[0])
    assert len(shown) == 1 + 2 * len(every)
