"""What the options of every command share: checks, and errors in one line."""

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

from awm_jax import programs
from awm_jax.defences import DEFENCES


def positive(text: str) -> int:
    """A whole number > 0."""
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number > 0, got {text!r}")


def seed(text: str) -> int:
    """A whole number that a PRNG key is made of: 0 to 2**32 - 1."""
    if text.isdecimal() and len(text) < 11 and int(text) < 1 << 32:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {(1 << 32) - 1}, got "
                                     f"{text[:40]!r}")


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if 0 <= found <= 1:
        return found
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text[:40]!r}")


def image_size(text: str) -> tuple[int, int]:
    """'N' or 'HxW' as ``(height, width)``."""
    found = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    if found and int(found[1]) and int(found[2] or found[1]):
        return int(found[1]), int(found[2] or found[1])
    raise argparse.ArgumentTypeError(f"expected a number of pixels or HEIGHTxWIDTH, got {text!r}")


class OneLine(argparse.ArgumentParser):
    """Errors in one line, without the whole usage before them."""

    def error(self, message):
        """Prints the message and ends with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def able() -> list[str]:
    """Defences that a few clean images are enough for, or none.

    Example:
      >>> 'awm' in able(), 'abl' in able()
      (True, False)
    """
    return [n for n, d in DEFENCES.items() if d.needs != "training" and not d.ablation]


GOES_ON = "Stopped. The same command goes on from here."
FROM_THE_START = "Stopped. The same command starts from the beginning."


def run(prog: str, job: Callable[[], Any], *, stopped: str = GOES_ON) -> int:
    """Does the job; errors of the user's making end in one line and status 2.

    What is compiled is tuned, and kept on disk for the next command: `awm_jax.programs`.

    Args:
      prog: the command's name, which errors begin with.
      job: what to do.
      stopped: what is said on an interrupt.

    Returns:
      The exit status: 0, 2 for an error, 130 for an interrupt.
    """
    try:
        programs.tune()
        programs.keep()
        job()
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    return 0
