"""Pictures: what they show is computed here, that they are drawn is checked by reading them."""

import numpy as np
import pytest
from PIL import Image

from awm_jax.report import figures, pictures


def _drawn(path):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > 1 and min(pixels.shape[:2]) > 50
    return pixels


def test_intervals_by_hand():
    values = np.array([0.0, 0.09, 0.1, 0.55, 1.0])
    expected = [40, 20, 0, 0, 0, 20, 0, 0, 0, 20]
    np.testing.assert_allclose(figures.mask_percentages(values), expected)


def test_amplified_difference_by_hand():
    np.testing.assert_allclose(pictures.amplified(np.array([-0.1, 0.0, 0.2])), [0.25, 0.5, 1.0])
    np.testing.assert_array_equal(pictures.amplified(np.zeros(2)), 0.5)


def test_every_picture_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.random((3, 8, 8, 3))
    pictures.pairs(tmp_path / "pairs.png", images, np.clip(images + 0.2, 0, 1))
    pictures.recovered_trigger(tmp_path / "one.png", rng.normal(size=(8, 8, 3)))
    pictures.recovered_trigger(tmp_path / "two.png", rng.normal(size=(8, 8, 3)), images[0])
    figures.mask_histogram(tmp_path / "deep" / "masks.png", {"a": rng.random(50), "b": np.ones(3)})
    figures.history(tmp_path / "history.png", {"epoch": [1, 2], "asr": [90.0, 3.0]}, "t")
    for name in ("pairs.png", "one.png", "two.png", "deep/masks.png", "history.png"):
        _drawn(tmp_path / name)
    assert _drawn(tmp_path / "two.png").shape[1] > 1.5 * _drawn(tmp_path / "one.png").shape[1]
    assert not list(tmp_path.glob(".*"))


def test_shapes_are_checked(tmp_path):
    with pytest.raises(ValueError, match="equal shapes"):
        pictures.pairs(tmp_path / "x.png", np.zeros((1, 8, 8, 3)), np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"asr \(1\)"):
        figures.history(tmp_path / "x.png", {"epoch": [1, 2], "asr": [1.0]}, "t")
