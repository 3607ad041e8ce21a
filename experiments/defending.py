"""One defence against one network from one draw of clean images: a cell of the tables."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import time
import typing
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import checkpoint, metrics, warps
from awm_jax import masks as masking
from awm_jax.attacks import Trigger
from awm_jax.data import Dataset
from awm_jax.defences import DEFENCES, AWMConfig, Purified, awm_repair, purify
from awm_jax.defences.awm_config import VARIANTS
from awm_jax.defences.awm_purify import network
from awm_jax.defences.awm_steps import AWMState
from awm_jax.defences.base import by_path
from awm_jax.defences.survey import THRESHOLDS, Survey
from awm_jax.progress import Progress, waiting
from awm_jax.report import figures, pictures
from awm_jax.types import Batch
from experiments import presets, results
from experiments.scene import Scene, network_digest

_HISTORY_IMAGES = 500  # images that Figure 4's curves are drawn from; the table uses them all
_INFO_SIZE = 200  # what a defence tells beyond so many numbers stays out of results.json


def config(name: str, args, dataset: Dataset) -> Any:
    """A defence's settings on this data set: its own, then the data set's, then the command's.

    Raises:
      ValueError: a value of ``--set`` that the defence refuses.
    """
    default = DEFENCES[name].default
    fields = {field.name for field in dataclasses.fields(default)}
    asked = {field: _value(name, field, text) for field, text in args.set or () if field in fields}
    chosen: dict[str, Any] = {}
    if "flip" in fields:
        chosen["flip"] = dataset.flip
    variant = asked.get("variant", getattr(default, "variant", None))
    if isinstance(default, AWMConfig) and variant != "distilled":
        chosen["copies"] = (presets.of(dataset).paper_copies if args.samples == "one-shot"
                            else 0)
    if isinstance(default, AWMConfig) and variant == "distilled":
        chosen["recalibration"] = presets.of(dataset).recalibration
    if args.purify_epochs is not None and "epochs" in fields:
        chosen["epochs"] = args.purify_epochs
    chosen |= asked
    if name == "ft_sam" and "rho" not in chosen and chosen.get("adaptive", default.adaptive):
        chosen["rho"] = 6.0 if args.arch == "vgg19_bn" else presets.of(dataset).ft_sam_rho
    try:
        return DEFENCES[name].Config(**chosen)
    except TypeError as error:
        raise ValueError(f"{name} refuses {chosen}: {error}") from error


def check_set(names: Iterable[str], asked: Iterable[tuple[str, Any]]) -> None:
    """That what ``--set`` and ``--grid`` name are settings.

    Args:
      names: the chosen defences.
      asked: setting and value.

    Raises:
      ValueError: one that none of them has.

    Example: ``check_set(('anp', 'ft'), [('threshold', '.3')])``.
    """
    known = {field for name in names for field in vars(DEFENCES[name].default)}
    for field, _ in asked:
        if field not in known:
            raise ValueError(f"Expected {field} of --set or --grid to be a setting of a chosen "
                             f"defence; they are: {', '.join(sorted(known))}.")


def _value(name: str, field: str, text: str) -> Any:
    """A value of ``--set`` as the defence's field takes it; ValueError for another kind."""
    hint = typing.get_type_hints(type(DEFENCES[name].default))[field]
    kinds = typing.get_args(hint) or (hint,)
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if bool in kinds and value is not None:
        raise ValueError(f"Expected --set {field}={text} of {name} to be true or false.")
    if int in kinds and float not in kinds and isinstance(value, float | bool):
        raise ValueError(f"Expected --set {field}={text} of {name} to be a whole number.")
    return value


def fingerprint(name: str, args, dataset: Dataset) -> str:
    """A name for a defence's settings: a release that changes them starts its cells afresh.

    Of AWM what its variant fixes is part of them, and what its survey goes by, if it has one.
    """
    chosen = config(name, args, dataset)
    told, fixed = repr(chosen), ""
    if isinstance(chosen, AWMConfig):
        if chosen.repair:
            fixed = str(awm_repair.CONSTANTS)
        else:  # as before there was such an option
            told = told.replace(", repair=0", "")
        constants = VARIANTS[chosen.variant]
        fixed += str(sorted(constants.items()))
        if constants["survey_steps"]:
            fixed += str(THRESHOLDS)
    return hashlib.sha256(f"{told}{fixed}".encode()).hexdigest()[:8]


def label(name: str, args) -> str:
    """What a defence is called in results: its name, and the values of ``--grid``, if any."""
    return f"{name}-{args.variant}" if args.variant else name


def defend(scene: Scene, name: str, seed: int, args, folder: pathlib.Path) -> dict:
    """Purifies, measures, and leaves pictures and the purified network in ``folder``.

    Args:
      scene: the network.
      name: a key of `DEFENCES`.
      seed: decides the clean images and the defence's key.
      args: as `experiments.cli.parser` gives them.
      folder: the run directory.

    Returns:
      What results.json keeps of it.
    """
    chosen = config(name, args, scene.dataset)
    given, title = data_of(scene, name, seed, args), label(name, args)
    run = functools.partial(_awm if isinstance(chosen, AWMConfig) else _any, scene, name)
    return keep(scene, name, seed, args, folder, *run(title, chosen, given, seed))


def _made_of(scene: Scene, name: str, args) -> str:
    """What decides a purified network beside its seed: network, trigger, images, settings."""
    network = network_digest(args) if scene.spec is None else scene.spec.digest
    return f"{network}-{args.samples}-{fingerprint(name, args, scene.dataset)}"


def _place(folder: pathlib.Path, stem: str, seed: int, made_of: str) -> pathlib.Path:
    """Where a purified network is kept: beside one of the same name that other settings made."""
    place = folder / "purified" / f"{stem}-{seed}"
    if checkpoint.exists(place) and checkpoint.load(place)[1].get("made_of") != made_of:
        return folder / "purified" / f"{stem}-{made_of}-{seed}"
    return place


def keep(scene: Scene, name: str, seed: int, args, folder: pathlib.Path, found: Any,
         seconds: float, curve: dict | None) -> dict:
    """Measures a purification, and leaves pictures and the network, as `defend` does.

    Args:
      scene, name, seed, args, folder: as `defend`.
      found: `Purified` of AWM, `Result` of another defence.
      seconds: how long it took.
      curve: of AWM, as `watch` fills it.

    Returns:
      What results.json keeps of it.
    """
    chosen = config(name, args, scene.dataset)
    _, indices = scene.clean(seed, args.samples)
    title = label(name, args)
    if isinstance(found, Purified):
        settings = chosen.resolve(len(indices), scene.params.arch.image_shape)
        told = {"settings": dataclasses.asdict(settings), "history": found.history,
                "curve": curve, "masks": _percentages(found), **_surveyed(found.survey)}
        if seed == 0:
            _pictures(scene, found, curve or no_curve(), title, folder)
    else:
        told = {"settings": dataclasses.asdict(chosen),
                "info": {key: leaf for key, leaf in by_path(found.info).items()
                         if np.size(leaf) <= _INFO_SIZE}}
    made_of = _made_of(scene, name, args)
    place = _place(folder, f"{scene.name.replace(':', '-')}-{title}", seed, made_of)
    checkpoint.save(place, found.params, {"status": found.status.name, "made_of": made_of},
                    overwrite=True)
    after = scene.evaluate(found.params)
    return {
        "attack": scene.name, "defence": title, "seed": seed, "samples": args.samples,
        "before": scene.before._asdict(), "after": after._asdict(),
        "der": metrics.defence_effectiveness(scene.before, after),
        "target": scene.attack.target, "clean_indices": indices, "status": found.status.name,
        "purified": place.relative_to(folder).as_posix(),
        "seconds": seconds, "commit": results.commit(),
        "fingerprint": fingerprint(name, args, scene.dataset),
        "convolutions": results.convolutions(), **told,
    }


def data_of(scene: Scene, name: str, seed: int, args) -> Batch:
    """What a defence is given besides the network: clean images, or the training set."""
    if DEFENCES[name].needs == "training":
        return scene.training_set
    return scene.clean(seed, args.samples)[0]


def _any(scene: Scene, name: str, title: str, chosen, given: Batch,
         seed: int) -> tuple[Any, float, None]:
    """A defence as the registry has it."""
    started = time.perf_counter()
    with waiting(f"{scene.name}, {title}, seed {seed}"):
        found = jax.block_until_ready(DEFENCES[name](
            scene.params, given, key=jax.random.key(seed), config=chosen))
    return found, time.perf_counter() - started, None


def no_curve() -> dict[str, list[float]]:
    """Figure 4's curve before its first point."""
    return {"epoch": [], "clean_accuracy": [], "asr": [], "asr_all": []}


def watch(scene: Scene, state: AWMState, done: int, curve: dict[str, list[float]]) -> None:
    """Adds a point to Figure 4's curve."""
    now = scene.evaluate(network(scene.params, state), _HISTORY_IMAGES)
    curve["epoch"].append(done)
    curve["clean_accuracy"].append(now.acc)
    curve["asr"].append(now.asr)
    curve["asr_all"].append(now.asr_all)


def _awm(scene: Scene, name: str, title: str, chosen: AWMConfig, batch: Batch,
         seed: int) -> tuple[Purified, float, dict]:
    """AWM with its progress and, from the first seed, its curve."""
    del name
    settings = chosen.resolve(len(batch.images), scene.params.arch.image_shape)
    progress = Progress(f"purifying {scene.name}, {title}, seed {seed}", settings.epochs)
    curve, watching = no_curve(), 0.0

    def on_epochs(done, total, state, latest):
        nonlocal watching
        started = time.perf_counter()
        if seed == 0:  # Figure 4, from the first seed; it only watches
            watch(scene, state, done, curve)
        watching += time.perf_counter() - started
        progress.update(done, clean=latest["clean_loss"], triggered=latest["trigger_loss"],
                        mask=latest["mask_mean"])
        if done == total and chosen.repair:
            after.enter_context(waiting(f"repairing {scene.name}"))

    started = time.perf_counter()
    with contextlib.ExitStack() as after:
        found = purify(scene.params, batch, config=chosen, key=jax.random.key(seed),
                       on_epochs=on_epochs)
    seconds = time.perf_counter() - started - watching
    progress.close()
    return found, seconds, curve


def _surveyed(survey: Survey | None) -> dict:
    """What the survey says, without its triggers."""
    if survey is None:
        return dict.fromkeys(("damage", "stay", "kept", "bent", "strain", "again", "suspect"))
    return {"damage": survey.damage, "stay": survey.stay, "kept": survey.kept,
            "bent": survey.bent.sum(), "strain": survey.strain,
            "again": survey.again, "suspect": int(survey.suspect)}


def _percentages(found: Purified) -> dict[str, list[float]]:
    """Figure 5 in numbers: the share of each layer's masks in ten intervals, in percent."""
    return {name: np.round(figures.mask_percentages(np.asarray(values)), 2).tolist()
            for name, values in masking.by_layer(found.masks).items()}


def _pictures(scene: Scene, found: Purified, curve: dict, name: str,
              folder: pathlib.Path) -> None:
    """The AWM paper's Figures 4 and 5, and the recovered trigger beside the true one."""
    stem = f"{scene.name.replace(':', '-')}-{name}"
    epochs = np.arange(1, len(found.history["clean_loss"]) + 1)
    figures.history(folder / f"{stem}-history.png", curve, f"{scene.name}, {name}")
    figures.history(folder / f"{stem}-losses.png", {
        "epoch": epochs, "clean_loss": found.history["clean_loss"],
        "trigger_loss": found.history["trigger_loss"]}, f"{scene.name}, {name}")
    layers = {k: np.asarray(v) for k, v in masking.by_layer(found.masks).items()}
    figures.mask_histogram(folder / f"{stem}-masks.png", layers)
    true, recovered = scene.attack.trigger, found.trigger
    pattern = np.asarray(true.pattern) if isinstance(true, Trigger) else None
    if found.warp is not None:  # it has no pattern: what it changes in an image is shown
        image = scene.dataset.test_images[scene.split.eval_indices[:1]].astype(np.float32) / 255.0
        recovered = np.asarray(warps.bend(jnp.asarray(image), jnp.asarray(found.warp)) - image)[0]
        pattern = np.asarray(scene.attack.apply(image) - image)[0] if pattern is None else pattern
    pictures.recovered_trigger(folder / f"{stem}-trigger.png", recovered, pattern)


def show_attack(scene: Scene, folder: pathlib.Path) -> None:
    """Clean and triggered images, and what the trigger changes."""
    images = scene.dataset.test_images[scene.split.eval_indices[:4]].astype(np.float32) / 255.0
    stem = scene.name.replace(":", "-")
    pictures.pairs(folder / f"{stem}-pairs.png", images, np.asarray(scene.attack.apply(images)))
