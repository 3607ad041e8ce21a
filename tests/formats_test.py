"""Networks of others in and out, format by format, and what is refused."""

import dataclasses
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tensor_files import safetensors_file

from awm_jax import checkpoint, formats, models, torch_compat
from awm_jax.types import Arch, Params

NAMES = {"pytorch": "net.pth", "safetensors": "net.safetensors", "orbax": "net"}


def _write_as(kind, path, params):
    """A file of that kind, not written by the module under test."""
    if kind == "pytorch":
        torch_compat.save(path, params)
    elif kind == "orbax":
        checkpoint.save(path, params, {"note": "x"})
    else:
        safetensors.numpy.save_file(torch_compat.arrays_from_params(params), path)


def _zeros(name, shape, num_classes=3):
    """The tensors of a network that nobody drew."""
    arch = Arch(name=name, num_classes=num_classes, image_shape=shape)
    tree = jax.eval_shape(lambda key: models.create(key, arch), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tree)
    return torch_compat.arrays_from_params(Params(zeros.weights, zeros.batch_stats, arch))


def _same(a, b):
    assert a.arch == b.arch
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(a))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("kind", NAMES)
def test_any_format_to_any_format(kind, target, tmp_path, small_params):
    if "pytorch" in (kind, target):
        pytest.importorskip("torch")
    (tmp_path / "in").mkdir()
    _write_as(kind, tmp_path / "in" / NAMES[kind], small_params)
    params, source = formats.read(tmp_path / "in" / NAMES[kind])
    assert source.kind == kind and source.path == tmp_path / "in" / NAMES[kind]
    _same(params, small_params)
    changed = dataclasses.replace(params, weights=jax.tree.map(lambda w: w + 1, params.weights))
    formats.write(tmp_path / "out" / NAMES[target], changed, source)
    back, again = formats.read(tmp_path / "out" / NAMES[target])
    assert again.kind == target
    _same(back, changed)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [NAMES[target]]
    if kind == target == "orbax":
        assert checkpoint.load(tmp_path / "out" / "net")[1] == {"note": "x"}


def test_notes_say_what_was_told_by_what(tmp_path, small_params, arrays):
    notes = formats.read(safetensors_file(tmp_path / "a.safetensors", arrays))[1].notes
    assert notes == ("architecture small_vgg, told by its tensors' names",
                     "image size 8x8, told by the classifier's inputs",
                     "4 classes, told by classifier.weight")
    notes = formats.read(tmp_path / "a.safetensors", arch="small_vgg", image_size=(8, 8))[1].notes
    assert notes[:2] == ("architecture small_vgg, as asked for",
                         "image size 8x8, as asked for, and as the classifier's inputs tell")
    checkpoint.save(tmp_path / "net", small_params)
    assert formats.read(tmp_path / "net")[1].notes == (
        "architecture small_vgg, told by the checkpoint", "image size 8x8, told by the checkpoint",
        "4 classes, told by the checkpoint")


def test_the_content_counts_and_not_the_name(tmp_path, arrays, small_params, torch):
    safetensors_file(tmp_path / "a.pth", arrays)
    assert formats.read(tmp_path / "a.pth")[1].kind == "safetensors"
    torch_compat.save(tmp_path / "b.safetensors", small_params)
    assert formats.read(tmp_path / "b.safetensors")[1].kind == "pytorch"
    torch.save(torch_compat.state_dict_from_params(small_params), tmp_path / "old",
               _use_new_zipfile_serialization=False)
    assert formats.read(tmp_path / "old")[1].kind == "pytorch"


@pytest.mark.parametrize("length", [0x4B50, 0x10080, 0x8B1F, 0xA0008])
def test_a_header_whose_length_looks_like_something_else(length, tmp_path, arrays, small_params):
    content = safetensors.numpy.save(arrays)
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].ljust(length)  # a zip archive, a pickle, gzip: by their first bytes
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + header + content[end:])
    _same(formats.read(tmp_path / "a")[0], small_params)


@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod."])  # of one wrapper, of two
def test_a_pytorch_file_keeps_all_else(prefix, tmp_path, small_params, torch):
    state = {f"{prefix}{name}": value.half() if value.ndim == 4 else value
             for name, value in torch_compat.state_dict_from_params(small_params).items()}
    state[f"{prefix}classifier.bias"] = state[f"{prefix}classifier.bias"].bfloat16()
    state[f"{prefix}features.1.num_batches_tracked"] = torch.tensor(7)
    torch.save({"net": state, "acc": 93.5}, tmp_path / "a.pth")
    params, source = formats.read(tmp_path / "a.pth")
    assert source.notes[3:] == ("bfloat16 tensors, read as float32",
                                "float16 tensors, read as float32")
    formats.write(tmp_path / "b.pt", params, source)
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert back["acc"] == 93.5 and list(back["net"]) == list(state)
    for name, value in state.items():
        assert back["net"][name].dtype == value.dtype and torch.equal(back["net"][name], value)
    formats.write(tmp_path / "c.safetensors", params, source)
    found, metadata = formats._read_safetensors(tmp_path / "c.safetensors")
    assert metadata == {"format": "pt"} and len(found) == len(state)
    assert found["features.0.weight"].dtype == np.float16
    assert found["classifier.bias"].dtype == jnp.bfloat16
    assert found["features.1.num_batches_tracked"] == 7
    assert found["features.4.weight"].dtype == np.float32


def test_a_safetensors_file_keeps_all_else(tmp_path, arrays, torch):
    theirs = {f"module.{name}": value.astype(jnp.bfloat16 if value.ndim == 4 else value.dtype)
              for name, value in arrays.items()}
    theirs["module.classifier.weight"] = theirs["module.classifier.weight"].astype(np.float16)
    theirs["module.features.1.num_batches_tracked"] = np.array(7)
    safetensors.numpy.save_file(theirs, tmp_path / "a.safetensors", {"author": "me"})
    params, source = formats.read(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(
        params.weights["conv1"]["kernel"],
        theirs["module.features.0.weight"].astype(np.float32).transpose(2, 3, 1, 0))
    formats.write(tmp_path / "b.safetensors", params, source)
    back, metadata = formats._read_safetensors(tmp_path / "b.safetensors")
    assert metadata == {"author": "me"} and set(back) == set(theirs)
    for name, value in theirs.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value)
    formats.write(tmp_path / "c.pth", params, source)
    state = torch.load(tmp_path / "c.pth", weights_only=True)
    assert state["features.0.weight"].dtype == torch.bfloat16
    assert state["classifier.weight"].dtype == torch.float16
    assert int(state["features.1.num_batches_tracked"]) == 7


def test_the_sources_spelling_is_kept(tmp_path):
    spelt = {name.replace("shortcut", "downsample").replace("linear", "fc"): value
             for name, value in _zeros("resnet18", (32, 32, 3)).items()}
    params, source = formats.read(safetensors_file(tmp_path / "a.safetensors", spelt))
    formats.write(tmp_path / "b.safetensors", params, source)
    found = formats._read_safetensors(tmp_path / "b.safetensors")[0]
    assert set(found) == set(spelt) and "fc.weight" in found


def test_pytorch_is_needed_for_its_own_files_alone(tmp_path, small_params, arrays, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"PK")
    safetensors_file(tmp_path / "a.safetensors", arrays)
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` fail
    params, source = formats.read(tmp_path / "a.safetensors")
    formats.write(tmp_path / "b.safetensors", params, source)
    formats.write(tmp_path / "c", params, source)
    for name in ("b.safetensors", "c"):
        _same(formats.read(tmp_path / name)[0], small_params)
    with pytest.raises(ImportError, match=r"awm-jax\[torch\]"):
        formats.read(tmp_path / "a.pth")


def test_tensors_of_numpy_and_jax_are_taken(small_params, arrays):
    _same(torch_compat.params_from_state_dict(arrays, image_shape=(8, 8, 3)), small_params)
    on_device = {name: jnp.asarray(value) for name, value in arrays.items()}
    _same(torch_compat.params_from_state_dict(on_device, image_shape=(8, 8, 3)), small_params)


@pytest.mark.parametrize("name, shape, told", [
    ("small_vgg", (8, 8, 3), "told by the classifier's inputs"),
    ("small_vgg", (40, 40, 1), "told by the classifier's inputs"),
    ("mlp", (28, 28, 1), "told by the classifier's inputs"),
    ("mlp", (9, 9, 3), "told by the classifier's inputs"),
    ("cnn", (28, 28, 1), "told by the classifier's inputs"),
    ("cnn", (32, 32, 3), "told by the classifier's inputs"),
    ("shufflenet_v2", (32, 32, 3), "assumed: its tensors do not tell"),
])
def test_the_tensors_tell_the_image_size(name, shape, told, tmp_path):
    path = safetensors_file(tmp_path / "a.safetensors", _zeros(name, shape))
    params, source = formats.read(path)
    assert params.arch == Arch(name=name, num_classes=3, image_shape=shape)
    assert f"image size {shape[0]}x{shape[1]}, {told}" in source.notes
    assert formats.fixed_size(name) == told.startswith("told")


def test_an_image_size_can_be_asked_for(tmp_path):
    path = safetensors_file(tmp_path / "a.safetensors", _zeros("small_vgg", (8, 17, 3)))
    with pytest.raises(ValueError, match=r"weight takes 256 inputs, which no square image gives"):
        formats.read(path)
    assert formats.read(path, image_size=(8, 17))[0].arch.image_shape == (8, 17, 3)
    path = safetensors_file(tmp_path / "b.safetensors", _zeros("small_vgg", (32, 32, 3)))
    assert formats.read(path)[0].arch.image_shape == (32, 32, 3)
    assert formats.read(path, image_size=(33, 39))[0].arch.image_shape == (33, 39, 3)
    with pytest.raises(ValueError, match=r"which images of 32x32 give, not the 28x32 asked for"):
        formats.read(path, image_size=(28, 32))
    path = safetensors_file(tmp_path / "c.safetensors", _zeros("shufflenet_v2", (32, 32, 1)))
    params, source = formats.read(path, image_size=(64, 48))
    assert params.arch.image_shape == (64, 48, 1)
    assert source.notes[1] == "image size 64x48, as asked for"
    checkpoint.save(tmp_path / "c", params)
    assert formats.read(tmp_path / "c")[0].arch == params.arch
    params, source = formats.read(tmp_path / "c", image_size=(40, 32))
    assert params.arch.image_shape == (40, 32, 1)
    assert source.notes[1] == "image size 40x32, as asked for (the checkpoint says 64x48)"
    for size in ((64,), (0, 8)):
        with pytest.raises(ValueError, match=r"c\.safetensors: Expected (image_size|height)"):
            formats.read(path, image_size=size)


@pytest.fixture
def source(tmp_path, arrays, small_params):
    """A safetensors file that was read."""
    return formats.read(safetensors_file(tmp_path / "net.safetensors", arrays))[1]


def test_the_source_is_never_overwritten(tmp_path, small_params, source):
    before = source.path.read_bytes()
    os.link(source.path, tmp_path / "hard.safetensors")
    (tmp_path / "soft.safetensors").symlink_to(source.path)
    (tmp_path / "loop").symlink_to(tmp_path)
    for name in ("net.safetensors", "hard.safetensors", "soft.safetensors",
                 "loop/net.safetensors", "loop/../" + tmp_path.name + "/hard.safetensors"):
        with pytest.raises(ValueError, match="to be another place"):
            formats.write(tmp_path / name, small_params, source, overwrite=True)
    assert source.path.read_bytes() == before
    checkpoint.save(tmp_path / "dir", small_params)
    inside = formats.read(tmp_path / "dir")[1]
    for name in ("dir", "dir/new.safetensors"):
        with pytest.raises(ValueError, match="to be another place"):
            formats.write(tmp_path / name, small_params, inside, overwrite=True)
    # A checkpoint with the source in it would take it along when it is replaced.
    within = dataclasses.replace(source, path=tmp_path / "dir" / "net.safetensors")
    with pytest.raises(ValueError, match="to be another place"):
        formats.write(tmp_path / "dir", small_params, within, overwrite=True)


def test_what_is_there_stays_unless_it_is_said(tmp_path, small_params, source):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"old")
    with pytest.raises(FileExistsError, match=r"out\.safetensors to be free.*overwrite=True"):
        formats.write(target, small_params, source)
    assert target.read_bytes() == b"old"
    formats.write(target, small_params, source, overwrite=True)
    _same(formats.read(target)[0], small_params)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match="to be free"):
        formats.write(tmp_path / "link.safetensors", small_params, source)
    (tmp_path / "dir.pth").mkdir()
    with pytest.raises(FileExistsError, match="it is a directory"):
        formats.write(tmp_path / "dir.pth", small_params, source, overwrite=True)
    (tmp_path / "home").mkdir()
    with pytest.raises(FileExistsError, match=r"home.*never overwritten"):
        formats.write(tmp_path / "home", small_params, source, overwrite=True)


def test_a_target_can_be_checked_beforehand(tmp_path, source):
    formats.check_target(tmp_path / "b.PTH", source.path)
    for name in ("b.onnx", "b.v2", "b.safetensors.gz"):
        with pytest.raises(ValueError, match=r"\.pth \(or \.pt\).*\.safetensors.*without a suffix"):
            formats.check_target(tmp_path / name, source.path)
    with pytest.raises(ValueError, match="to be another place"):
        formats.check_target(source.path, source.path)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there"):
        formats.check_target(tmp_path / "there", source.path)
    formats.check_target(tmp_path / "there", source.path, overwrite=True)


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth", "out"])
def test_an_interrupted_write_leaves_the_old_one(name, tmp_path, small_params, source, monkeypatch):
    if name == "out.pth":
        pytest.importorskip("torch")
    formats.write(tmp_path / name, small_params, source)
    before = sorted(p.name for p in tmp_path.iterdir())

    def stop(*args):
        raise KeyboardInterrupt

    changed = dataclasses.replace(small_params, weights=jax.tree.map(
        lambda w: w + 1, small_params.weights))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            formats.write(tmp_path / name, changed, source, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    _same(formats.read(tmp_path / name)[0], small_params)


def test_networks_that_cannot_be_written(tmp_path, small_params, arrays, source):
    other = models.create(jax.random.key(0), Arch(name="small_vgg", num_classes=5,
                                                  image_shape=(8, 8, 3)))
    with pytest.raises(ValueError, match=r"net\.safetensors: The template is no.*5 classes"):
        formats.write(tmp_path / "out.safetensors", other, source)
    half = safetensors_file(tmp_path / "half.safetensors", arrays,
                        classifier__bias=arrays["classifier.bias"].astype(np.float16))
    large = dataclasses.replace(small_params, weights={
        **small_params.weights, "dense": {**small_params.weights["dense"],
                                          "bias": jnp.full(4, 1e6)}})
    with pytest.raises(ValueError, match=r"infinity in classifier\.bias\..*a directory keeps"):
        formats.write(tmp_path / "out.safetensors", large, formats.read(half)[1])
    source.path.unlink()
    with pytest.raises(OSError, match=r"net\.safetensors"):
        formats.write(tmp_path / "out.safetensors", small_params, source)
    assert not (tmp_path / "out.safetensors").exists()
