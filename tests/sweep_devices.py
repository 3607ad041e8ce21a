"""Eight devices against fewer; run by sweep_test.py, as devices are forced before JAX starts."""

import jax
import numpy as np
from conftest import OneBlockCNN, _random

from awm_jax import models, sweep
from awm_jax.defences import DEFENCES, AWMConfig, awm_rows, rows
from awm_jax.types import Batch
from experiments import sweeping

DEVICES = jax.devices()


def noisy_walk(row, matrix):
    """Random numbers, a loop, matrix products."""
    start = jax.random.normal(row["key"], (5, 8))

    def step(x, _):
        return jax.numpy.tanh(x @ matrix * row["scale"]), x.sum()

    return jax.lax.scan(step, start, None, length=4)


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other),
                                                    strict=True))


def near(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


def any_function():
    count = 21
    table = {"key": jax.random.split(jax.random.key(0), count),
             "scale": np.linspace(0.5, 1, count, dtype=np.float32)}
    matrix = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    order = np.random.default_rng(1).permutation(count)
    for chunk in (1, 2):
        eight = sweep.over_rows(noisy_walk, table, (matrix,), chunk=chunk)
        three = sweep.over_rows(noisy_walk, sweep.take(table, order), (matrix,), chunk=chunk,
                                devices=DEVICES[:3])
        assert equal(sweep.take(eight, order), three), chunk
        few = sweep.over_rows(noisy_walk, sweep.take(table, order[:4]), (matrix,), chunk=chunk)
        assert equal(sweep.take(eight, order[:4]), few), chunk
    near(eight, sweep.over_rows(noisy_walk, table, (matrix,), chunk=1))
    near(eight, sweep.over_rows(noisy_walk, table, (matrix,), chunk=2, devices=DEVICES[:1]))
    program = sweep.prepare(noisy_walk, table, (matrix,))
    assert (program.chunk, program.size) == (1, 8) and "each of 8 devices" in program.why
    placed = program.compiled(jax.device_put(sweep.take(table, np.arange(8))),
                              program.place((matrix,)))
    assert {shard.device for shard in placed[0].addressable_shards} == set(DEVICES)


def purified(asked, stacked, order, **how):
    found = {}
    for group in awm_rows.purify([asked[i] for i in order], stacked, **how):
        for number, one in zip(group.rows, group.found, strict=True):
            found[order[number]] = (one.masks, one.history, one.trigger)
    return [found[i] for i in range(len(asked))]


def masking():
    models.MODELS["one_block_cnn"] = OneBlockCNN
    params = _random("one_block_cnn")
    rng = np.random.default_rng(0)
    batch = Batch(rng.random((4, 8, 8, 3), np.float32), np.arange(4, dtype=np.int32))
    config = AWMConfig(variant="paper", epochs=1, inner_steps=1, outer_steps=2, batch_size=4)
    asked = [rows.Row(jax.random.key(i), 0, 0, config) for i in range(10)]
    stacked = rows.stack(DEFENCES["awm_paper"], [params], [batch])
    eight = purified(asked, stacked, list(range(10)))
    assert not equal(eight[0], eight[1])
    assert equal(eight, purified(asked, stacked, [7, 1, 9, 0, 3, 2, 8, 4, 6, 5],
                                 devices=DEVICES[:3]))


if __name__ == "__main__":
    assert len(DEVICES) == 8, DEVICES
    assert sweeping.wanted("auto") and not sweeping.wanted("off")
    any_function()
    masking()
