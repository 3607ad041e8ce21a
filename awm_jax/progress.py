"""A progress bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm


class Progress:
    """Shows how far a long job is, with its current figures.

    Args:
      label: what is running.
      total: steps in all.
      done: steps done before, by a run that was interrupted.
    """

    def __init__(self, label: str, total: int, done: int = 0):
        self._label, self._total, self._last = label, total, 0.0
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=label, leave=False)
        else:
            print(f"{label}: {done}/{total}", flush=True)

    def update(self, done: int, **figures: float) -> None:
        """Moves to ``done`` steps; plain lines come at most every 10 seconds and at the end."""
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.3g}" for k, v in figures.items()}, refresh=False)
            self._bar.update(done - self._bar.n)
        elif done == self._total or time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            text = " ".join(f"{k}={v:.3g}" for k, v in figures.items())
            print(f"{self._label}: {done}/{self._total} {text}", flush=True)
        if done >= self._total:
            self.close()

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def waiting(label: str, every: float = 30.0) -> Iterator[None]:
    """Says how long a job has taken that runs as one program and so tells nothing in between.

    Args:
      label: what is running.
      every: seconds between plain lines; a terminal's single line is renewed each second.
    """
    terminal, started, over = sys.stderr.isatty(), time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(1.0 if terminal else every):
            text = f"{label}: running for {time.monotonic() - started:.0f} s"
            print(f"\r{text}" if terminal else text, end="" if terminal else "\n",
                  file=sys.stderr if terminal else sys.stdout, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
