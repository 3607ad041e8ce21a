"""The benchmark: its cells, its table, its second start; both sides do their jobs."""

import json
import pathlib
import subprocess

import jax
import pytest

from awm_jax import masks, models
from awm_jax.types import Arch
from experiments import benchmark, benchmark_cells
from experiments.benchmark_cells import Cell

SMALL = {"batch": 4, "epochs": 1, "images": 6, "classes": 4, "steps": 1}


def _times(seconds, compiling=1.0, figure=0.9):
    return {"seconds": seconds, "compiling": compiling, "peak": 300.0, "before": 200.0,
            "figure": figure}


def test_table_by_hand():
    """Medians 6 and 4 of ten epochs: a ratio of .67; with compiling (4 + 3) / (6 + 1).

    In bfloat16 3 and 2, the same ratio, and .33 to PyTorch in float32 on as many threads; on one
    thread there is no float32 to compare with.
    """
    cell = vars(Cell(job="purify", arch="small_vgg", batch=16, epochs=10, images=43))
    half = {**cell, "precision": "bfloat16"}
    text = benchmark.table({
        "a": {"cell": cell, "threads": 2, "runs": {
            "PyTorch": [_times(6.0), _times(1.0), _times(60.0)], "awm_jax": [_times(4.0, 3.0)]}},
        "b": {"cell": half, "threads": 2, "runs": {
            "PyTorch": [_times(3.0)], "awm_jax": [_times(2.0)]}},
        "c": {"cell": half, "threads": 1, "runs": {"PyTorch": [_times(9.0)]}}})
    two, alone = (f"cpu, {n} threads, 43 images, 10 epochs" for n in (2, 1))
    assert text.splitlines()[2:] == [
        f"| purify | small_vgg | 16 | conv | float32 | {two} | PyTorch | 3 | 6.0 | 0.600 | 1.00 "
        "| 1.00 | 1.0 | 1.00 | 300 | 200 | 0.900 |",
        f"| purify | small_vgg | 16 | conv | float32 | {two} | awm_jax | 1 | 4.0 | 0.400 | 0.67 "
        "| 0.67 | 3.0 | 1.00 | 300 | 200 | 0.900 |",
        f"| purify | small_vgg | 16 | conv | bfloat16 | {two} | PyTorch | 1 | 3.0 | 0.300 | 1.00 "
        "| 0.50 | 1.0 | 1.00 | 300 | 200 | 0.900 |",
        f"| purify | small_vgg | 16 | conv | bfloat16 | {two} | awm_jax | 1 | 2.0 | 0.200 | 0.67 "
        "| 0.33 | 1.0 | 0.75 | 300 | 200 | 0.900 |",
        f"| purify | small_vgg | 16 | conv | bfloat16 | {alone} | PyTorch | 1 | 9.0 | 0.900 | 1.00 "
        "| - | 1.0 | 1.00 | 300 | 200 | 0.900 |"]


def test_doubtful_figures_are_told():
    cell = vars(Cell(job="purify", arch="small_vgg", batch=16, epochs=10, images=43))
    alike = {"PyTorch": [_times(6.0, figure=0.91)], "awm_jax": [_times(4.0)]}
    apart = {"PyTorch": [_times(6.0, figure=0.5)], "awm_jax": [_times(4.0)]}
    said = benchmark._warnings({
        "a": {"cell": cell, "busy": False, "runs": alike},
        "b": {"cell": cell, "busy": True, "runs": alike},
        "c": {"cell": cell, "busy": False, "runs": apart},
        "d": {"cell": {**cell, "job": "train"}, "busy": False, "runs": apart}})
    assert len(said) == 2 and "busy at the start of b:" in said[0]
    assert "masks of c ended at 0.500 and 0.900" in said[1]


@pytest.fixture
def as_told():
    """JAX's precision as it was."""
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


ALL = [*((job, "float32") for job in benchmark_cells.JOBS), ("purify", "bfloat16"),
       ("train", "bfloat16")]


@pytest.mark.parametrize("job, precision", ALL)
def test_our_side_does_every_job(job, precision, monkeypatch, as_told):
    monkeypatch.setattr(benchmark, "_cores", lambda: [0])
    monkeypatch.setattr(benchmark.os, "sched_setaffinity", lambda *args: None, raising=False)
    cell = Cell(job=job, arch="tiny_cnn", seeds=2, precision=precision, **SMALL)
    found = benchmark.one("awm_jax", cell, 1)
    assert found["seconds"] > 0 and found["compiling"] > 0 and found["peak"] >= found["before"] > 0
    assert (0.97 < found["figure"] < 1) if job != "train" else found["figure"] > 0
    assert jax.config.jax_default_matmul_precision == precision


@pytest.mark.parametrize("arch", benchmark_cells.ARCHS)
@pytest.mark.parametrize("job, precision", ALL)
def test_pytorchs_side_does_every_job(job, precision, arch, monkeypatch, torch):
    from experiments import benchmark_torch

    cell = Cell(job=job, arch=arch, seeds=2, precision=precision, **SMALL)
    found = benchmark_torch.JOBS[job](cell, False)
    assert found.seconds > 0 and found.compiling >= 0 and found.peak >= found.before > 0
    assert (0.97 < found.figure < 1) if job != "train" else found.figure > 0


@pytest.mark.parametrize("layers", benchmark_cells.LAYERS)
@pytest.mark.parametrize("arch", benchmark_cells.ARCHS)
def test_both_sides_mask_as_much(arch, layers, torch):
    from experiments import benchmark_torch

    cell = Cell(job="purify", arch=arch, layers=layers, **SMALL)
    theirs = sum(m.numel() for m in benchmark_torch._Purifier(cell, False).masks.values())
    found = Arch(name=arch, num_classes=4)
    weights = jax.eval_shape(lambda k: models.create(k, found), jax.random.key(0)).weights
    chosen = models.deep_convolutions(found) if layers == "deep" else "conv"
    assert theirs == masks.size(jax.eval_shape(lambda w: masks.init(w, chosen), weights))


def test_crops_of_pytorch_are_crops(torch):
    """Each image is a window of itself with its zeros around it."""
    from experiments import benchmark_torch

    torch.manual_seed(1)
    x = torch.arange(1.0, 2 * 3 * 25 + 1).reshape(2, 3, 5, 5)
    found = benchmark_torch._cropped(x, 2)
    for image, crop in zip(torch.nn.functional.pad(x, (2,) * 4), found, strict=True):
        windows = [image[:, i : i + 5, j : j + 5] for i in range(5) for j in range(5)]
        assert sum(torch.equal(w, crop) for w in windows) == 1


def test_what_is_missing_is_said_before_any_run(tmp_path, monkeypatch, capsys):
    def absent(name):
        raise benchmark.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(benchmark.results, "versions", dict)
    monkeypatch.setattr(benchmark.metadata, "version", absent)
    assert benchmark.main(["--out", str(tmp_path / "b")]) == 2
    assert "pip install" in capsys.readouterr().err and not (tmp_path / "b").exists()
    monkeypatch.setattr(benchmark.os, "sched_setaffinity", lambda *args: None, raising=False)
    with pytest.raises(ValueError, match="run on a gpu, it runs on a cpu"):
        benchmark.one("awm_jax", Cell(job="train", arch="tiny_cnn", device="gpu", **SMALL), 1)


def test_it_writes_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "_torch_version", lambda: "none")
    asked = []

    def measure(side, cell, threads):
        asked.append((side, cell.job, cell.arch, cell.batch, cell.images, cell.epochs))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return _times(float(len(asked)))

    monkeypatch.setattr(benchmark, "_measure", measure)
    argv = ["--reps", "2", "--batch", "16,64", "--job", "purify", "--out", str(tmp_path / "b")]
    assert benchmark.main(argv) == 130
    assert asked[:2] == [("PyTorch", "purify", "small_vgg", 16, 43, 10),
                         ("awm_jax", "purify", "small_vgg", 16, 43, 10)]
    assert benchmark.main(argv) == 0
    assert len(asked) == 9  # two sides, two batch sizes, twice; one was interrupted
    saved = json.loads((tmp_path / "b" / "benchmark.json").read_text())
    assert [s["cell"]["images"] for s in saved["cells"].values()] == [43, 64]
    assert (tmp_path / "b" / "benchmark.png").stat().st_size > 0
    table = (tmp_path / "b" / "benchmark.md").read_text()
    assert "threads, 64 images, 10 epochs | awm_jax | 2 |" in table
    # Runs of another release are other cells.
    monkeypatch.setattr(benchmark.results, "versions", lambda: {"jax": "new"})
    assert benchmark.main([*argv, "--batch", "16"]) == 0 and len(asked) == 13
    assert benchmark.main([*argv, "--threads", "1000"]) == 2
    assert "--threads=1000" in capsys.readouterr().err
    assert benchmark.main([*argv, "--images", "8"]) == 2
    assert "--images=8" in capsys.readouterr().err
    for damaged in ("[]", '{"cells": []}', '{"cells": {"a": {}}}'):
        (tmp_path / "b" / "benchmark.json").write_text(damaged)
        assert benchmark.main(argv) == 2
        assert "Move it away" in capsys.readouterr().err
        assert (tmp_path / "b" / "benchmark.json").read_text() == damaged


def test_without_a_gpu_both_sides_and_the_script_say_so(tmp_path, torch):
    if torch.cuda.is_available():
        pytest.skip("There is a GPU.")
    cell = Cell(job="sweep", arch="small_vgg", device="gpu", **SMALL)
    with pytest.raises(ValueError, match="Expected PyTorch to see a GPU, it does not"):
        benchmark.one("PyTorch", cell, 1)
    script = pathlib.Path(benchmark.__file__).with_name("on_gpu.sh")
    done = subprocess.run(["/bin/bash", script], env={"PATH": "/bin:/usr/bin"}, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 2 and "there is none here: nothing was measured" in done.stderr


def test_bfloat16_on_a_gpu_is_refused_before_any_work(tmp_path, capsys):
    assert benchmark.main(["--device", "gpu", "--precision", "all", "--out", str(tmp_path)]) == 2
    assert "Leave --precision out" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_side_that_fails_is_named():
    with pytest.raises(ValueError, match=r"awm_jax failed at Cell\(.*KeyError: 'no_such_job'"):
        benchmark._measure("awm_jax", Cell(job="no_such_job", arch="small_vgg", **SMALL), 1)


def test_idle_time_by_hand():
    """Fields: user, nice, system, idle, iowait, irq, softirq, steal; guest time is user's again."""
    stat = "cpu  10 1 2 100 5 0 1 3 4 4\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert benchmark._jiffies(stat) == (105, 122)
    assert 0 <= benchmark._load()
