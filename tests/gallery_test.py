"""The command that draws every attack."""

import pytest

from experiments import gallery

FIXED = "badnets,badnets_a2a,badnets_checkerboard,blended,sig,wanet"


def test_draws_attacks_on_images_of_different_classes(tiny_dataset, capsys):
    path = tiny_dataset / "deep" / "gallery.png"
    assert gallery.main(["--attack", FIXED, "--images", "3", "--out", str(path)]) == 0
    assert path.stat().st_size > 10_000 and "6 attacks on 3 images" in capsys.readouterr().out


@pytest.mark.parametrize("argv, word", [
    (["--attack", "badnets,trojan_sq"], "32x32"), (["--trigger", "/nowhere.png"], "PNG"),
    (["--attack", "sig", "--target", "10"], "0..9"), (["--checkpoint", "/nowhere"], "gallery")])
def test_what_does_not_go_together_is_refused(tiny_dataset, argv, word, capsys):
    """The images of this data set are 8x8, too small for Trojan's square."""
    assert gallery.main(["--attack", "badnets", *argv, "--out", str(tiny_dataset / "g.png")]) == 2
    assert word in capsys.readouterr().err and not (tiny_dataset / "g.png").exists()


def test_every_attack_is_drawn_unless_told_otherwise():
    assert len(gallery._parser().parse_args([]).attack) >= 13
    assert gallery._parser().parse_args(["--attack", "sig"]).attack == ("sig",)
