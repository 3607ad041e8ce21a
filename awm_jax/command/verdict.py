"""What a scan's numbers mean, in words."""

import dataclasses

from awm_jax import detection
from awm_jax.detection import Findings

UNCLEAR = 0.5  # of the score, from which on a network is not called clean-looking
# Of two, one class always is the easier: 10 of 12 scans of clean ones had scores of 1 and more.
_FEW_CLASSES = 2
LIMITS = (
    "The scan looks for small, fixed changes of pixels that send images into one class, or each "
    "class into another. Backdoors that bend the whole image (WaNet) or lay a faint wave over "
    "it (SIG) looked clean to it, in the one network of each that we scanned.",
    "A network can have a weakness of this kind without anybody having planted it: of ten that we "
    "trained on clean handwritten digits, two were called suspicious. And one that looks clean may "
    "have a backdoor of another kind.",
    "Whether triggers found here are the attacker's cannot be told without the attacker's.",
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A verdict.

    Args:
      level: 'suspicious', 'unclear' or 'clean-looking'.
      headline: one sentence.
      reasons: what speaks for it, in numbers.
      limits: what the scan cannot see.
    """

    level: str
    headline: str
    reasons: tuple[str, ...]
    limits: tuple[str, ...]


def of(findings: Findings, count: int) -> Verdict:
    """The verdict on a scan.

    Args:
      findings: of the scan.
      count: how many clean images it had.

    Returns:
      `Verdict`: suspicious from a score of 1 on, unclear from .5 on; docs/suspect.md has how
      often either was right. A network of two classes is unclear at most.

    Example: `of(awm_jax.detection.scan(params, batch), len(batch.labels)).level`.
    """
    found = findings.survey
    first = int(found.damage.argmax())
    level = ("suspicious" if findings.score >= 1 else
             "unclear" if findings.score >= UNCLEAR else "clean-looking")
    few_classes = len(found.damage) <= _FEW_CLASSES and level == "suspicious"
    if few_classes:
        level = "unclear"
        what = ("gives most images the other class" if findings.all_to_all else
                f"drives the network towards class {first} {findings.lead:.1f} times as far as "
                "towards the other")
        headline = (f"a small trigger {what}, but two classes are too few to tell a backdoor from "
                    "what any network's triggers do")
    elif findings.all_to_all:
        headline = ("a small trigger moves almost every image into another class and keeps the "
                    "classes apart, as an all-to-all backdoor does")
    elif level == "suspicious":
        headline = (f"a small trigger drives the network towards class {first} {findings.lead:.1f} "
                    "times as far as towards any other class")
    else:
        headline = (f"no class stands out: the easiest, {first}, is driven {findings.lead:.2f} "
                    "times as far as the next")
    reasons = (
        f"score {findings.score:.2f} (from 1 on suspicious, below {UNCLEAR:g} clean-looking), the "
        f"first class's lead {findings.lead:.2f} (threshold {detection.LEADS_BY:g}) and anomaly "
        f"index {float(findings.anomaly.max()):.1f} standard deviations",
        f"its trigger sends {100 * float(findings.arrivals):.0f}% of the other classes' images "
        f"into class {first}",
        f"under the trigger that leads away from the network's own answers "
        f"{100 * float(findings.flips):.0f}% of the images change class, "
        f"{100 * float(findings.concentration):.0f}% of these into one class",
    )
    few = (f"Only {count} images were given: with other ones the score may differ.",)
    return Verdict(level, headline, reasons, (few if count < 50 else ()) + LIMITS)
