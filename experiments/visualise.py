"""What a defence does inside a network: FT-SAM's supplement, Figures 1 to 6.

    python -m experiments.visualise --dataset=cifar10 --data_dir DIR --arch preact_resnet18 \
        --attack badnets,blended,sig,wanet --defence ft_sam --samples 2500

TAC, heat maps and features are of triggered test images: they explain a purification afterwards,
and the defence sees clean images alone, as everywhere.
"""

import argparse
import functools
import hashlib
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import explain, metrics
from awm_jax.attacks import Attack
from awm_jax.data import Dataset, splits
from awm_jax.defences import DEFENCES, chunks
from awm_jax.defences.ac import features
from awm_jax.progress import waiting
from awm_jax.report import explanations
from awm_jax.types import Params
from experiments import cli, defending, networks, resuming, scene, watching
from experiments.scene import Scene

_BATCH = 256  # clean images of a gradient, as many as FT-SAM's batches have
_CHUNK = 250  # images that are given the trigger at a time, and that the watched ASR is of


def _parser() -> argparse.ArgumentParser:
    """The options."""
    p = cli.scene_parser("python -m experiments.visualise",
                         "Purify a network, and draw its neurons, heat maps and features before "
                         "and after.")
    how = p.add_argument_group("defence")
    how.add_argument("--defence", choices=DEFENCES, default="ft_sam", metavar="NAME",
                     help=f"one of: {', '.join(DEFENCES)} (default: %(default)s)")
    how.add_argument("--samples", type=cli.samples, default="one-shot",
                     help="clean images for the defence: 'one-shot' (one of each class) or a "
                     "number (default: %(default)s)")
    how.add_argument("--purify_epochs", type=cli.positive,
                     help="epochs of the defence, where it counts any (default: its own)")
    how.add_argument("--seed", type=cli.seed, default=0,
                     help="of the clean images, the defence and t-SNE (default: %(default)s)")
    what = p.add_argument_group("pictures")
    what.add_argument("--images", type=cli.positive, default=500,
                      help="test images for TAC and t-SNE (default: %(default)s)")
    what.add_argument("--shown", type=cli.positive, default=6,
                      help="images with heat maps (default: %(default)s)")
    what.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/visualise"),
                      help="directory of visualise.json and the pictures (default: %(default)s)")
    cli.fresh_option(p)
    p.set_defaults(set=None, variant="")
    return p


class Views(NamedTuple):
    """Test images that no defender ever draws, and the same with the trigger.

    Args:
      images: ``[n, H, W, C]`` float32 in [0, 1].
      labels: ``[n]``.
      others: ``[m]`` indices of the images outside the attacker's class.
      triggered: ``[m, H, W, C]``, these with the trigger; of several triggers, the first.
      wanted: ``[m]`` the attacker's classes for them.
    """

    images: np.ndarray
    labels: np.ndarray
    others: np.ndarray
    triggered: np.ndarray
    wanted: np.ndarray


def _others(attack: Attack, labels: np.ndarray) -> np.ndarray:
    """Indices of the images outside the attacker's class; ValueError if there are none."""
    found = np.flatnonzero(attack.relabel(labels) != labels)
    if not len(found):
        raise ValueError(f"Expected images outside the attacker's class, got {len(labels)} of it. "
                         "Raise --images.")
    return found


def views(on_stage: Scene, count: int) -> Views:
    """The first ``count`` images that scores are measured on; for analysis only."""
    chosen = on_stage.split.eval_indices[:count]
    images = on_stage.dataset.test_images[chosen].astype(np.float32) / 255.0
    labels = np.asarray(on_stage.dataset.test_labels[chosen])
    others = _others(on_stage.attack, labels)
    attack = (on_stage.attack.parts or (on_stage.attack,))[0]
    triggered = [np.asarray(attack.apply(images[others[start : start + _CHUNK]]))
                 for start in range(0, len(others), _CHUNK)]
    return Views(images, labels, others, np.concatenate(triggered),
                 np.asarray(on_stage.attack.relabel(labels))[others])


@jax.jit
def _neurons(params: Params, images: jax.Array) -> jax.Array:
    """`explain.neurons` of any number of images."""
    return chunks.over_images(functools.partial(explain.neurons, params), images)


_features = jax.jit(features)
_gradient_norms = jax.jit(explain.gradient_norms)
_grad_cam = jax.jit(explain.grad_cam)


def correlations(values: np.ndarray, others: np.ndarray) -> dict[str, float | None]:
    """How far two series go together: in value, and in rank.

    Args:
      values: ``[k]``.
      others: ``[k]``.

    Returns:
      ``'pearson'`` and ``'spearman'`` in [-1, 1]; None where one of the series is constant.

    Example:
      >>> found = correlations(np.array([1., 2., 3.]), np.array([1., 2., 9.]))
      >>> round(found['spearman'], 6), bool(found['pearson'] < 1)
      (1.0, True)
    """
    from scipy.stats import rankdata

    def pearson(a, b):
        a, b = (np.asarray(series, float) - np.mean(series, dtype=float) for series in (a, b))
        length = np.sqrt((a @ a) * (b @ b))
        return float(a @ b / length) if length > 0 else None

    return {"pearson": pearson(values, others),
            "spearman": pearson(rankdata(values), rankdata(others))}


def embed(features: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE of features; the same seed gives the same points.

    Args:
      features: ``[n, d]``, n >= 2.
      seed: of scikit-learn's optimiser, which starts from the two principal components.

    Returns:
      ``[n, 2]`` float32; all zero where the features are alike to rounding, as a network gives
      them that a defence has ruined.

    Example:
      >>> embed(np.random.default_rng(0).normal(size=(8, 3)), 0).shape
      (8, 2)

    Reference: van der Maaten & Hinton 2008, "Visualizing Data using t-SNE"; FT-SAM, supplement,
    Figure 6.
    """
    from sklearn.manifold import TSNE

    features = np.asarray(features)
    if features.std(axis=0).max() <= 1e-6 * np.abs(features).max():  # scikit-learn 1.9 would crash
        return np.zeros((len(features), 2), np.float32)
    # Its default of 30 neighbours, fewer for a handful of points.
    return TSNE(perplexity=min(30.0, (len(features) - 1) / 3), init="pca",
                random_state=seed).fit_transform(features)


def purify(on_stage: Scene, args) -> tuple[Params, str]:
    """The purified network, and how the purification ended."""
    chosen = defending.config(args.defence, args, on_stage.dataset)
    given = defending.data_of(on_stage, args.defence, args.seed, args)
    with waiting(f"{on_stage.name}, {args.defence}, seed {args.seed}"):
        found = DEFENCES[args.defence](on_stage.params, given, key=jax.random.key(args.seed),
                                       config=chosen)
    return found.params, found.status.name


def _draw_neurons(on_stage: Scene, networks: dict[str, Params], seen: Views, args,
                  path: pathlib.Path) -> dict[str, Any]:
    """Figure 1 without perturbation, on one batch of clean images, of each network; its numbers."""
    batch, _ = on_stage.clean(args.seed, args.samples)
    images = seen.images[seen.others]
    change = {name: np.asarray(explain.tac(_neurons(params, images),
                                           _neurons(params, seen.triggered)))
              for name, params in networks.items()}
    norms = {name: np.asarray(_gradient_norms(params, batch.images[:_BATCH], batch.labels[:_BATCH]))
             for name, params in networks.items()}
    order = change["backdoored"]
    explanations.neurons(
        path, {"trigger-activated change (TAC)": change, "gradient norm, clean images": norms},
        order, f"{on_stage.name}, {args.defence}, {len(batch.labels)} clean images")
    return {"layer": explain.last_convolution(on_stage.params.arch), "tac": change,
            "gradient_norms": norms,
            "correlations": {name: correlations(order, own) for name, own in norms.items()}}


def _draw_epochs(on_stage: Scene, seen: Views, order: np.ndarray, args,
                 path: pathlib.Path) -> list[dict[str, Any]]:
    """Figure 1 as the paper has it: within FT-SAM's epochs, under its perturbation."""
    chosen = defending.config("ft_sam", args, on_stage.dataset)
    batch, _ = on_stage.clean(args.seed, args.samples)
    found = watching.watch(
        jax.random.key(args.seed), on_stage.params, batch.images, batch.labels, chosen,
        jnp.asarray(seen.triggered[:_CHUNK]), jnp.asarray(seen.wanted[:_CHUNK]))
    norms, asr = np.asarray(found.norms), 100 * np.asarray(found.asr, float)
    explanations.neurons(
        path, {f"epoch {epoch}, ASR {rate:.1f}%": {"norm": own}
               for epoch, (own, rate) in enumerate(zip(norms, asr, strict=True), start=1)}, order,
        f"{on_stage.name}, ft_sam: gradient norm at the worst point, first batch of an epoch")
    return [{"epoch": epoch, "asr": rate, "gradient_norms": own, **correlations(order, own)}
            for epoch, (own, rate) in enumerate(zip(norms, asr, strict=True), start=1)]


def _draw_heat(on_stage: Scene, networks: dict[str, Params], seen: Views, args,
               path: pathlib.Path) -> dict[str, Any]:
    """Figures 2 to 5, towards the class that each network predicts; the classes."""
    images = seen.triggered[: args.shown]
    maps = {name: np.asarray(_grad_cam(params, images)) for name, params in networks.items()}
    true = seen.labels[seen.others][: args.shown]
    classes = {"triggered": true, **{name: metrics.predict(params, images)
                                     for name, params in networks.items()}}
    titles = {name: [f"{'class' if name == 'triggered' else 'says'} {c}" for c in own]
              for name, own in classes.items()}
    explanations.heat_maps(path, images, maps, titles)
    return {"block": explain.last_map(on_stage.params.arch), "true": true,
            **{name: classes[name] for name in networks}}


def _draw_features(on_stage: Scene, networks: dict[str, Params], seen: Views, args,
                   path: pathlib.Path) -> None:
    """Figure 6: the last block's features, averaged over space, of clean and triggered images."""
    images = np.concatenate([seen.images, seen.triggered])
    labels = np.concatenate([seen.labels, seen.labels[seen.others]])
    triggered = np.arange(len(images)) >= len(seen.images)
    points = {name: embed(np.asarray(_features(params, images)), args.seed)
              for name, params in networks.items()}
    names = on_stage.dataset.class_names or range(on_stage.dataset.num_classes)
    explanations.scatter(path, points, labels, triggered, list(map(str, names)),
                         f"{on_stage.name}, {args.defence}: t-SNE of the features")


def show(on_stage: Scene, key: str, args) -> dict[str, Any]:
    """Purifies one network and draws every figure of it; a row of visualise.json.

    Args:
      on_stage: the network.
      key: says all that decides the row; its digest is in the pictures' names.
      args: the command's options.
    """
    purified, status = purify(on_stage, args)
    networks = {"backdoored": on_stage.params, "purified": purified}
    seen = views(on_stage, args.images)
    digest = hashlib.sha256(key.encode()).hexdigest()[:6]
    stem = f"{on_stage.name.replace(':', '-')}-{args.defence}-{digest}"
    files = {what: f"{stem}-{what}.png" for what in ("neurons", "heat", "features")}
    inside = _draw_neurons(on_stage, networks, seen, args, args.out / files["neurons"])
    if args.defence == "ft_sam":
        files["epochs"] = f"{stem}-epochs.png"
        inside["epochs"] = _draw_epochs(on_stage, seen, inside["tac"]["backdoored"], args,
                                        args.out / files["epochs"])
    heat = _draw_heat(on_stage, networks, seen, args, args.out / files["heat"])
    _draw_features(on_stage, networks, seen, args, args.out / files["features"])
    return {"pictures": list(files.values()), "network": on_stage.name,
            "defence": args.defence, "seed": args.seed, "samples": args.samples,
            "status": status, "before": on_stage.before._asdict(),
            "after": on_stage.evaluate(purified)._asdict(),
            "images": len(seen.images), "triggered": len(seen.triggered), **inside,
            "heat_maps": heat}


def _rows(attack: str, key: str, args, dataset: Dataset) -> list[dict[str, Any]]:
    """`show` of the network that carries an attack."""
    return [show(scene.make(attack, args, dataset, networks.directory()), key, args)]


def _check(args, dataset: Dataset) -> None:
    """What would go wrong after the training.

    Raises:
      ValueError: a network without what is drawn, a defence that cannot work on it, or images that
        are all of the attacker's class.
    """
    scene.check(args, dataset, (args.samples,))
    arch = scene.arch_of(args, dataset)
    explain.last_convolution(arch)
    explain.last_map(arch)
    if args.checkpoint is not None and DEFENCES[args.defence].needs == "training":
        raise ValueError(f"Expected a network trained here for {args.defence}: the poisoned "
                         "training set of a --checkpoint is not known.")
    DEFENCES[args.defence].fits(arch)
    defending.config(args.defence, args, dataset)
    shown = splits.defender_split(dataset).eval_indices[: args.images]
    for name in args.attack:
        _others(scene.untrained(name, args, dataset), np.asarray(dataset.test_labels[shown]))


def _summary(row: dict[str, Any]) -> str:
    """One line on a network."""
    before, after = row["before"], row["after"]
    found = row["correlations"]["backdoored"]["spearman"]
    rank = "not defined" if found is None else f"{found:.2f}"
    return (f"{row['network']}, {row['defence']}: ACC {before['acc']:.1f} -> {after['acc']:.1f}, "
            f"ASR {before['asr']:.1f} -> {after['asr']:.1f}, TAC and gradient norm before: "
            f"rank correlation {rank}")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole job; returns the rows of visualise.json."""
    dataset = cli.load(args)
    _check(args, dataset)
    rows: list[dict[str, Any]] = []
    kept = resuming.Rows(args.out / "visualise.json", "experiments.visualise", args, dataset)
    settings = "-".join([args.defence, defending.fingerprint(args.defence, args, dataset),
                         *map(str, (args.samples, args.images, args.shown))])
    for attack in args.attack:
        key = f"{scene.network_name(attack, args, dataset)}/{settings}/{args.seed}"
        rows += kept.of(key, _rows, attack, key, args, dataset)
        print(_summary(rows[-1]), flush=True)
    print(f"Everything is in {args.out}/ (visualise.json, pictures).")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    args = _parser().parse_args(argv)
    return cli.run("experiments.visualise", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
