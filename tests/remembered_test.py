"""A scan's findings are kept for the purification that follows, and for nothing else."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from awm_jax import checkpoint, detection, metrics
from awm_jax.command import jobs, main, remembered
from awm_jax.defences import AWMConfig
from awm_jax.defences.survey import Survey
from awm_jax.detection import Findings
from awm_jax.types import Batch


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("AWM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "findings"


def _findings(classes=3, value=0.5):
    """Findings of arrays that all differ, the first one ``value``."""
    shapes = {"triggers": (classes, 4, 4, 3), "damage": (classes,), "bent": (classes,),
              "warp": (2, 2, 2), "dispersal": (4, 4, 3), "elsewhere": (4, 4, 3)}
    survey = Survey(*(np.full(shapes.get(name, ()), value + i, np.float32)
                      for i, name in enumerate(Survey._fields)))
    return Findings(survey, np.full(classes, value + 20), np.full((4, 4, 3), value + 21),
                    *(np.float32(value + 22 + i) for i in range(3)))


def test_what_is_kept_is_read_to_the_bit(cache):
    path = cache / "a.npz"
    assert remembered.read(path) is None
    remembered.write(path, _findings())
    found = remembered.read(path)
    assert jax.tree.structure(found) == jax.tree.structure(_findings())
    for kept, own in zip(jax.tree.leaves(found), jax.tree.leaves(_findings()), strict=True):
        assert kept.dtype == own.dtype
        np.testing.assert_array_equal(kept, own)
    assert [p.name for p in cache.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:100],
                                    lambda data: data[:-30], lambda data: b"PK" + data[40:]])
def test_a_damaged_file_is_none(cache, damage):
    path = cache / "a.npz"
    remembered.write(path, _findings())
    path.write_bytes(damage(path.read_bytes()))
    assert remembered.read(path) is None


def test_the_oldest_go_and_large_ones_are_not_kept(cache):
    for i in range(10):
        remembered.write(cache / f"{i}.npz", _findings())
        os.utime(cache / f"{i}.npz", (i, i))
        if i == 7:
            assert remembered.read(cache / "0.npz") is not None  # wanted: now the newest
    left = {p.stem for p in cache.iterdir()}
    assert len(left) == 8 and {"0", "9"} <= left and not {"1", "2"} & left
    large = _findings()
    large = large._replace(universal=np.broadcast_to(np.float32(0), (1 << 12, 1 << 12, 3)))
    remembered.write(cache / "large.npz", large)
    assert not (cache / "large.npz").exists()


def test_a_cache_that_cannot_be_written_loses_nothing(tmp_path):
    (tmp_path / "cache").write_text("a file in the folder's place")
    remembered.write(tmp_path / "cache" / "findings" / "a.npz", _findings())
    assert remembered.read(tmp_path / "cache" / "findings" / "a.npz") is None


def test_anything_that_could_change_a_number_has_another_place(tiny):
    images, labels = jnp.full((4, 8, 8, 3), 0.5), jnp.arange(4)
    batch, config = Batch(images, labels), AWMConfig()

    def place(params=tiny, batch=batch, seed=0, config=config):
        return remembered.place(params, batch, seed, config)

    moved = jax.tree.map(lambda leaf: leaf, tiny.weights)
    moved["conv1"]["kernel"] = moved["conv1"]["kernel"].at[0, 0, 0, 0].add(1e-6)
    statistics = jax.tree.map(lambda leaf: leaf + 1e-6, tiny.batch_stats)
    arch = dataclasses.replace(tiny.arch, mean=(0.1, 0.1, 0.1))
    places = [
        place(), place(dataclasses.replace(tiny, weights=moved)),
        place(dataclasses.replace(tiny, batch_stats=statistics)),
        place(dataclasses.replace(tiny, arch=arch)),
        place(batch=batch._replace(images=images.at[0, 0, 0, 0].add(1e-6))),
        place(batch=batch._replace(labels=labels[::-1])), place(seed=1),
        place(config=AWMConfig(flip=True))]
    with jax.default_matmul_precision("bfloat16"):
        places.append(place())
    assert len(set(places)) == len(places)
    assert place() == places[0]


def test_purify_takes_the_scan_and_another_seed_does_not(tiny, tmp_path, monkeypatch, capsys):
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3)).astype(np.uint8)
    found = metrics.predict(tiny, jnp.asarray(images, jnp.float32) / 255)
    checkpoint.save(tmp_path / "net", tiny)
    for label in set(found.tolist()):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        Image.fromarray(images[found.tolist().index(label)]).save(
            tmp_path / "images" / str(label) / "a.png")
    scans = []
    true_scan = detection.scan

    def scan(*args, **options):
        scans.append(true_scan(*args, **options))
        return scans[-1]

    monkeypatch.setattr(jobs.detection, "scan", scan)
    given = [str(tmp_path / "net"), "--images", str(tmp_path / "images"), "--force"]
    assert main(["scan", *given]) == 0
    assert "scanned before" not in capsys.readouterr().out
    for out in ("one", "two"):
        assert main(["purify", *given, "--out", str(tmp_path / out), "--epochs", "1"]) == 0
        assert "scanned before" in capsys.readouterr().out
    assert len(scans) == 1
    numbers = [json.loads((tmp_path / name).read_text())["scan"]
               for name in ("net-scan.json", "one-report.json")]
    assert numbers[0] == numbers[1]
    assert main(["scan", *given, "--seed", "1"]) == 0
    assert len(scans) == 2
