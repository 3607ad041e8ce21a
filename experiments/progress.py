"""A progress bar on a terminal, plain lines elsewhere."""

import sys
import time

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
