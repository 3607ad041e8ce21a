"""Files that are there whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A name beside ``path`` to write to, which becomes ``path`` once all went well.

    Args:
      path: the file, which may exist; folders that are missing are made.

    Yields:
      The temporary name. After an error nothing is left of it, and ``path`` is as it was.

    Raises:
      OSError: it cannot be written there.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with writing(f'{folder}/a.txt') as temporary:
      ...         _ = temporary.write_text('all of it')
      ...     pathlib.Path(folder, 'a.txt').read_text()
      'all of it'
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
