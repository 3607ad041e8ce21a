"""This project's own table as a page: every defence against every attack."""

from collections.abc import Callable
from typing import Any

from awm_jax.attacks import AWM_ATTACKS
from experiments import kept, results
from experiments.cells import ONE
from experiments.pages import Heading, Page
from experiments.table_cells import OWN

# Apart, so that an average is over the same attacks for every defence.
_GROUPS: dict[str, Callable[[str], bool]] = {
    "the AWM paper's six attacks": lambda attack: attack in AWM_ATTACKS,
    "other attacks": lambda attack: attack not in AWM_ATTACKS}


def make(held: kept.Kept) -> dict[str, Page]:
    """A page a table, once for each network that was run.

    Args:
      held: everything measured.

    Returns:
      The pages, by the tables' names.

    Example:
      >>> list(make(kept.Kept({}, {})))
      ['defences']
    """
    return {name: _page(name, held.cells) for name in OWN}


def count(name: str, arch: str, cells: dict[str, Any]) -> str:
    """How many places of a table there are, for the front page.

    Args:
      name: a key of `OWN`.
      arch: the network.
      cells: of `Kept`.

    Returns:
      ``'k of n'``.

    Example:
      >>> count('defences', 'small_vgg', {}).startswith('0 of ')
      True
    """
    table = OWN[name]
    every = sum(len(column.samples or table.samples) for column in table.columns)
    return f"{len(kept.places(name, arch, cells))} of {len(table.attacks) * every}"


def _page(name: str, cells: dict[str, Any]) -> Page:
    """Averages and single scores, a block a number of clean images."""
    table = OWN[name]
    page = Page(table.title, [
        f"{table.note} ACC / ASR / DER in percent, ASR without the images of the attacker's "
        "class; DER: defence effectiveness rating, 50 where nothing changed, 100 for a perfect "
        "attack gone for free; mean±standard deviation over seeds, a dash where nothing was run. "
        "† seeds of several trainings of the network. "
        "s: median seconds of a purification, compiling included. Beside the papers' figures, by "
        "their count of ASR: [AWM's Table 8](awm8.md)."])
    for arch in kept.networks(name, cells):
        places = sorted(kept.places(name, arch, cells).items(),
                        key=lambda item: _order(table, item[0]))
        for samples in table.samples:
            of = "one image a class" if samples == ONE else f"{samples} clean images"
            for which, belongs in _GROUPS.items():
                done = [{**entry, "attack": attack, "defence": heading,
                         "der": kept.measured(entry, "der")}
                        for (attack, n, heading), entries in places
                        if n == samples and belongs(attack) for entry in entries]
                if done:
                    page.blocks.extend([Heading(f"{arch}, {of}, {which}"), results.summary(done),
                                        results.matrix(done)])
    return page


def _order(table: Any, place: tuple) -> tuple[int, int]:
    """Attacks and defences as the table has them."""
    headings = [column.heading for column in table.columns]
    return table.attacks.index(place[0]), headings.index(place[2])
