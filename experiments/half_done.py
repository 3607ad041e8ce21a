"""What interrupted sweeps left in a run directory: a state for each, taken by one run at a time."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

from awm_jax import checkpoint


@contextlib.contextmanager
def claimed(folder: pathlib.Path, rows: Sequence[str]) -> Iterator[pathlib.Path]:
    """Where a run keeps its state, which no other run goes on from, writes or removes meanwhile.

    It is the place of an interrupted run whose rows are all among these, or else a new one. Within
    it may be overwritten; afterwards all that is there of these rows is removed, but not if what
    is done within fails or is interrupted. Where the system has no locks (Windows, some
    clusters' file systems), two runs at once may take the same.

    Args:
      folder: of all states.
      rows: names that say all that decides a row, its settings among it.

    Yields:
      The place, for `awm_jax.checkpoint`; nothing is there, or a state of some of these rows.

    Example: `with claimed(folder / 'sweep', names) as keep: ...`.
    """
    with contextlib.ExitStack() as held:
        mine = [place for place in _states(folder, rows)
                if held.enter_context(_alone(place)) and _is_of(place, rows)]
        mine.sort(key=lambda place: -checkpoint.metadata(place).get("done", 0))
        if not mine:
            name = hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16]
            places = (folder / f"{name}{f'_{i}' if i else ''}" for i in itertools.count())
            mine = [next(place for place in places
                         if held.enter_context(_alone(place)) and not place.exists())]
        yield mine[0]
        for place in mine:
            checkpoint.remove(place)
            for unfinished in folder.glob(f".{place.name}-*"):  # of a run that was killed writing
                shutil.rmtree(unfinished, ignore_errors=True)


def clear(folder: pathlib.Path) -> None:
    """Removes all states but those of runs that are going on.

    Args:
      folder: of all states; it need not be there.

    Example: `clear(pathlib.Path('runs/mine/sweep'))`.
    """
    for place in _states(folder):
        with _alone(place) as free:
            if free:
                checkpoint.remove(place)


def _states(folder: pathlib.Path, rows: Sequence[str] | None = None) -> list[pathlib.Path]:
    """Where there are states, of these rows only if some are named."""
    found = (place for place in folder.glob("*") if not place.name.startswith("."))
    return sorted(place for place in found
                  if (checkpoint.exists(place) if rows is None else _is_of(place, rows)))


def _is_of(place: pathlib.Path, rows: Sequence[str]) -> bool:
    """Whether a state is there, of these rows alone."""
    try:
        return set(checkpoint.metadata(place)["rows"]) <= set(rows)
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return False  # removed meanwhile, or nothing of ours


@contextlib.contextmanager
def _alone(place: pathlib.Path) -> Iterator[bool]:
    """Whether no other living run has this place; if so, none gets it while within."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place.with_name(f".{place.name}.lock")
    with contextlib.ExitStack() as opened:
        while True:
            file = opened.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:  # a file system without locks, as some of clusters are
                yield True
                return
            # Who had the lock may have removed the file since it was opened: then it locks nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
