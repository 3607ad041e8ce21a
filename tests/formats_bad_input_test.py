"""Files that hold no network of ours: what each is told, and that nothing else is ever raised."""

import dataclasses
import io
import json
import os
import pickle
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from tensor_files import safetensors_file

from awm_jax import checkpoint, file_kinds, formats, torch_compat


class _Evil:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/awm_jax_formats_was_here",))


def _zip(**records):
    """A zip archive of these records, dots spelt __."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name.replace("__", ".").replace("_in_", "/"), content)
    return file.getvalue()


# What lies there, under which name, and what is said of it.
BAD_BYTES = [
    ("empty.pth", b"", OSError, r"is empty"),
    ("random.pth", b"\x07\xfe" * 99, ValueError, r"is no network file known here: it begins"),
    ("short.pth", b"\x07", ValueError, r"is no network file known here"),
    ("page.pth", b"\n <!DOCTYPE html><html>", ValueError, r"is a web page.*Download the file"),
    ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid", ValueError, r"git lfs pull"),
    ("net.onnx", b"\x08\x07\x12\x07pytorch\x1a\x03", ValueError, r"is an ONNX file\. Save the sta"),
    ("net.pb", b"\x0a\x30\x0a\x05input\x12\x0b", ValueError, r"TensorFlow graph.*Params\.from_fl"),
    ("saved.pb", b"\x08\x01\x12\x99", ValueError, r"is a TensorFlow graph"),
    ("net.tflite", b"\x1c\0\0\0TFL3....", ValueError, r"is a TensorFlow Lite file"),
    ("net.h5", b"\x89HDF\r\n\x1a\n....", ValueError, r"is an HDF5 file, as Keras.*Params\.from"),
    ("net.keras", _zip(config__json=b"{}", model__weights__h5=b"x"), ValueError, r"a Keras file"),
    ("script.pt", _zip(net_in_data__pkl=b"x", net_in_constants__pkl=b"x"), ValueError,
     r"is a TorchScript program.*torch\.jit\.load"),
    ("net.npz", _zip(a__npy=b"x"), ValueError, r"zip archive without data\.pkl"),
    ("net.msgpack", b"\x81\xa6params\x81", ValueError, r"is a msgpack file, as Flax"),
    ("net.gz", b"\x1f\x8b\x08", ValueError, r"is packed \(gzip\)\. Unpack"),
    ("net.tar", b"a" * 257 + b"ustar", ValueError, r"is packed \(tar\)"),
    ("evil.pth", pickle.dumps({"net": _Evil()}), ValueError, r"was refused.*could run code"),
    ("cut.safetensors", (2**31).to_bytes(8, "little") + b"{", OSError, r"is no whole safetensors"),
    ("text.safetensors", (4).to_bytes(8, "little") + b"{,:}", OSError, r"is no whole safetensors"),
    ("cut.pth", b"PK\x03\x04", OSError, r"is no whole PyTorch file"),
]


def _refused(path, kind, match, **options):
    """Reading fails in one line that names the file; returns it."""
    with pytest.raises(kind, match=match) as caught:
        formats.read(path, **options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    return str(caught.value)


@pytest.mark.parametrize("name, content, kind, match", BAD_BYTES, ids=[b[0] for b in BAD_BYTES])
def test_other_files_are_named_with_the_way_out(name, content, kind, match, tmp_path):
    if match.startswith("was refused") or name == "cut.pth":
        pytest.importorskip("torch")
    (tmp_path / name).write_bytes(content)
    _refused(tmp_path / name, kind, match)
    assert not os.path.exists("/tmp/awm_jax_formats_was_here")


def _bad(value):
    value = value.copy()
    value.flat[3] = np.nan
    return value


@pytest.mark.parametrize("change, match", [
    (lambda a: {"features__4__running_var": _bad(a["features.4.running_var"])},
     r"found NaN or infinity in features\.4\.running_var\. Take an earlier"),
    (lambda a: {"classifier__bias": np.full(4, -np.inf)}, r"infinity in classifier\.bias"),
    (lambda a: {"classifier__bias": np.full(4, 1e300)}, r"infinity in classifier\.bias"),
    (lambda a: {"classifier__weight": a["classifier.weight"][:1],
                "classifier__bias": a["classifier.bias"][:1]},
     r"Expected 2 classes or more, classifier\.weight has 1"),
    (lambda a: {"classifier__bias": None}, r"no small_vgg with 4 classes.*missing: classifier\.b"),
    (lambda a: {"extra": np.zeros(3)}, r"unexpected: extra"),
    (lambda a: {"features__0__weight": np.zeros((32, 27))}, r"features\.0\.weight \(32, 27\) inst"),
    (lambda a: {"features__0__weight": a["features.0.weight"].astype(np.int32)},
     r"features\.0\.weight is int32.*before it is quantised"),
    (lambda a: {"features__0__weight": a["features.0.weight"].astype(np.int8)}, r"got I8"),
    (lambda a: {name.replace(".", "__"): None for name in a} | {"a__weight": np.zeros(3)},
     r"Expected the names of a small_vgg or"),
])
def test_bad_tensors_are_named(change, match, tmp_path, arrays):
    path = safetensors_file(tmp_path / "bad.safetensors", arrays, **change(arrays))
    _refused(path, ValueError, match)


def test_pytorch_files_that_hold_something_else(tmp_path, small_params, torch):
    state = torch_compat.state_dict_from_params(small_params)
    for content, match in [
            ({"epoch": 3}, r"Expected a state_dict or.*keys epoch"),
            ([1, 2], r"Expected a state_dict or.*got list"),
            ({1: torch.zeros(1)}, r"Expected a state_dict or"),
            ({**state, "classifier.weight": state["classifier.weight"].to_sparse()},
             r"Expected plain tensors, classifier\.weight is torch\.float32, torch\.sparse"),
            ({**state, "classifier.bias": torch.tensor([np.nan] * 4)}, r"infinity in classifier")]:
        torch.save(content, tmp_path / "a.pth")
        _refused(tmp_path / "a.pth", ValueError, match)


def test_damaged_numbers_in_a_pytorch_file_are_seen(tmp_path, small_params, torch):
    torch_compat.save(tmp_path / "a.pth", small_params)
    content = bytearray((tmp_path / "a.pth").read_bytes())
    kernel = np.asarray(torch_compat.arrays_from_params(small_params)["classifier.weight"])
    content[content.find(kernel.tobytes()) + 3] ^= 1  # PyTorch itself reads on
    (tmp_path / "a.pth").write_bytes(content)
    _refused(tmp_path / "a.pth", OSError, r"is no whole PyTorch file: the checksum of .*/data/")


def test_missing_large_and_unpacking_files(tmp_path, monkeypatch):
    _refused(tmp_path / "none.pth", FileNotFoundError, "found no file there")
    with (tmp_path / "large.pth").open("wb") as file:
        file.truncate(4 * 2**30 + 1)  # a hole, which takes no room
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", lambda *args: pytest.fail("it was opened"))
        _refused(tmp_path / "large.pth", ValueError, "4,294,967,297 bytes, expected 4 GiB or less")
    monkeypatch.setattr(file_kinds, "LARGEST", 10_000)
    (tmp_path / "bomb.pth").write_bytes(_zip(net_in_data__pkl=bytes(20_000)))
    _refused(tmp_path / "bomb.pth", ValueError, "unpacks to more than 4 GiB")


def test_directories_that_hold_something_else(tmp_path, small_params, monkeypatch):
    (tmp_path / "a").mkdir()
    _refused(tmp_path / "a", OSError, r"no awm_jax\.json in it, but nothing")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"x")
    _refused(tmp_path / "a", OSError, r"but model\.safetensors\)\. Give the network's file itself")
    (tmp_path / "a" / "saved_model.pb").write_bytes(b"\x08\x01\x12")
    _refused(tmp_path / "a", ValueError, "is a TensorFlow graph")
    checkpoint.save(tmp_path / "kept" / "network", small_params)  # as the cache of networks is
    _refused(tmp_path / "kept", OSError, r"one within it is\. Give .*kept/network\.")
    checkpoint.save(tmp_path / "b", small_params)
    _refused(tmp_path / "b", ValueError, "holds a small_vgg, not the cnn asked for", arch="cnn")
    _refused(tmp_path / "b", ValueError, "images are 8x8, not 8x9", image_size=(8, 9))
    sidecar = tmp_path / "b" / "awm_jax.json"
    content = json.loads(sidecar.read_text())
    content["arch"]["num_classes"] = 5
    sidecar.write_text(json.dumps(content))
    _refused(tmp_path / "b", ValueError, "no whole small_vgg: weights/dense/bias, weights/dense/k")
    content["arch"]["name"] = "vgg11"
    sidecar.write_text(json.dumps(content))
    _refused(tmp_path / "b", ValueError, r"Expected arch='vgg11' to be one of")
    sidecar.write_text("{")
    _refused(tmp_path / "b", OSError, "is damaged")
    wrong = dataclasses.replace(small_params, weights=jax.tree.map(
        lambda w: w * np.nan, small_params.weights))
    checkpoint.save(tmp_path / "c", wrong)
    _refused(tmp_path / "c", ValueError, "infinity in weights/bn1/bias, .* and 21 more")
    monkeypatch.setattr(file_kinds, "LARGEST", 10_000)
    _refused(tmp_path / "c", ValueError, "expected 4 GiB or less")


def test_names_that_cannot_be_asked_for(tmp_path, arrays):
    path = safetensors_file(tmp_path / "a.safetensors", arrays)
    _refused(path, ValueError, r"Expected arch='vgg' to be one of", arch="vgg")
    _refused(path, ValueError, r"no cnn with 2 classes.*\.\.\.$", arch="cnn")
    with pytest.raises(ValueError, match="one of"):
        formats.fixed_size("vgg")


def _mutated(content, rng):
    """A file cut off, or with some bytes changed: anywhere, or where its structure lies."""
    if rng.random() < 0.3:
        return content[: rng.integers(len(content))]
    content = bytearray(content)
    span = rng.choice([len(content), min(len(content), 6000)])
    places = rng.integers(span, size=rng.integers(1, 8))
    for place in places if rng.random() < 0.5 else len(content) - 1 - places:
        content[place] = rng.integers(256)
    return bytes(content)


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth", "old.pth"])
def test_mutated_files_load_or_are_refused(name, tmp_path, small_params, arrays):
    path = tmp_path / name
    if name == "net.safetensors":
        content = safetensors.numpy.save(arrays, {"format": "pt"})
    else:
        torch = pytest.importorskip("torch")
        file = io.BytesIO()
        torch.save({"net": torch_compat.state_dict_from_params(small_params)}, file,
                   _use_new_zipfile_serialization=name == "net.pth")
        content = file.getvalue()
    path.write_bytes(content)
    formats.read(path)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(34):
        path.write_bytes(_mutated(content, rng))
        try:
            formats.read(path)
        except (ValueError, OSError) as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused >= 10
