"""Our side of the benchmark."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import masks, models, training
from awm_jax.defences import AWMConfig, awm_purify
from awm_jax.types import Arch
from experiments.benchmark_cells import Cell, Times, images_of, process_peak


def _peak(cell: Cell) -> float:
    """Most memory used so far, in MiB: of the GPU, or of this process."""
    if cell.device == "gpu":
        return (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"] / 2**20
    return process_peak()


def purify(cell: Cell) -> Times:
    """Seconds of one purification, or of a sweep under `vmap`, and of compiling it."""
    params = models.create(jax.random.key(0), Arch(name=cell.arch, num_classes=cell.classes))
    images, labels = map(jnp.asarray, images_of(cell))
    config = AWMConfig(variant="paper", epochs=cell.epochs, batch_size=cell.batch,
                       inner_steps=cell.steps, outer_steps=cell.steps, layers=cell.layers)
    # What the published code does where the paper says otherwise, and the PyTorch side too.
    settings = dataclasses.replace(config.resolve(cell.images, (32, 32, 3)), inner_target="own",
                                   clamp_outer=True)
    key = jax.random.key(0)

    def run(key, params, images, labels):
        return awm_purify.run(key, params, images, labels, settings)[0].masks

    if cell.job == "sweep":
        run = jax.vmap(run, in_axes=(0, None, None, None))
        key = jax.random.split(key, cell.seeds)
    before, started = _peak(cell), time.perf_counter()
    compiled = jax.jit(run).lower(key, params, images, labels).compile()
    compiling, started = time.perf_counter() - started, time.perf_counter()
    found = jax.block_until_ready(compiled(key, params, images, labels))
    return Times(time.perf_counter() - started, compiling, _peak(cell), before,
                 float(masks.l1(found)) / masks.size(found))


def train(cell: Cell) -> Times:
    """Seconds of ``cell.epochs`` training epochs, and of compiling one."""
    images, labels = images_of(cell)
    arch = Arch(name=cell.arch, num_classes=cell.classes)
    config = training.TrainConfig(epochs=cell.epochs + 1, batch_size=cell.batch)
    before = _peak(cell)
    x, y = jnp.asarray((255 * images).astype(np.uint8)), jnp.asarray(labels)
    state = training.init(jax.random.key(0), arch, config, cell.images)
    started = time.perf_counter()
    epoch = jax.jit(training.epoch, static_argnames=("arch", "config"), donate_argnums=1).lower(
        jax.random.key(1), state, x, y, arch, config).compile()
    compiling = time.perf_counter() - started
    state, _ = jax.block_until_ready(epoch(jax.random.key(1), state, x, y))
    started = time.perf_counter()
    for _ in range(cell.epochs):
        state, loss = epoch(jax.random.key(1), state, x, y)
    loss = float(loss)
    return Times(time.perf_counter() - started, compiling, _peak(cell), before, loss)


JOBS = {"purify": purify, "sweep": purify, "train": train}
