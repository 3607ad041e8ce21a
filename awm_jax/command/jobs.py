"""The two jobs: scan a network, and purify it; both end in a report."""

import argparse
import contextlib
import dataclasses
import datetime
import pathlib
import platform
import time
from importlib import metadata
from typing import Any

import jax
import numpy as np

from awm_jax import detection, formats, masks, metrics, programs, validate
from awm_jax.command import changes, remembered, verdict
from awm_jax.command import suspect as reading
from awm_jax.command.options import able
from awm_jax.command.suspect import Suspect, say
from awm_jax.defences import DEFENCES, AWMConfig, Status, awm_purify
from awm_jax.defences.survey import Survey
from awm_jax.detection import Findings
from awm_jax.progress import Progress, waiting
from awm_jax.report import figures, page
from awm_jax.types import Batch, Params

_ENOUGH = 10  # images of every class, from which some are held out to choose by
_REPAIR = 10  # epochs; twice as many bring more back, of accuracy and of the backdoor
_MILDER = (0.95, 0.98)  # alphas to try after the first, where they are above it
_FALL = 0.02  # of held-out accuracy that a purification may cost before a milder one is tried
_STOP = 0.1  # share of the given images, and one image, that a run may lose before it ends


@dataclasses.dataclass(frozen=True)
class Purification:
    """What a purification came to.

    Args:
      params: the purified network.
      status: how it ended.
      layers: percentages of mask values in ten intervals, layer by layer; empty without masks.
      seconds: how long it took.
      notes: what was chosen and why, a line each.
    """

    params: Params
    status: Status
    layers: dict[str, list[float]]
    seconds: float
    notes: tuple[str, ...] = ()


def scan(args: argparse.Namespace) -> None:
    """``awm-jax scan``: prints a verdict and writes a report.

    Args:
      args: of the parser in `awm_jax.command`.

    Raises:
      OSError: files that cannot be read or written.
      ValueError: options, a network or images that cannot be taken; nothing was written then.
    """
    started = time.monotonic()
    path = _report_path(args.report, args.model, "scan")
    suspect = reading.read(args)
    findings = _look(suspect, args)
    report = _report(args, suspect, findings)
    _finish(path, report, suspect, findings, None, args.said, started)


def purify(args: argparse.Namespace) -> Status:
    """``awm-jax purify``: writes the purified network and a report.

    Args:
      args: of the parser in `awm_jax.command`.

    Returns:
      How it ended.

    Raises:
      OSError: files that cannot be read or written.
      ValueError: options, a network or images that cannot be taken, or a defence that ends in no
        network; nothing was written then.
    """
    started = time.monotonic()
    _check_defence(args.defence)
    config = _config(args)
    formats.check_target(args.out, args.model)
    path = _report_path(args.report, args.out, "report")
    suspect = reading.read(args)
    _check_enough(suspect, args.force)
    DEFENCES[args.defence].fits(suspect.params.arch)
    findings = _look(suspect, args)
    done = (_awm(suspect, findings, args) if args.defence == "awm" else
            _other(suspect, config, args))
    for note in done.notes:
        say(f"  {note}")
    if done.status is Status.NONFINITE and args.defence != "awm":  # AWM's is from before that
        raise ValueError(f"Expected {args.defence} to end in finite weights, they became NaN or "
                         "infinite. Nothing was written. Choose another --defence, or give more "
                         "images.")
    formats.write(args.out, done.params, suspect.source)
    say(f"{args.defence}: {done.status.name}, {done.status.advice}. The purified network is in "
        f"{args.out}.")
    report = _report(args, suspect, findings)
    defence = DEFENCES[args.defence]
    report["defence"] = {"name": defence.name, "paper": defence.paper, "status": done.status.name,
                         "advice": "; ".join((done.status.advice, *done.notes)),
                         "seconds": done.seconds, "out": str(args.out)}
    if done.layers:
        report["layers"] = done.layers
    _finish(path, report, suspect, findings, done.params, args.said, started)
    return done.status


def _check_defence(name: str) -> None:
    """ValueError for a defence that needs more than a few clean images."""
    if name not in (names := able()):
        raise ValueError(f"Expected --defence {name!r} to be one of: {', '.join(names)}.")


def _config(args: argparse.Namespace) -> Any:
    """The defence's settings; ValueError for options that it does not have."""
    defence = DEFENCES[args.defence]
    config = defence.default
    if args.epochs is not None:
        if not hasattr(config, "epochs"):
            raise ValueError(f"Expected no --epochs beside --defence {defence.name}, which counts "
                             "none.")
        config = dataclasses.replace(config, epochs=args.epochs)
    if args.alpha is not None:
        if not isinstance(config, AWMConfig):  # another defence's alpha may be something else
            raise ValueError(f"Expected no --alpha={args.alpha} beside --defence {defence.name}: "
                             "it is AWM's. Leave it out, or choose --defence awm.")
        config = dataclasses.replace(config, alpha=args.alpha)
    if args.flip and hasattr(config, "flip"):
        config = dataclasses.replace(config, flip=True)
    if args.repair and args.defence != "awm":
        raise ValueError(f"Expected no --repair beside --defence {defence.name}: it is AWM's. "
                         "Leave it out, or choose --defence awm.")
    return config


def _report_path(given: pathlib.Path | None, beside: pathlib.Path, what: str) -> pathlib.Path:
    """Where the page goes; an error where it or its JSON would overwrite what is no report.

    A scan's and a purification's are called differently: of a purified file there are both.
    """
    path = given or beside.with_name(f"{beside.stem}-{what}.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"Expected --report={path} to end in .html.")
    if path.is_dir():
        raise ValueError(f"Expected --report={path} to be a file, it is a folder.")
    there = [p for p in (path, path.with_suffix(".json")) if p.exists()]
    if there and not page.is_report(path.with_suffix(".json")):
        raise ValueError(f"Expected {there[0]} to be free or an earlier report, it is something "
                         "else. Name another place with --report.")
    validate.writable(path)
    return path


def _check_enough(suspect: Suspect, force: bool) -> None:
    """ValueError for fewer than one image of each class."""
    classes = suspect.params.arch.num_classes
    missing = sorted(set(range(classes)) - set(np.asarray(suspect.batch.labels).tolist()))
    if missing and not force:
        some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise ValueError(
            f"Expected an image of each of the {classes} classes, none was given of {some}. The "
            "purified network may forget these classes. Give some, or go on with --force.")


def _look(suspect: Suspect, args: argparse.Namespace) -> Findings:
    """The scan, its verdict printed."""
    config = AWMConfig(flip=args.flip)
    kept = remembered.place(suspect.params, suspect.batch, args.seed, config)
    found = remembered.read(kept)
    if found is None:
        with waiting("looking for triggers"):
            found = detection.scan(suspect.params, suspect.batch, key=jax.random.key(args.seed),
                                   config=config)
        remembered.write(kept, found)
    else:
        say(f"  scanned before with these images and this seed: taken from {kept}")
    told = verdict.of(found, len(suspect.batch.labels))
    say(f"{told.level}: {told.headline}")
    for reason in told.reasons:
        say(f"  {reason}")
    return found


def _held_out(suspect: Suspect, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to purify with and to choose by: half of each class where there are enough."""
    labels = np.asarray(suspect.batch.labels)
    counts = np.bincount(labels, minlength=suspect.params.arch.num_classes)
    everything = np.arange(len(labels))
    if counts.min() < _ENOUGH:
        return everything, everything[:0]
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty(len(labels), int)
    for label in range(len(counts)):
        own = order[labels[order] == label]
        rank[own] = np.arange(len(own))
    kept = rank < counts[labels] // 2
    return everything[kept], everything[~kept]


def _accuracy(params: Params, batch: Batch, chosen: np.ndarray) -> float:
    """Share of some images that get their class."""
    found = metrics.predict(params, batch.images[chosen])
    return float((found == np.asarray(batch.labels)[chosen]).mean())


def _awm(suspect: Suspect, findings: Findings, args: argparse.Namespace) -> Purification:
    """AWM: as mild as held-out images ask for, and stopped where the given ones are lost.

    ValueError where not even the mildest run keeps them: there is no purified network then.
    """
    started, key = time.monotonic(), jax.random.key(args.seed)
    mine, held_out = _held_out(suspect, args.seed)
    batch = Batch(suspect.batch.images[mine], np.asarray(suspect.batch.labels)[mine])
    # Held-out images must be new to what they judge, and the scan has seen all of them.
    survey = None if len(held_out) else findings.survey
    notes: list[str] = []
    found = None
    before = _accuracy(suspect.params, suspect.batch, held_out) if len(held_out) else None
    first = AWMConfig(alpha=args.alpha).resolve(len(mine), suspect.params.arch.image_shape).alpha
    alphas = (args.alpha, *[alpha for alpha in _MILDER if alpha > first])
    for alpha in alphas:
        config = AWMConfig(epochs=args.epochs, flip=args.flip, alpha=alpha,
                           repair=_REPAIR if args.repair else 0)
        ran = _run_awm(suspect, batch, survey, config, key, notes)
        survey = ran.survey if survey is None else survey
        if ran.status is Status.STOPPED:
            continue
        found = ran
        if before is None:
            break
        after = _accuracy(found.params, suspect.batch, held_out)
        notes.append(f"alpha {_told(alpha)}: {100 * before:.1f}% -> {100 * after:.1f}% of "
                     f"{len(held_out)} held-out images")
        if after >= before - _FALL:
            break
    else:
        if found is None:
            raise ValueError(
                f"Expected to erase something and keep the given images' classes, alphas up to "
                f"{alphas[-1]} lost them in the first epochs ({'; '.join(notes)}). Nothing was "
                "written. Give more images of each class, or another --defence.")
        notes.append(f"no alpha kept held-out accuracy within {100 * _FALL:.0f} points: the "
                     "mildest one's network is given")
    if args.repair:
        notes.append("repaired: the network learnt its former answers again, the kernels least"
                     if found.survey is not None and bool(found.survey.small) else
                     "not repaired: no single small trigger is suspected, and others may return")
    layers = {name: figures.mask_percentages(np.ravel(values)).tolist()
              for name, values in masks.by_layer(found.masks).items()}
    return Purification(found.params, found.status, layers, time.monotonic() - started,
                        tuple(notes))


def _told(alpha: float | None) -> str:
    """The alpha of a run, for its notes."""
    return "as usual" if alpha is None else str(alpha)


def _run_awm(suspect: Suspect, batch: Batch, survey: Survey | None, config: AWMConfig,
             key: jax.Array, notes: list[str]) -> awm_purify.Purified:
    """One run with a bar; it ends where over a tenth of its images, and over one, were lost."""
    count = len(batch.labels)
    everything = np.arange(count)
    before = _accuracy(suspect.params, batch, everything)
    bar: list[Progress] = []

    def watch(done, total, state, latest):
        if not bar:
            bar.append(Progress("purifying", total))
        now = _accuracy(awm_purify.network(suspect.params, state), batch, everything)
        bar[0].update(done, accuracy=now, **{k: latest[k] for k in ("clean_loss", "trigger_loss")})
        if round((before - now) * count) > max(1, _STOP * count):
            notes.append(f"alpha {_told(config.alpha)} stopped in epoch {done} of {total}: "
                         f"{100 * now:.0f}% of the given images got their class, before "
                         f"{100 * before:.0f}%; the masks are those of before")
            return True
        if done == total and config.repair:
            after.enter_context(waiting("repairing"))
        return False

    with contextlib.ExitStack() as after:
        found = awm_purify.purify(suspect.params, batch, config=config, key=key, on_epochs=watch,
                                  survey=survey)
    if bar:
        bar[0].close()
    return found


def _other(suspect: Suspect, config: Any, args: argparse.Namespace) -> Purification:
    """Any other defence, with its own settings."""
    defence, started = DEFENCES[args.defence], time.monotonic()
    with waiting(defence.name):
        found = defence(suspect.params, suspect.batch, key=jax.random.key(args.seed), config=config)
    return Purification(found.params, found.status, {}, time.monotonic() - started)


def _interval(correct: int, count: int) -> dict[str, float]:
    """A count with Wilson's 95% interval."""
    from scipy import stats

    low, high = stats.binomtest(correct, count).proportion_ci(0.95, method="wilson")
    return {"correct": correct, "count": count, "low": float(low), "high": float(high)}


def _report(args: argparse.Namespace, suspect: Suspect, findings: Findings) -> dict[str, Any]:
    """What the page shows of a scan."""
    arch, survey = suspect.params.arch, findings.survey
    told = verdict.of(findings, len(suspect.batch.labels))
    labels = np.asarray(suspect.batch.labels)
    return {
        "verdict": dataclasses.asdict(told),
        "network": {"file": str(args.model), "format": suspect.source.kind, "arch": arch.name,
                    "classes": arch.num_classes, "image_shape": list(arch.image_shape),
                    "notes": list(suspect.notes)},
        "images": {"count": len(labels), "classes": len(set(labels.tolist())),
                   "note": suspect.images_note},
        "classes": [str(i) for i in range(arch.num_classes)],
        "scan": {"damage": survey.damage.tolist(), "anomaly": findings.anomaly.tolist(),
                 "suspect": (int(survey.suspect) if told.level == "suspicious"
                             and not findings.all_to_all else None),
                 "all_to_all": findings.all_to_all, "stay": float(survey.stay),
                 "kept": float(survey.kept), "concentration": float(findings.concentration),
                 "bends": bool(survey.bends), "bent": float(survey.bent.sum()),
                 "strain": float(survey.strain),
                 "again": float(survey.again), "several": bool(survey.several),
                 "universal_flips": float(findings.flips), "score": findings.score},
    }


def _finish(path: pathlib.Path, report: dict[str, Any], suspect: Suspect, findings: Findings,
            purified: Params | None, command: str, started: float) -> None:
    """Accuracy and flips before and after, then the report is written."""
    every, count = changes.of(findings), len(suspect.batch.labels)
    report["clean"] = {"before": _interval(suspect.correct(), count)}
    if purified is not None:
        report["clean"]["after"] = _interval(suspect.correct(purified), count)
    report["flips"] = changes.flips(suspect.batch.images, every, suspect.params, purified)
    for row in report["flips"]:
        after = "" if row["after"] is None else f" -> {100 * row['after']:.0f}%"
        say(f"  {row['name']}: moves {100 * row['before']:.0f}%{after} of the given images")
    report["reproduce"] = {
        "command": command, "versions": _versions(),
        "seconds": time.monotonic() - started,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}
    page.write(path, report, changes.pictures(suspect.batch.images[0], every))
    say(f"The report is in {path} ({report['reproduce']['seconds']:.0f} s).")


def _versions() -> dict[str, str]:
    """What made the report."""
    names = ("awm-jax", "jax", "jaxlib", "flax", "numpy")
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in names},
            "convolutions": programs.convolutions()}
