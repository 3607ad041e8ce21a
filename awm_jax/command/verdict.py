"""What a scan's numbers mean, in words."""

import dataclasses

from awm_jax import detection
from awm_jax.defences.survey import BENDS_ABOVE, BENT_ABOVE, SCATTERS_ABOVE, SEVERAL_ABOVE
from awm_jax.detection import Findings

UNCLEAR = 0.5  # of the score, from which on a network is not called clean-looking
# Of two, one class always is the easier: 10 of 12 scans of clean ones had scores of 1 and more.
_FEW_CLASSES = 2
LIMITS = (
    "The scan looks for small, fixed changes of pixels, and for smooth warps of less than a pixel, "
    "that send images into one class, or each class into another. Backdoors that lay a faint wave "
    "over the whole image (SIG) looked clean to it, in the one network that we scanned.",
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
    survey = findings.survey
    first = int(survey.damage.argmax())
    level = ("suspicious" if findings.score >= 1 else
             "unclear" if findings.score >= UNCLEAR else "clean-looking")
    if len(survey.damage) <= _FEW_CLASSES and level == "suspicious":
        level = "unclear"
    headline = _headline(findings, level, first)
    reasons: tuple[str, ...] = (
        f"score {findings.score:.2f} (from 1 on suspicious, below {UNCLEAR:g} clean-looking), the "
        f"first class's lead {findings.lead:.2f} (threshold {detection.LEADS_BY:g}) and anomaly "
        f"index {float(findings.anomaly.max()):.1f} standard deviations",
        f"its trigger sends {100 * float(findings.arrivals):.0f}% of the other classes' images "
        f"into class {first}",
        f"under the trigger that leads away from the network's own answers "
        f"{100 * float(findings.flips):.0f}% of the images change class, "
        f"{100 * float(findings.concentration):.0f}% of these into one class",
        f"under a smooth warp of less than a pixel {100 * float(survey.bent.sum()):.0f}% change "
        f"class, by {float(survey.strain):.1f} nats (thresholds {100 * BENT_ABOVE:g}% and "
        f"{BENDS_ABOVE:g}, or {SCATTERS_ABOVE:g} where they scatter over classes)",
    )
    if survey.several and findings.score >= 1:
        reasons += (
            f"without the pixels of its trigger class {first} is still driven "
            f"{float(survey.again):.1f} times as far as the next (threshold {SEVERAL_ABOVE:g}): it "
            "may have several triggers, or a large one",)
    given = "1 image was" if count == 1 else f"{count} images were"
    few = (f"Only {given} given: with other ones the score may differ.",)
    return Verdict(level, headline, reasons, (few if count < 50 else ()) + LIMITS)


def _headline(findings: Findings, level: str, first: int) -> str:
    """One sentence on what stands out, if anything does."""
    survey = findings.survey
    few = findings.score >= 1 and level != "suspicious"
    into = "one class or another" if findings.all_to_all else f"class {int(survey.suspect)}"
    if survey.bends:
        what = (f"a smooth warp of less than a pixel sends {100 * float(survey.bent.sum()):.0f}% "
                f"of the images into {'the other class' if few else into}")
        what += "" if few else ", as a warping backdoor does (WaNet)"
    elif findings.all_to_all:
        what = "a small trigger " + (
            "gives most images the other class" if few else
            "moves almost every image into another class and keeps the classes apart, as an "
            "all-to-all backdoor does")
    elif findings.score >= 1:
        what = (f"a small trigger drives the network towards class {first} {findings.lead:.1f} "
                f"times as far as towards {'the other' if few else 'any other class'}")
    else:
        return (f"no class stands out: the easiest, {first}, is driven {findings.lead:.2f} "
                "times as far as the next")
    return what + (", but two classes are too few to tell a backdoor from what any network's "
                   "triggers do" if few else "")
