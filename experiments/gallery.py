"""Every attack on real images: clean, triggered, and what the trigger changes, amplified.

    python -m experiments.gallery --dataset=gtsrb --data_dir DIR --attack all --out gallery.png

Triggers that are found on a clean network, or trained along with one, train it first, unless the
cache has it.
"""

import argparse
import pathlib
import sys

import numpy as np

from awm_jax import validate
from awm_jax.report import pictures
from experiments import cli, networks, scene


def _parser() -> argparse.ArgumentParser:
    """The options."""
    p = cli.scene_parser("python -m experiments.gallery", "Draw attacks on images of a data set.",
                         attack="all")
    p.add_argument("--images", type=cli.positive, default=2,
                   help="test images to draw (default: %(default)s)")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/gallery.png"),
                   help="the PNG (default: %(default)s)")
    return p


def run(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Draws the picture; returns the triggered images by attack."""
    if args.checkpoint is not None:
        raise ValueError("Expected no --checkpoint: a gallery shows triggers, not networks.")
    validate.writable(args.out)
    dataset = cli.load(args)
    for name in args.attack:
        scene.untrained(name, args, dataset)  # refuses what does not fit before anything is trained
    # One image a class, so that the picture is of different things.
    _, first = np.unique(dataset.test_labels, return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, min(args.images, len(first))).astype(int)]
    images = dataset.test_images[chosen].astype(np.float32) / 255.0
    triggered, cache = {}, networks.directory()
    for name in args.attack:
        attack, spec = scene.attack_of(name, args, dataset, cache)
        attack = networks.learnt(spec, dataset, cache, attack)
        triggered[attack.name] = np.asarray(attack.apply(images))
    pictures.gallery(args.out, images, triggered)
    print(f"{len(triggered)} attacks on {len(images)} images are in {args.out}.")
    return triggered


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    args = _parser().parse_args(argv)
    return cli.run("experiments.gallery", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
