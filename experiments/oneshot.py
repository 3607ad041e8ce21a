"""Erase a backdoor from one clean image of each class, and measure it.

    python -m experiments.oneshot --dataset=gtsrb --data_dir DIR --attack all --seeds 5

Every finished purification is kept in the run directory's results.json and not done again by a
second start; networks are cached and their training resumes.
"""

import dataclasses
import functools
import hashlib
import pathlib
import sys
import time

import jax
import numpy as np

from awm_jax import attacks, checkpoint, data, metrics
from awm_jax import masks as masking
from awm_jax.attacks import Attack
from awm_jax.data import Dataset, splits
from awm_jax.defences import awm
from awm_jax.defences.awm_config import VARIANTS
from awm_jax.defences.survey import Survey
from awm_jax.report import figures, pictures
from awm_jax.types import Arch, Batch, Params
from experiments import networks, results
from experiments.cli import parser
from experiments.presets import PRESETS
from experiments.progress import Progress

_HISTORY_IMAGES = 500  # images that Figure 4's curves are drawn from; the table uses them all


@dataclasses.dataclass(frozen=True)
class Scene:
    """One backdoored network and the images around it."""

    name: str
    params: Params
    attack: Attack
    dataset: Dataset
    split: splits.Split

    @functools.cached_property
    def before(self) -> metrics.Scores:
        """Scores of the suspect network, the same for every seed."""
        return self.evaluate(self.params)

    def evaluate(self, params: Params, limit: int | None = None) -> metrics.Scores:
        """Scores on the images that no defender ever draws."""
        chosen = self.split.eval_indices[:limit]
        return metrics.evaluate(
            params, self.dataset.test_images[chosen], self.dataset.test_labels[chosen],
            trigger=self.attack.apply, relabel=self.attack.relabel)


def _checkpoint_params(path: pathlib.Path, args, dataset: Dataset) -> Params:
    """A network of somebody else: Orbax directory or PyTorch file."""
    if path.is_dir():
        params = checkpoint.load(path)[0]
    else:
        from awm_jax import torch_compat

        params = torch_compat.load(path, Arch(name=args.arch, num_classes=dataset.num_classes))
    if params.arch.num_classes != dataset.num_classes:
        raise ValueError(
            f"Expected a network with {dataset.num_classes} classes for {args.dataset}, "
            f"got {params.arch.num_classes} in {path}."
        )
    return params


def _scene(name: str, args, dataset: Dataset, cache: pathlib.Path) -> Scene:
    """The network that carries one attack."""
    spec = networks.NetworkSpec(
        dataset=args.dataset, arch=args.arch, attack=name, rate=args.poison_rate,
        epochs=args.epochs or PRESETS[args.dataset].epochs, seed=args.network_seed)
    shape = dataset.train_images.shape[1:]
    if args.trigger is not None:
        trigger = attacks.trigger_from_png(args.trigger, shape, mode=args.trigger_mode)
        attack = Attack(args.trigger.stem, trigger, args.target, dataset.num_classes)
        spec = dataclasses.replace(
            spec, attack=f"{attack.name}-{args.trigger_mode}-{args.target}")
    else:
        attack = networks.make_attack(spec, dataset, cache)
        if args.target is not None:
            attack = dataclasses.replace(attack, target=args.target)
            spec = dataclasses.replace(spec, attack=f"{name}-{args.target}")
    if args.checkpoint is not None:
        params = _checkpoint_params(args.checkpoint, args, dataset)
    else:
        params = networks.get_network(spec, dataset, cache, attack)
    label = attack.name if args.checkpoint is None else f"{args.checkpoint.stem}:{attack.name}"
    return Scene(label, params, attack, dataset, splits.defender_split(dataset))


def _config(variant: str, args, dataset: Dataset) -> awm.AWMConfig:
    """AWM's settings for a variant on this data set."""
    one_shot = args.samples == "one-shot"
    copies = PRESETS[args.dataset].paper_copies if one_shot and variant != "distilled" else 0
    return awm.AWMConfig(variant=variant, epochs=args.purify_epochs, flip=dataset.flip,
                         copies=copies)


def _purify(scene: Scene, variant: str, seed: int, args, folder: pathlib.Path) -> dict:
    """One purification, measured: a cell of the table."""
    dataset, pool = scene.dataset, scene.split.pool_indices
    drawn = splits.draw_clean(seed, dataset.test_labels[pool], dataset.num_classes, args.samples)
    chosen = pool[drawn]
    batch = Batch(dataset.test_images[chosen].astype(np.float32) / 255.0,
                  dataset.test_labels[chosen])
    config = _config(variant, args, dataset)
    settings = config.resolve(len(chosen), dataset.test_images.shape[1:])
    progress = Progress(f"purifying {scene.name}, {variant}, seed {seed}", settings.epochs)
    curve: dict[str, list[float]] = {"epoch": [], "clean_accuracy": [], "asr": []}
    watching = 0.0

    def on_epochs(done, total, state, latest):
        nonlocal watching
        del total
        started = time.perf_counter()
        if seed == 0:  # Figure 4, from the first seed; it only watches
            now = scene.evaluate(awm.with_masks(scene.params, state.masks), _HISTORY_IMAGES)
            curve["epoch"].append(done)
            curve["clean_accuracy"].append(now.acc)
            curve["asr"].append(now.asr)
        watching += time.perf_counter() - started
        progress.update(done, clean=latest["clean_loss"], triggered=latest["trigger_loss"],
                        mask=latest["mask_mean"])

    started = time.perf_counter()
    found = awm.purify(scene.params, batch, config=config, key=jax.random.key(seed),
                       on_epochs=on_epochs)
    seconds = time.perf_counter() - started - watching
    progress.close()
    _pictures(scene, found, curve, variant, seed, folder)
    return {
        "attack": scene.name, "variant": variant, "seed": seed, "status": found.status.name,
        "before": scene.before._asdict(),
        "after": scene.evaluate(found.params)._asdict(),
        "seconds": seconds, "target": scene.attack.target, "clean_indices": chosen,
        "settings": dataclasses.asdict(settings), "history": found.history, "curve": curve,
        **_surveyed(found.survey),
    }


def _surveyed(survey: Survey | None) -> dict:
    """What the survey says, without its triggers."""
    if survey is None:
        return {"damage": None}
    return {"damage": survey.damage, "stay": survey.stay, "kept": survey.kept,
            "suspect": int(survey.suspect)}


def _pictures(scene: Scene, found: awm.Purified, curve: dict, variant: str, seed: int,
              folder: pathlib.Path) -> None:
    """Figures 4 and 5 and the triggers, from the first seed; the purified network of every seed."""
    stem = f"{scene.name.replace(':', '-')}-{variant}"
    checkpoint.save(folder / "purified" / f"{stem}-{seed}", found.params,
                    {"status": found.status.name}, overwrite=True)
    if seed != 0:
        return
    epochs = np.arange(1, len(found.history["clean_loss"]) + 1)
    figures.history(folder / f"{stem}-history.png", curve, f"{scene.name}, {variant}")
    figures.history(folder / f"{stem}-losses.png", {
        "epoch": epochs, "clean_loss": found.history["clean_loss"],
        "trigger_loss": found.history["trigger_loss"]}, f"{scene.name}, {variant}")
    layers = {k: np.asarray(v) for k, v in masking.by_layer(found.masks).items()}
    figures.mask_histogram(folder / f"{stem}-masks.png", layers)
    pictures.recovered_trigger(folder / f"{stem}-trigger.png", found.trigger,
                               np.asarray(scene.attack.trigger.pattern))


def _show_attack(scene: Scene, folder: pathlib.Path) -> None:
    """Clean and triggered images, and what the trigger changes."""
    images = scene.dataset.test_images[scene.split.eval_indices[:4]].astype(np.float32) / 255.0
    stem = scene.name.replace(":", "-")
    pictures.pairs(folder / f"{stem}-pairs.png", images, np.asarray(scene.attack.apply(images)))


def _check(args) -> None:
    """What argparse cannot see, before any work starts."""
    if args.checkpoint is not None and not args.checkpoint.exists():
        raise FileNotFoundError(f"Expected a network at {args.checkpoint}, found nothing there.")
    if args.trigger is not None and not args.trigger.exists():
        raise FileNotFoundError(f"Expected a PNG at {args.trigger}, found nothing there.")
    if args.trigger is not None and len(args.attack) > 1:
        raise ValueError("Expected one --attack beside --trigger: a PNG is one trigger.")
    if args.checkpoint is not None and len(args.attack) > 1:
        raise ValueError("Expected one --attack beside --checkpoint: a network carries one.")


def run(args) -> dict:
    """The whole job; returns what results.json holds."""
    _check(args)
    dataset = data.load(args.dataset, data_dir=args.data_dir)
    if args.target is not None and not 0 <= args.target < dataset.num_classes:
        raise ValueError(f"Expected --target={args.target} in 0..{dataset.num_classes - 1}.")
    folder = args.out or pathlib.Path("runs") / f"oneshot-{args.dataset}-{args.arch}"
    path = folder / "results.json"
    cells = {} if args.fresh else results.read_cells(path)
    shared = {"dataset": args.dataset, "arch": args.arch, "versions": results.versions(),
              "command": " ".join(["python -m experiments.oneshot", *sys.argv[1:]])}
    mine = []
    for name in args.attack:
        scene = None
        for variant in args.variant:
            for seed in range(args.seeds):
                cell = _cell_name(name, variant, seed, args)
                mine.append(cell)
                if cell in cells:
                    continue
                if scene is None:
                    scene = _scene(name, args, dataset, data.cache_directory() / "networks")
                    _show_attack(scene, folder)
                cells[cell] = _purify(scene, variant, seed, args, folder)
                results.write_json(path, {**shared, "cells": cells})
    text = results.table([cells[c] for c in mine], dataset.num_classes)
    (folder / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\nEverything is in {folder}/ (results.json, table.md, pictures, purified/).")
    return {**shared, "cells": {c: cells[c] for c in mine}}


def _cell_name(attack: str, variant: str, seed: int, args) -> str:
    """Names a purification by all that decides it, so that a resumed run mixes nothing up.

    The variant's constants are among it: a release that changes them starts its cells afresh.
    """
    epochs = args.epochs or PRESETS[args.dataset].epochs
    network = args.checkpoint or f"e{epochs}-p{args.poison_rate}-s{args.network_seed}"
    trigger = "" if args.trigger is None else f"/{args.trigger.stem}-{args.trigger_mode}"
    target = "" if args.target is None else f"/t{args.target}"
    constants = hashlib.sha256(repr(sorted(VARIANTS[variant].items())).encode()).hexdigest()[:8]
    settings = f"{variant}-{constants}-{args.purify_epochs or 'default'}-{args.samples}"
    return f"{attack}{trigger}{target}/{network}/{settings}/{seed}"


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"experiments.oneshot: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
