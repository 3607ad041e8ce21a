"""Rows of a command's table, each kept when it is done and not done again by a second start."""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from awm_jax import validate
from awm_jax.data import Dataset
from experiments import results

Row = dict[str, Any]


class Rows:
    """What a JSON file holds of a command, and what is added to it.

    Args:
      path: the file; one of another data set or architecture, of a release that gave rows no keys,
        or a damaged one is set aside, not overwritten.
      command: the module that writes it.
      args: its options: ``arch``, and ``fresh``, which begins anew.
      dataset: the data.

    Raises:
      OSError: it cannot be written there.

    Example: ``kept.of(f'{network}/{settings}/{seed}', measure, on_stage, seed, args)``.
    """

    def __init__(self, path: pathlib.Path, command: str, args: Any, dataset: Dataset):
        validate.writable(path)  # not after the training
        self._path = path
        self._kind = {**results.about(dataset), "arch": args.arch}
        self._command = " ".join([f"python -m {command}", *sys.argv[1:]])
        if args.fresh or self._read() is None:
            results.set_aside(path)

    def of(self, key: str, make: Callable[..., list[Row]], *given: Any) -> list[Row]:
        """The rows of a key: from an earlier start, or made now and written.

        Args:
          key: says all that decides them.
          make: gives them, one at least.
          given: what it is called with.

        Returns:
          The rows as JSON has them, with ``key`` and ``commit``. One with ``pictures``, names of
          files beside the JSON, is made again where one of them is gone.
        """
        if not self._of(key):
            new = [{"key": key, **row, "commit": results.commit()} for row in make(*given)]
            with results.locked(self._path):
                if self._read() is None:  # of another run that began meanwhile
                    results.set_aside(self._path)
                others = [row for row in self._read() or [] if row["key"] != key]
                results.write_json(self._path, {**self._kind, "versions": results.versions(),
                                                "command": self._command, "rows": others + new})
        return self._of(key)

    def _of(self, key: str) -> list[Row]:
        """The rows of a key that are written; none where pictures of them are gone."""
        found = [row for row in self._read() or [] if row["key"] == key]
        pictures = [name for row in found for name in row.get("pictures", ())]
        return found if all((self._path.parent / name).exists() for name in pictures) else []

    def _read(self) -> list[Row] | None:
        """The rows there are; None for a file of something else."""
        if not self._path.exists():
            return []
        try:
            found = json.loads(self._path.read_text())
            same = all(found[name] == value for name, value in self._kind.items())
            return [row for row in found["rows"] if row["key"]] if same else None
        except (ValueError, KeyError, TypeError):
            return None
