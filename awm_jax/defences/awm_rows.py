"""Adversarial Weight Masking over rows: in stretches of epochs, each kept, so that it can go on."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from awm_jax import checkpoint, sweep
from awm_jax.defences import awm_batches, awm_purify, awm_repair, awm_steps
from awm_jax.defences.awm_config import Settings
from awm_jax.defences.awm_losses import AWMInfo
from awm_jax.defences.awm_steps import AWMState
from awm_jax.defences.rows import Group, Row, Stacked, supplies, tree_of
from awm_jax.defences.survey import Survey

TRACED = ("alpha", "all_to_all_alpha", "several_alpha", "gamma", "taus", "inner_lr", "outer_lr")
"""Settings that may differ from row to row of one program; it computes with all of them."""

Watch = Callable[[int, int, np.ndarray, AWMState, dict[str, float]], None]


class _Progress(NamedTuple):
    """Where a group of rows stands, on the host: what continues, and what was logged so far."""

    state: AWMState
    found: Survey | None
    history: AWMInfo

    @property
    def done(self) -> int:
        """Epochs."""
        return self.history[0].shape[1]

    @property
    def latest(self) -> dict[str, float]:
        """The last epoch's figures, their mean over the rows."""
        return {name: float(v[:, -1].mean()) for name, v in self.history._asdict().items()}


class _Start(NamedTuple):
    """A group, and where it goes on from; None for the beginning."""

    picks: np.ndarray
    progress: _Progress | None


def static(settings: Settings) -> Settings:
    """Settings without what may differ from row to row: rows that agree in it share a program.

    Args:
      settings: from `AWMConfig.resolve`.

    Returns:
      `Settings` with zeros in the `TRACED` fields.

    Example:
      >>> from awm_jax.defences import AWMConfig
      >>> one, other = (AWMConfig(alpha=a).resolve(10, (32, 32, 3)) for a in (.8, .9))
      >>> one == other, static(one) == static(other)
      (False, True)
    """
    zeros: dict[str, Any] = {name: 0.0 for name in TRACED}
    return dataclasses.replace(settings, **{**zeros, "taus": (0.0,) * len(settings.taus)})


def _settings(rows: Sequence[Row], stacked: Stacked) -> tuple[Settings, dict[str, Any]]:
    """What all rows share, and the rest as arrays ``[R]`` (``taus``: a tuple of such)."""
    count, shape = stacked.batches.images.shape[1], stacked.networks.arch.image_shape
    each = [row.config.resolve(count, shape) for row in rows]
    shared = static(each[0])
    for settings in each:
        other = [field.name for field in dataclasses.fields(Settings)
                 if getattr(static(settings), field.name) != getattr(shared, field.name)]
        if other:
            raise ValueError(f"Expected rows that differ in {', '.join(TRACED)} at most; they "
                             f"differ in {', '.join(other)}. Run them by themselves.")
    own = {name: np.array([getattr(s, name) for s in each], np.float32) for name in TRACED}
    return shared, {**own, "taus": tuple(own["taus"].T.copy())}


def _parts(row: Any, stacked: Stacked, settings: Settings) -> tuple:
    """Key, network, prepared images and labels, and settings of one row."""
    own = dataclasses.replace(settings, **row["own"])
    params, images, labels = supplies(row, stacked)
    images, labels = awm_batches.prepare(row["key"], images, labels, own)
    return row["key"], params, images, labels, own


@functools.lru_cache(maxsize=32)
def _begin(settings: Settings) -> Callable[..., Any]:
    """What comes before the first epoch, as a function of a row."""

    def begin(row, stacked):
        key, params, images, labels, own = _parts(row, stacked, settings)
        found = awm_steps.look(key, params, images, labels, own) if own.survey_steps else None
        return awm_steps.init(params, own, found), found

    return begin


@functools.lru_cache(maxsize=32)
def _go_on(settings: Settings, length: int) -> Callable[..., Any]:
    """So many epochs, as a function of a row and its state."""

    def go_on(row, stacked):
        key, params, images, labels, own = _parts(row, stacked, settings)
        return awm_steps.epochs(key, row["state"], params, images, labels, own, length)

    return go_on


@functools.lru_cache(maxsize=32)
def _finish(settings: Settings) -> Callable[..., Any]:
    """What comes after the last epoch, as a function of a row and its state."""

    def finish(row, stacked):
        key, params, images, labels, own = _parts(row, stacked, settings)
        return awm_repair.repair(key, row["state"], params, images, labels, own)

    return finish


class _Programs(NamedTuple):
    """What rows go through, with a chunk that fits all of it."""

    begin: sweep.Program
    epochs: sweep.Program
    finish: sweep.Program | None
    """Where something comes after the epochs."""


def _programs(tree: Any, stacked: Stacked, settings: Settings, every: int, chunk: int | None,
              devices: Any) -> _Programs:
    """All programs."""
    first, then = _begin(settings), _go_on(settings, every)
    last = _finish(settings) if settings.repair else None
    state = jax.eval_shape(jax.vmap(first, in_axes=(0, None)), tree, stacked)[0]
    whole = {**tree, "state": state}

    def make(fun, rows, chunk, most):
        return sweep.prepare(fun, rows, (stacked,), chunk=chunk, devices=devices, most=most)

    epochs = make(then, whole, chunk, None)
    begin = make(first, tree, chunk, epochs.chunk)
    finish = None if last is None else make(last, whole, chunk, begin.chunk)
    least = begin if finish is None else finish
    if least.chunk < epochs.chunk:
        epochs = dataclasses.replace(make(then, whole, least.chunk, None), why=least.why)
    if least.chunk < begin.chunk:
        begin = make(first, tree, least.chunk, None)
    return _Programs(begin, epochs, finish)


def purify(rows: Sequence[Row], stacked: Stacked, *, every: int | None = None,
           chunk: int | None = None, devices: Sequence[jax.Device] | None = None,
           keep: checkpoint.Path | None = None, on_epochs: Watch | None = None,
           tell: Callable[[str], None] = lambda text: None) -> Iterator[Group]:
    """`awm_jax.purify` over rows; each gets what it would get alone, but for rounding.

    Args:
      rows: with an `AWMConfig` each; they may differ in what becomes `TRACED` settings.
      stacked: from `awm_jax.defences.rows.stack`.
      every: epochs a stretch, as `awm_jax.purify`.
      chunk: rows at a time on each device; by default as many as fit, see `awm_jax.sweep`.
      devices: where; by default all of this process.
      keep: where the running group's state is written after every stretch, by Orbax. A sweep that
        was interrupted goes on from there, with the same chunk and to the same bits; what is there
        of other rows is left out of account and in the end overwritten, so two sweeps at once need
        a place each. Removed once the last group was taken.
      on_epochs: called after every stretch as ``(done, total, numbers of the group's rows, their
        states, means of what is logged)``.
      tell: is given what was decided, a line at a time.

    Yields:
      `Group` after `Group` with `Purified`s; one that was interrupted comes first.

    Raises:
      ValueError: rows whose settings need several programs, rows without names of their own beside
        ``keep``, or a row that does not fit into memory.

    Example: `for group in purify([Row(key, 0, 0, AWMConfig())], stacked): ...`.
    """
    settings, own = _settings(rows, stacked)
    every = awm_purify.stretch(settings.epochs, every)
    tree = tree_of(rows, own)
    if keep is not None and len({row.name for row in rows}) != len(rows):
        raise ValueError("Expected a name of its own for each row, which a sweep that was "
                         "interrupted finds it by.")
    meta = _kept(keep, rows, chunk, settings.epochs, every)
    if meta is not None:  # the same bits need it
        chunk = meta["chunk"]
    programs = _programs(tree, stacked, settings, every, chunk, devices)
    epochs = programs.epochs
    tell(epochs.why)
    kept = None
    if meta is not None and keep is not None:
        like = jax.eval_shape(jax.vmap(_begin(settings), in_axes=(0, None)), tree, stacked)
        kept = _interrupted(keep, meta, rows, like)
        tell(_what_is_kept(keep, meta, kept is not None, settings.epochs))
    placed = epochs.place((stacked,))
    for start in _queue(len(rows), epochs.size, kept):
        names = [rows[number].name for number in start.picks]
        save = None if keep is None else functools.partial(_save, keep, names, epochs.chunk)
        progress, seconds = _group(start, sweep.take(tree, start.picks), placed, programs,
                                   settings.epochs, every, save, on_epochs)
        yield Group(start.picks, _purified(start.picks, rows, stacked, progress), seconds,
                    epochs.chunk, len(epochs.devices))
    if keep is not None:
        checkpoint.remove(keep)


def _group(start: _Start, mine: Any, placed: Any, programs: _Programs, total: int, every: int,
           save: Callable[[_Progress], None] | None,
           on_epochs: Watch | None) -> tuple[_Progress, float]:
    """One group to its end, and the seconds that it took without those of ``on_epochs``."""
    started, paused, progress = time.perf_counter(), 0.0, start.progress
    if progress is None:
        state, found = programs.begin.call(mine, placed)
        progress = _Progress(state, found, _nothing_yet(len(start.picks)))
    while (done := progress.done) < total:
        progress = _further(progress, programs.epochs, mine, placed)
        if save is not None:
            save(progress)
        if on_epochs is not None:
            pause = time.perf_counter()
            on_epochs(done + every, total, start.picks, progress.state, progress.latest)
            paused += time.perf_counter() - pause
    if programs.finish is not None:
        state = programs.finish.call({**mine, "state": progress.state}, placed)
        progress = progress._replace(state=state)
    return progress, time.perf_counter() - started - paused


def _further(progress: _Progress, epochs: sweep.Program, mine: Any, placed: Any) -> _Progress:
    """One stretch more."""
    state, info = epochs.call({**mine, "state": progress.state}, placed)
    history = jax.tree.map(lambda *pair: np.concatenate(pair, axis=1), progress.history, info)
    return progress._replace(state=state, history=history)


def _nothing_yet(count: int, done: int = 0) -> AWMInfo:
    """A history to fill, ``[count, done]``."""
    empty: Any = np.zeros((count, done), np.float32)
    return AWMInfo(*[empty] * len(AWMInfo._fields))


def _purified(picks: np.ndarray, rows: Sequence[Row], stacked: Stacked,
              progress: _Progress) -> list[awm_purify.Purified]:
    """What each row would have returned alone."""
    out = []
    for place, number in enumerate(picks):
        state, found, history = sweep.take(progress, place)
        row = rows[number]
        out.append(awm_purify.conclude(stacked.network(row.network), state, found, history,
                                       stacked.batches.images[row.batch]))
    return out


def _queue(count: int, size: int, kept: tuple[np.ndarray, _Progress] | None) -> Iterator[_Start]:
    """Groups of rows, those of an interrupted group first, and again together."""
    before, progress = kept if kept is not None else (np.zeros(0, int), None)
    for first in range(0, len(before), size):
        places = slice(first, first + size)
        yield _Start(before[places], sweep.take(progress, places))
    rest = np.setdiff1d(np.arange(count), before)
    for first in range(0, len(rest), size):
        yield _Start(rest[first : first + size], None)


def _save(keep: checkpoint.Path, names: list[str], chunk: int, progress: _Progress) -> None:
    """Writes where a group stands; flat, as trees of several kinds come back as one."""
    leaves = jax.tree.leaves(progress)
    checkpoint.save_tree(keep, {str(i): leaf for i, leaf in enumerate(leaves)},
                         {"rows": names, "chunk": chunk, "done": progress.done},
                         overwrite=True)


def _kept(keep: checkpoint.Path | None, rows: Sequence[Row], chunk: int | None, epochs: int,
          every: int) -> dict[str, Any] | None:
    """What is said of an interrupted group; None if there is none that can go on as told."""
    if keep is None or not checkpoint.exists(keep):
        return None
    meta = checkpoint.metadata(keep)
    known = {row.name for row in rows}
    fits = (known.issuperset(meta["rows"]) and chunk in (None, meta["chunk"])
            and 0 <= epochs - meta["done"] and (epochs - meta["done"]) % every == 0)
    return meta if fits else None


def _interrupted(keep: checkpoint.Path, meta: dict[str, Any], rows: Sequence[Row],
                 like: tuple) -> tuple[np.ndarray, _Progress] | None:
    """As `_load`; None for what cannot be gone on from."""
    try:
        return _load(keep, meta, rows, like)
    except (OSError, ValueError):
        return None


def _what_is_kept(keep: checkpoint.Path, meta: dict[str, Any], fits: bool, total: int) -> str:
    """What becomes of an interrupted group, in words."""
    return f"{len(meta['rows'])} rows " + (
        f"go on after {meta['done']} of {total} epochs" if fits else
        f"start again: what is kept of them in {keep} is damaged or another release's")


def _load(keep: checkpoint.Path, meta: dict[str, Any], rows: Sequence[Row],
          like: tuple) -> tuple[np.ndarray, _Progress]:
    """Numbers of the interrupted rows, and where they stand; OSError, ValueError for what does not
    fit.
    """
    count = len(meta["rows"])
    state, found = jax.tree.map(lambda leaf: np.zeros((count, *leaf.shape[1:]), leaf.dtype), like)
    whole = _Progress(state, found, _nothing_yet(count, meta["done"]))
    leaves, structure = jax.tree.flatten(whole)
    read = checkpoint.load_tree(keep, {str(i): leaf for i, leaf in enumerate(leaves)})
    found = [np.asarray(read[str(i)], leaf.dtype) for i, leaf in enumerate(leaves)]
    for leaf, expected in zip(found, leaves, strict=True):  # Orbax takes any shape for any other
        if leaf.shape != expected.shape:
            raise ValueError(f"Expected {expected.shape} in {keep}, found {leaf.shape}.")
    progress = jax.tree.unflatten(structure, found)
    numbers = {row.name: number for number, row in enumerate(rows)}
    return np.array([numbers[name] for name in meta["rows"]]), progress
