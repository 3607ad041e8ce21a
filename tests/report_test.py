"""Pictures: what they show is computed here, that they are drawn is checked by reading them."""

import doctest
import types

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
    figures.proportions(tmp_path / "shares.png", {"a": rng.random((2, 5)), "b": np.eye(5)}, 3, "t")
    pictures.gallery(tmp_path / "gallery.png", images, {"a": images**2, "b": 1 - images})
    for name in ("gallery.png", "shares.png", "pairs.png", "one.png", "two.png",
                 "deep/masks.png", "history.png"):
        _drawn(tmp_path / name)
    assert _drawn(tmp_path / "two.png").shape[1] > 1.5 * _drawn(tmp_path / "one.png").shape[1]
    assert not list(tmp_path.glob(".*"))


def test_shapes_are_checked(tmp_path):
    with pytest.raises(ValueError, match="equal shapes"):
        pictures.pairs(tmp_path / "x.png", np.zeros((1, 8, 8, 3)), np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"asr \(1\)"):
        figures.history(tmp_path / "x.png", {"epoch": [1, 2], "asr": [1.0]}, "t")
    with pytest.raises(ValueError, match="nothing"):
        figures.history(tmp_path / "x.png", {}, "t")
    with pytest.raises(ValueError, match=r"epoch \(2\)"):
        figures.history(tmp_path / "x.png", {"epoch": [1, 2]}, "t")
    with pytest.raises(ValueError, match=r"a \(5,\)"):
        figures.proportions(tmp_path / "x.png", {"a": np.ones(5)}, None, "t")
    with pytest.raises(ValueError, match="nothing"):
        figures.proportions(tmp_path / "x.png", {}, None, "t")
    with pytest.raises(ValueError, match="at least one attack"):
        pictures.gallery(tmp_path / "x.png", np.zeros((1, 8, 8, 3)), {})
    with pytest.raises(ValueError, match="'a' of shape"):
        pictures.gallery(tmp_path / "x.png", np.zeros((1, 8, 8, 3)), {"a": np.zeros((2, 8, 8, 3))})
    with pytest.raises(ValueError, match="at least one layer"):
        figures.mask_histogram(tmp_path / "x.png", {})
    with pytest.raises(ValueError, match="at least one trigger"):
        pictures.trigger_sheet(tmp_path / "x.png", {}, np.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match="'t' of shape"):
        pictures.trigger_sheet(tmp_path / "x.png", {"t": _trigger(4)}, np.zeros((8, 8, 3)))
    assert not list(tmp_path.iterdir())


def _trigger(size):
    """A white pixel that replaces; any record with these two fields will do."""
    pattern, mask = np.zeros((size, size, 3)), np.zeros((size, size, 1))
    pattern[0, 0], mask[0, 0] = 1, 1
    return types.SimpleNamespace(pattern=pattern, mask=mask)


def test_a_sheet_grows_with_its_triggers(tmp_path):
    image = np.full((8, 8, 3), 0.5)
    pictures.trigger_sheet(tmp_path / "one.png", {"a": _trigger(8)}, image)
    pictures.trigger_sheet(tmp_path / "three.png", {n: _trigger(8) for n in "abc"}, image)
    assert _drawn(tmp_path / "three.png").shape[1] > 2 * _drawn(tmp_path / "one.png").shape[1]


def test_a_sheet_replaces_pixels_under_the_mask(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(pictures, "_show", lambda axis, picture: shown.append(picture))
    pictures.trigger_sheet(tmp_path / "x.png", {"a": _trigger(8)}, np.full((8, 8, 3), 0.75))
    _, triggered, difference = shown
    assert triggered[0, 0, 0] == 1.0 and triggered[1, 1, 0] == 0.75
    assert difference[0, 0, 0] == 1.0 and difference[1, 1, 0] == 0.5


def test_grey_pictures_and_curves_of_other_scales(tmp_path):
    pictures.pairs(tmp_path / "grey.png", np.zeros((2, 8, 8, 1)), np.ones((2, 8, 8, 1)))
    _drawn(tmp_path / "grey.png")
    epoch = [1, 2, 3]
    figures.history(tmp_path / "one.png", {"epoch": epoch, "asr": [90, 50, 3]}, "t")
    figures.history(tmp_path / "all.png", {
        "epoch": epoch, "asr": [90, 50, 3], "clean_accuracy": [97, 95, 94],
        "clean_loss": [0.1, 0.2, 0.1], "trigger_loss": [2, 1, 0.5],
        "mask_l1": [9000, 5000, 2000]}, "t")
    assert _drawn(tmp_path / "all.png").shape[1] > 2 * _drawn(tmp_path / "one.png").shape[1]


def test_a_failed_picture_leaves_the_old_one_and_no_debris(tmp_path):
    class Broken:
        def savefig(self, temporary, **_):
            temporary.write_bytes(b"half")
            raise OSError("disk full")

    (tmp_path / "x.png").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        pictures._save(Broken(), tmp_path / "x.png")
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == b"old"


@pytest.mark.parametrize("module", [pictures, figures])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_curves_and_percentages(tmp_path):
    points = np.array([[1.0, 90.0, 2.0], [10.0, 80.0, 3.0]])
    figures.curves(tmp_path / "one.png", {"ACC": {"a": points}}, "tau", "t", log=True)
    figures.curves(tmp_path / "two.png", {"ACC": {"a": points}, "ASR": {"a": points[:, :2]}},
                   "epoch", "t")
    assert _drawn(tmp_path / "two.png").shape[1] > 1.5 * _drawn(tmp_path / "one.png").shape[1]
    # The same as from the masks themselves.
    masks = {"a": np.array([0.0, 0.05, 1.0, 1.0]), "b": np.array([0.55])}
    figures.mask_histogram(tmp_path / "masks.png", masks)
    figures.percentages(tmp_path / "rows.png", {
        "a": [50, 0, 0, 0, 0, 0, 0, 0, 0, 50], "b": [0, 0, 0, 0, 0, 100, 0, 0, 0, 0]})
    assert (_drawn(tmp_path / "masks.png") == _drawn(tmp_path / "rows.png")).all()
    for wrong in ({}, {"ACC": {}}, {"ACC": {"a": np.ones(3)}}, {"ACC": {"a": np.ones((2, 4))}}):
        with pytest.raises(ValueError, match=r"shape \[k, 2\]"):
            figures.curves(tmp_path / "x.png", wrong, "x", "t")
    with pytest.raises(ValueError, match=r"a \(9,\)"):
        figures.percentages(tmp_path / "x.png", {"a": np.ones(9)})
    with pytest.raises(ValueError, match="none"):
        figures.percentages(tmp_path / "x.png", {})
