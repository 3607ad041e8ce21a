"""Sweeps: rows against calls one by one, chunks that fit, going on, devices, hosts."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from awm_test import _forbid_compilation

from awm_jax import checkpoint, purify, sweep
from awm_jax.defences import DEFENCES, AWMConfig, awm_losses, awm_rows, awm_steps, rows
from awm_jax.defences.survey import Survey
from awm_jax.types import Batch, Params
from experiments import cli, defending, hosts, merge, oneshot, sweeping

HERE = pathlib.Path(__file__).resolve().parent
COUNT = 12


def _walk(row, matrix):
    """Random numbers and matrix products."""
    x = jax.random.normal(row["key"], (3, 4))
    return {"x": jax.numpy.tanh(x @ matrix) * row["scale"], "sum": x.sum()}


@pytest.fixture(scope="module")
def table():
    return {"key": jax.random.split(jax.random.key(0), COUNT),
            "scale": np.arange(COUNT, dtype=np.float32)}


MATRIX = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)


@pytest.mark.parametrize("chunk", [None, 5, COUNT])
def test_over_rows_is_a_loop(table, chunk):
    found = sweep.over_rows(_walk, table, (MATRIX,), chunk=chunk)
    assert found["x"].shape == (COUNT, 3, 4) and isinstance(found["x"], np.ndarray)
    for i in range(COUNT):
        alone = _walk(sweep.take(table, i), MATRIX)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-5, rtol=1e-5),
                     found, alone)


def test_second_sweep_compiles_nothing(table):
    sweep.over_rows(_walk, table, (MATRIX,), chunk=5)
    with jax.log_compiles(), _forbid_compilation():
        sweep.over_rows(_walk, table, (2 * MATRIX,), chunk=5)


def _fake_memory(monkeypatch, free):
    monkeypatch.setattr(sweep, "free_memory", lambda device: free)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 6, 12])
def test_the_largest_chunk_that_fits(table, chunk, monkeypatch):
    """Free memory a little over what this chunk takes: a larger one would not have fitted."""
    shapes = sweep._shapes((sweep.take_shape(table), (MATRIX,)))
    needed = sweep._needed(_walk, shapes, chunk, tuple(jax.devices()[:1]))
    _fake_memory(monkeypatch, int(needed / 0.9) + 2)
    program = sweep.prepare(_walk, table, (MATRIX,))
    assert program.chunk == chunk and f"{COUNT} rows, {chunk} at a time on cpu" in program.why
    assert ("12 at a time would need" in program.why) == (chunk < COUNT)
    _fake_memory(monkeypatch, None)
    assert "no faster" in sweep.prepare(_walk, table, (MATRIX,)).why


def test_a_row_that_does_not_fit_is_told_with_both_numbers(table, monkeypatch):
    _fake_memory(monkeypatch, 100)
    told = r"one row to fit into the 90 B usable on cpu, it needs 1\.\d+ KiB\. Take"
    with pytest.raises(ValueError, match=told):
        sweep.prepare(_walk, table, (MATRIX,))


def test_a_compiler_that_gives_up_gets_smaller_chunks(table, monkeypatch):
    real = sweep._compiled

    def compiled(fun, shapes, chunk, devices):
        if chunk > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: ran out of memory")
        return real(fun, shapes, chunk, devices)

    monkeypatch.setattr(sweep, "_compiled", compiled)
    _fake_memory(monkeypatch, 2**30)
    program = sweep.prepare(_walk, table, (MATRIX,))
    assert program.chunk == 3 and "12 at a time would need more than there is" in program.why


@pytest.mark.parametrize("table, options, word", [
    ({"a": np.zeros(3), "b": np.zeros(4)}, {}, r"\(3,\), \(4,\)"), ({"a": np.zeros(0)}, {}, "one"),
    ({"a": np.zeros(3)}, {"chunk": 0}, "chunk=0")])
def test_wrong_rows_are_refused(table, options, word):
    with pytest.raises(ValueError, match=word):
        sweep.over_rows(lambda row: row["a"], table, **options)


QUICK = {"epochs": 2, "inner_steps": 2, "outer_steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def networks(one_block):
    weights = jax.tree.map(lambda w: 1.2 * w, one_block.weights)
    return [one_block, Params(weights, one_block.batch_stats, one_block.arch)]


@pytest.fixture(scope="module")
def batches(small_batch):
    return [small_batch, Batch(1 - small_batch.images, small_batch.labels)]


def _numbers(found):
    """Everything that AWM found, as one array."""
    return np.concatenate([np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(
        (found.masks, found.history, found.trigger, found.survey))])


def _by_number(groups):
    return {number: found for group in groups
            for number, found in zip(group.rows, group.found, strict=True)}


def test_awm_over_rows_is_purify(networks, batches):
    """Other networks, images, keys and settings, two at a time, the last one alone."""
    paper = {**QUICK, "variant": "paper"}
    configs = [AWMConfig(**paper), AWMConfig(**paper, alpha=0.5, tau=50.0),
               AWMConfig(**paper, outer_lr=0.05, inner_lr=3.0, gamma=1e-3)]
    asked = [rows.Row(jax.random.key(i), i % 2, int(i > 0), configs[i]) for i in range(3)]
    stacked = rows.stack(DEFENCES["awm_paper"], networks, batches)
    told, seen = [], []
    found = _by_number(awm_rows.purify(
        asked, stacked, chunk=2, every=1, tell=told.append,
        on_epochs=lambda done, total, picks, state, latest: seen.append((done, [*picks]))))
    assert told == ["3 rows, 2 at a time on cpu: as asked for"]
    assert seen == [(1, [0, 1]), (2, [0, 1]), (1, [2]), (2, [2])]
    for number, row in enumerate(asked):
        alone = purify(networks[row.network], batches[row.batch], config=row.config, key=row.key,
                       every=1)
        np.testing.assert_allclose(_numbers(found[number]), _numbers(alone), atol=2e-5, rtol=1e-4)
        assert found[number].status == alone.status
    assert np.abs(_numbers(found[0]) - _numbers(found[1])).max() > 0.01


class _Preempted(Exception):
    pass


def test_an_interrupted_sweep_goes_on_to_the_same_bits(networks, batches, tmp_path):
    """A first group done, a second one half, a third not begun; the rows in another order."""
    config = AWMConfig(**QUICK, variant="paper")
    asked = [rows.Row(jax.random.key(i), i % 2, i % 2, config, f"row {i}") for i in range(5)]
    stacked = rows.stack(DEFENCES["awm_paper"], networks, batches)
    how, calls = {"chunk": 2, "every": 1}, []
    whole = _by_number(awm_rows.purify(asked, stacked, **how))

    def watch(done, total, picks, state, latest):
        calls.append((done, [*picks]))
        if len(calls) == 3:
            raise _Preempted

    keep = tmp_path / "state"
    with pytest.raises(_Preempted):
        list(awm_rows.purify(asked, stacked, keep=keep, on_epochs=watch, **how))
    assert checkpoint.metadata(keep) == {"rows": ["row 2", "row 3"], "chunk": 2, "done": 1}
    told = []
    again = _by_number(awm_rows.purify(asked[:1:-1], stacked, keep=keep, every=1,
                                       tell=told.append, on_epochs=watch))
    assert told == ["3 rows, 2 at a time on cpu: as asked for",
                    "2 rows go on after 1 of 2 epochs"]
    assert calls == [(1, [0, 1]), (2, [0, 1]), (1, [2, 3]), (2, [2, 1]), (1, [0]), (2, [0])]
    for number, found in again.items():
        np.testing.assert_array_equal(_numbers(found), _numbers(whole[4 - number]))
        assert found.status == whole[4 - number].status
    assert not keep.exists()


def test_all_that_a_run_needs_is_kept(one_block, tmp_path):
    """The survey, triggers, numbers that are none: by the shapes of the default variant."""
    settings = AWMConfig(**QUICK).resolve(4, (8, 8, 3))
    rng = np.random.default_rng(0)
    arch = one_block.arch
    survey = Survey(*(np.zeros(shape, np.float32) for shape in (
        (arch.num_classes, *arch.image_shape), (arch.num_classes,), arch.image_shape, (), (),
        (6, 6, 2), (arch.num_classes,), (), arch.image_shape, ())))
    state = awm_steps.init(one_block, settings, jax.tree.map(jax.numpy.asarray, survey))

    def many(leaf):
        return rng.normal(size=(3, *leaf.shape)).astype(leaf.dtype)

    state, survey = jax.tree.map(many, (state, survey))
    history = awm_losses.AWMInfo(*rng.random((6, 3, 1), np.float32))
    progress = awm_rows._Progress(state, survey, history)
    awm_rows._save(tmp_path / "state", ["a", "b", "c"], 1, progress)
    asked = [rows.Row(None, 0, 0, None, name) for name in "xcab"]
    numbers, found = awm_rows._load(tmp_path / "state", checkpoint.metadata(tmp_path / "state"),
                                    asked, (state, survey))
    assert numbers.tolist() == [2, 3, 1] and found.done == 1
    assert jax.tree.structure(found) == jax.tree.structure(progress)
    jax.tree.map(np.testing.assert_array_equal, found, progress)


def test_the_state_of_other_rows_is_left_out_of_account(tmp_path):
    def kept(chunk=None, every=1):
        return awm_rows._kept(tmp_path / "state", [rows.Row(None, 0, 0, None, "a")], chunk, 4,
                              every)

    def save(names, done):
        checkpoint.save_tree(tmp_path / "state", {"0": np.zeros(1)},
                             {"rows": names, "chunk": 2, "done": done}, overwrite=True)

    assert kept() is None
    save(["a"], 2)
    assert kept()["done"] == 2 and kept(chunk=2) and kept(every=2)
    assert kept(chunk=3) is None and kept(every=4) is None
    save(["b"], 2)
    assert kept() is None


@pytest.mark.parametrize("name, chunk", [("ft", 2), ("clp", None)])
def test_any_defence_over_rows_is_a_call(name, chunk, networks, batches):
    defence = DEFENCES[name]
    config = defence.default if name == "clp" else defence.Config(epochs=2, batch_size=4, crop=1)
    given = [None] if name == "clp" else batches
    asked = [rows.Row(jax.random.key(i), i % 2, i % len(given), config) for i in range(3)]
    stacked = rows.stack(defence, networks, given)
    found = _by_number(rows.run(defence, asked, stacked, chunk=chunk))
    for number, row in enumerate(asked):
        alone = defence(networks[row.network], given[row.batch], key=row.key, config=config)
        assert found[number].status == alone.status
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3),
                     (found[number].params, found[number].info), (alone.params, alone.info))


def test_rows_of_several_programs_are_refused(networks, batches, tiny):
    ft, key = DEFENCES["ft"], jax.random.key(0)
    stacked = rows.stack(ft, networks, batches)
    with pytest.raises(ValueError, match="one config, got 2"):
        list(rows.run(ft, [rows.Row(key, 0, 0, ft.Config(epochs=e)) for e in (1, 2)], stacked))
    with pytest.raises(ValueError, match="differ in epochs"):
        list(awm_rows.purify([rows.Row(key, 0, 0, AWMConfig(epochs=e, replay=0.0))
                              for e in (2, 2, 4)], stacked))
    with pytest.raises(ValueError, match="name of its own"):
        list(awm_rows.purify([rows.Row(key, 0, 0, AWMConfig())] * 2, stacked,
                             keep=pathlib.Path("/nowhere")))
    with pytest.raises(ValueError, match="one architecture"):
        rows.stack(ft, [networks[0], tiny], batches)
    with pytest.raises(ValueError, match=r"each batch.*\[3, 6\]"):
        rows.stack(ft, networks, [batches[0], Batch(*(part[:3] for part in batches[0]))])


ARGV = ["--epochs", "1", "--purify_epochs", "2", "--arch", "one_block_cnn", "--defence",
        "awm_paper", "--attack", "badnets,blended", "--set", "inner_steps=2", "--set",
        "outer_steps=2"]


def _cells(folder):
    return json.loads((folder / "results.json").read_text())["cells"]


def test_the_command_sweeps_what_it_would_do_one_by_one(tiny_dataset, capsys):
    loop, swept = tiny_dataset / "loop", tiny_dataset / "swept"
    grid = [*ARGV, "--grid", "alpha=.5,.9", "--sweep", "on", "--chunk", "3", "--out", str(swept)]
    assert oneshot.main([*ARGV, "--attack", "badnets", "--grid", "alpha=.5", "--seeds", "1",
                         "--sweep", "off", "--out", str(loop)]) == 0
    assert oneshot.main([*grid, "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "4 rows, 3 at a time on cpu" in out and "| badnets | awm_paper-alpha=.5 |" in out
    one, other = _cells(loop), _cells(swept)
    assert len(one) == 1 and len(other) == 4 and set(one) < set(other)
    assert [cell["together"] for cell in other.values()] == [
        {"rows": count, "chunk": 3, "devices": 1} for count in (3, 3, 3, 1)]
    for name, before in one.items():
        cell = other[name]
        assert cell.keys() - {"together"} == before.keys()
        for same in ("settings", "status", "clean_indices", "before"):
            assert cell[same] == before[same]
        np.testing.assert_allclose(cell["history"]["clean_loss"], before["history"]["clean_loss"],
                                   rtol=1e-3)
        assert abs(cell["after"]["acc"] - before["after"]["acc"]) < 3  # an image or two of 60
        assert cell["curve"]["epoch"] == before["curve"]["epoch"]
    pictures = {path.name for path in swept.glob("*.png")}
    assert {path.name for path in loop.glob("*.png")} < pictures
    assert "blended-awm_paper-alpha=.9-trigger.png" in pictures
    assert checkpoint.exists(swept / "purified" / "blended-awm_paper-alpha=.9-0")

    assert oneshot.main([*grid, "--seeds", "2"]) == 0
    fresh = {name: cell for name, cell in _cells(swept).items() if name not in other}
    assert len(fresh) == 4 and {cell["seed"] for cell in fresh.values()} == {1}
    assert not list((swept / "sweep").iterdir())


def test_who_sweeps(monkeypatch):
    assert not sweeping.wanted("auto") and sweeping.wanted("on")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sweeping.wanted("auto") and not sweeping.wanted("off")


@pytest.mark.parametrize("argv, word", [
    (["--grid", "alpha"], "NAME=VALUE"), (["--grid", "alpha=.5,.5"], "different"),
    (["--sweep", "maybe"], "auto"), (["--chunk", "0"], "whole number")])
def test_wrong_options_get_one_line(argv, word, capsys):
    with pytest.raises(SystemExit):
        cli.parser().parse_args(argv)
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("argv, word", [
    (["--host", "1"], "--distributed beside --host"),
    (["--distributed", "--host", "1"], "all of --coordinator, --num_hosts, --host"),
    (["--distributed", "--coordinator", "a:1", "--num_hosts", "2", "--host", "2"], "0..1"),
    (["--grid", "alpha=.5,7"], "alpha=7"), (["--grid", "rho=1"], "rho of --set or --grid")])
def test_options_that_do_not_go_together(argv, word, capsys, tmp_path):
    assert oneshot.main([*argv, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1


def test_a_grid_is_for_defences_that_have_the_setting():
    args = cli.parser().parse_args(["--grid", "alpha=.5,.9", "--grid", "tau=10,20", "--set", "a=1"])
    assert [v.variant for v in oneshot._variants("awm", args)] == [
        "alpha=.5,tau=10", "alpha=.5,tau=20", "alpha=.9,tau=10", "alpha=.9,tau=20"]
    assert [(v.variant, v.set) for v in oneshot._variants("ft", args)] == [("", [("a", "1")])]
    last = oneshot._variants("awm", args)[-1]
    assert last.set == [("a", "1"), ("alpha", ".9"), ("tau", "20")]
    assert defending.label("awm", last) == "awm-alpha=.9,tau=20"


def test_hosts_share_all_work_once(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares, turns = [], []
    for host in range(3):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        shares.append(hosts.share(range(8)))
        turns.append(hosts.turns(range(8)))
    assert shares == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert turns == [[0, 3, 6], [1, 4, 7], [2, 5]]


def _start(script, *args, **env):
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, args)], text=True, cwd=HERE.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent), **env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_eight_devices():
    process = _start("sweep_devices.py", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out


def test_two_hosts(tmp_path, capsys):
    """One trains the network, the other waits for it; each purifies and writes its half."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [_start("sweep_host.py", tmp_path / "run", port, host, 2,
                   AWM_CACHE_DIR=str(tmp_path / "cache")) for host in range(2)]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert ["TRAINED" in text for text in said] == [True, False]
    folder = tmp_path / "run"
    seeds = [[cell["seed"] for cell in json.loads(path.read_text())["cells"].values()]
             for path in hosts.results_files(folder)]
    assert seeds == [[0], [1]] and not (folder / "results.json").exists()
    assert merge.main([str(folder)]) == 0
    table = capsys.readouterr().out
    assert table.strip() == (folder / "table.md").read_text().strip() and "0/2" in table
    for seed in range(2):  # written by either process, read by this one
        params, meta = checkpoint.load(folder / "purified" / f"badnets-clp-{seed}")
        assert meta["status"] == "OK" and "-one-shot-" in meta["made_of"]
        assert params.arch.name == "one_block_cnn"
