"""The commands on a folder of one's own images: options, presets, and one run from end to end."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from awm_jax import data
from experiments import cli, oneshot, presets


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("AWM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _set_of(count, side=32, name="folder-x-0"):
    images = np.zeros((count, side, side, 3), np.uint8)
    return data.Dataset(name, images, np.zeros(count, np.int32), images, images[:, 0, 0, 0], 2,
                        False)


def test_presets_of_folders_go_by_their_size():
    found = [presets.of(_set_of(count, 8)) for count in (16, 320, 1000, 20_000)]
    assert [p.batch_size for p in found] == [16, 32, 32, 128]
    assert [p.epochs for p in found] == [60, 60, 48, 10]  # 1,500 steps, 60 epochs at most
    assert presets.of(_set_of(16, 64)).crop == 4 and presets.of(_set_of(16, 8)).crop == 0
    assert presets.of(_set_of(1, name="tiny_imagenet-abc")) is presets.PRESETS["tiny_imagenet"]
    with pytest.raises(ValueError, match=r"at least 16 training images.*got 15"):
        presets.of(_set_of(15))


@pytest.mark.parametrize("argv, word", [
    (["--dataset", "folder:"], "folder:PATH"), (["--dataset", "folder"], "tiny_imagenet"),
    (["--image_size", "32x"], "HEIGHTxWIDTH"), (["--image_size", "-1"], "HEIGHTxWIDTH")])
def test_wrong_options_get_one_line(argv, word, capsys):
    with pytest.raises(SystemExit):
        cli.parser().parse_args(argv)
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1


def test_sizes_by_the_command():
    assert cli.parser().parse_args(["--image_size", "48x64"]).image_size == (48, 64)
    assert cli.parser().parse_args(["--image_size", "24"]).image_size == (24, 24)


@pytest.fixture
def digit_files(tmp_path, cache, monkeypatch):
    """Real digits of three classes as files, in a folder beside an empty working directory."""
    from sklearn.datasets import load_digits

    source, root = load_digits(), tmp_path / "my digits"
    for digit in (3, 8, 9):
        (root / str(digit)).mkdir(parents=True)
        for i, image in enumerate(source.images[source.target == digit][:24]):
            picture = Image.fromarray(np.uint8(np.round(image * 255 / 16)))
            picture.resize((16, 16)).save(root / str(digit) / f"{i}.png")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return root


def test_the_command_on_a_folder_from_files_to_the_table(digit_files, cache, capsys):
    argv = ["--dataset", f"folder:{digit_files}", "--epochs", "1", "--seeds", "1", "--defence",
            "clp", "--arch", "small_vgg"]
    assert oneshot.main(argv) == 2
    assert "target=8 in 0..2" in capsys.readouterr().err  # BadNets' own target is class 8
    assert oneshot.main([*argv, "--target", "1"]) == 0
    told = capsys.readouterr().out
    assert "54 training and 18 test images of 16x16; 3 classes: 0 3, 1 8, 2 9\n" in told
    assert "| badnets | clp |" in told
    (run,) = pathlib.Path("runs").iterdir()
    saved = json.loads((run / "results.json").read_text())
    assert run.name == f"oneshot-{saved['dataset']}-small_vgg"
    assert saved["dataset"].startswith("folder-my-digits-")
    assert saved["class_names"] == ["3", "8", "9"] and saved["num_classes"] == 3
    (network,) = (cache / "networks").iterdir()
    assert network.name.startswith(f"{saved['dataset']}-small_vgg-badnets-1-")
    assert not list(digit_files.glob("*.json"))

    (digit_files / "3" / "0.png").unlink()  # the folder changes: nothing old is taken for new
    assert oneshot.main([*argv, "--target", "1", "--out", str(run)]) == 2
    assert "Choose another --out" in capsys.readouterr().err
