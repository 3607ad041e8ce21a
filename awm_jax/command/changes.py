"""What a scan found, as changes of images: what each does to the network, and how it looks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import models, warps
from awm_jax.detection import Findings
from awm_jax.types import Params

_answers = jax.jit(lambda params, images: models.apply(params, images).argmax(axis=1))


class Change(NamedTuple):
    """One change of images.

    Args:
      apply: from ``[B, H, W, C]`` in [0, 1] to the same.
      pattern: ``[H, W, C]`` what is added, in [-1, 1]; None where it depends on the image.
    """

    apply: Callable[[jax.Array], jax.Array]
    pattern: np.ndarray | None


def of(findings: Findings) -> dict[str, Change]:
    """The changes that the report tells of, the suspect's first.

    Args:
      findings: of the scan.

    Returns:
      Names to `Change`.

    Example: `of(awm_jax.detection.scan(params, batch))`.
    """
    survey, order = findings.survey, np.argsort(-np.asarray(findings.survey.damage))
    towards = {f"trigger towards class {c}": _added(survey.triggers[c]) for c in order[:3]}
    if survey.several:
        worst = f"trigger towards class {order[0]}"
        both = {worst: towards[worst], f"{worst}, on other pixels": _added(survey.elsewhere)}
        towards = both | towards
    apart = {"trigger that moves every class into another": _added(survey.dispersal)}
    away = {"trigger away from the network's own answers": _added(findings.universal)}
    bent = {"warp": Change(lambda images: warps.bend(images, jnp.asarray(survey.warp)), None)}
    if survey.bends:
        return {**bent, **towards, **apart, **away}
    first = {**apart, **towards} if findings.all_to_all else {**towards, **apart}
    return {**first, **away, **bent}


def _added(delta: Any) -> Change:
    """A trigger that is added."""
    pattern = np.asarray(delta)
    return Change(lambda images: jnp.clip(images + pattern[None], 0, 1), pattern)


def flips(images: jax.Array, every: dict[str, Change], params: Params,
          purified: Params | None) -> list[dict[str, Any]]:
    """Share of images that each change moves off the network's own answer.

    Args:
      images: ``[n, H, W, C]`` in [0, 1].
      every: from `of`.
      params: the network as it was given.
      purified: and afterwards; None if it was only scanned.

    Returns:
      A row a change: ``name``, ``before`` and ``after`` in [0, 1] (None without ``purified``).

    Example: `flips(batch.images, of(findings), params, None)`.
    """
    clean = jnp.asarray(images)
    networks = {"before": params, "after": purified}
    own = {when: None if network is None else _answers(network, clean)
           for when, network in networks.items()}
    rows: list[dict[str, Any]] = []
    for name, change in every.items():
        changed = change.apply(clean)
        rows.append({"name": name, **{
            when: None if network is None else float(
                (_answers(network, changed) != own[when]).mean())
            for when, network in networks.items()}})
    return rows


def pictures(image: jax.Array, every: dict[str, Change]) -> dict[str, np.ndarray]:
    """One of the given images, then each change, amplified, and on that image.

    Args:
      image: ``[H, W, C]`` in [0, 1].
      every: from `of`.

    Returns:
      Captions to pictures in [0, 1].

    Example: `pictures(batch.images[0], of(findings))`.
    """
    from awm_jax.report.pictures import amplified

    shown = {"one of the given images": np.asarray(image)}
    for name, change in every.items():
        changed = np.asarray(change.apply(jnp.asarray(image)[None])[0])
        own = "" if change.pattern is not None else "what it changes in the image, "
        pattern = changed - np.asarray(image) if change.pattern is None else change.pattern
        shown[f"{name} ({own}amplified, grey is none)"] = amplified(pattern)
        shown[f"the image with the {name}"] = changed
    return shown
