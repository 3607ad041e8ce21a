"""An oracle: how AWM would do if its survey had found the true trigger, beside what it does.

    python -m experiments.known_trigger --dataset=cifar10 --data_dir DIR --attack l0_inv --seeds 3

Where a backdoor survives this tells whether it is the search that missed the trigger, or the masks
that cannot remove it. Nobody defends with this: it looks at the attacker's trigger.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax.attacks import Attack, Trigger
from awm_jax.defences import AWMConfig, purify
from awm_jax.defences.survey import LEADS_BELOW, Survey
from experiments import cli, defending, networks, pages, results, resuming, scene
from experiments.scene import Scene

_WAYS = ("as it is", "oracle")


def _parser() -> argparse.ArgumentParser:
    """The options."""
    p = cli.scene_parser("python -m experiments.known_trigger",
                         "Purify with AWM as it is, and with the true trigger told to it.")
    p.add_argument("--samples", type=cli.samples, default="one-shot",
                   help="clean images for the defence (default: %(default)s)")
    p.add_argument("--seeds", type=cli.positive, default=3,
                   help="purifications of either kind (default: %(default)s)")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/known_trigger"),
                   help="directory of known_trigger.json (default: %(default)s)")
    cli.fresh_option(p)
    p.set_defaults(set=None, purify_epochs=None)
    return p


def added(trigger: Trigger) -> jax.Array:
    """The trigger as what is added to images that then are clipped to [0, 1].

    Args:
      trigger: one whose pixels are added, or replaced by black or white.

    Returns:
      ``[H, W, C]`` in [-1, 1]: ``clip(x + d, 0, 1)`` is what the trigger makes of any ``x``.

    Raises:
      ValueError: it blends, or replaces pixels by shades: no one pattern does that to all images.

    Example:
      >>> white = Trigger(jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1)))
      >>> added(white).item(), added(white._replace(pattern=jnp.zeros((1, 1, 1)))).item()
      (1.0, -1.0)
    """
    pattern, mask = (np.asarray(leaf) for leaf in trigger)
    whole = np.broadcast_to(mask == 1, pattern.shape)
    if np.any((mask != 0) & (mask != 1)) or not np.isin(pattern[whole], (0, 1)).all():
        raise ValueError("Expected a trigger that is added, or whose pixels are black or white in "
                         "every channel; this one mixes with the image. Choose an attack such "
                         "as badnets, l0_inv or l2_inv.")
    return jnp.asarray(np.where(whole, 2 * pattern - 1, pattern))


def told(survey: Survey, trigger: jax.Array, target: int) -> Survey:
    """A survey that found the trigger, and found it to do more damage than any other.

    Args:
      survey: what was found, ``c`` classes.
      trigger: ``[H, W, C]`` as `added` gives it.
      target: its class, in 0..c-1.

    Returns:
      `Survey`, no all-to-all backdoor suspected, nor one of a warp.

    Example: `told(purified.survey, added(attack.trigger), attack.target)`.
    """
    damage = jnp.asarray(survey.damage)
    return survey._replace(
        triggers=jnp.asarray(survey.triggers).at[target].set(trigger),
        damage=damage.at[target].set((LEADS_BELOW + 1) * damage.max() + 1),
        strain=jnp.zeros_like(jnp.asarray(survey.strain)))


def _fits(attack: Attack) -> jax.Array:
    """What an attack adds; ValueError for one that has no such trigger, or no one target."""
    if attack.target is None or attack.parts or not isinstance(attack.trigger, Trigger):
        raise ValueError(f"Expected an attack with one fixed pattern and one target, got "
                         f"{attack.name}. Choose one such as badnets, l0_inv or l2_inv.")
    return added(attack.trigger)


def measure(on_stage: Scene, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One draw of clean images, both ways.

    Args:
      on_stage: the network.
      seed: decides the clean images and the defence's key.
      args: as the command's.

    Returns:
      A row a way: ``network``, ``way``, ``seed``, ``samples``, ``after`` (scores) and ``share``,
      of the trigger that the survey found for the attacker's class, summed as magnitudes, the
      part that lies where the true one does.

    Raises:
      ValueError: an attack of another kind, see `added`.

    Example: see `run`.
    """
    config = defending.config("awm", args, on_stage.dataset)
    assert isinstance(config, AWMConfig)
    trigger, target = _fits(on_stage.attack), on_stage.attack.target
    batch, _ = on_stage.clean(seed, args.samples)
    rows, survey = [], None
    for way in _WAYS:
        found = purify(on_stage.params, batch, config=config, key=jax.random.key(seed),
                       survey=survey)
        assert found.survey is not None and target is not None
        size = np.abs(np.asarray(found.survey.triggers[target]))
        share = float(size[np.asarray(trigger) != 0].sum() / max(size.sum(), 1e-9))
        rows.append({"network": on_stage.name, "way": way, "seed": seed, "samples": args.samples,
                     "after": on_stage.evaluate(found.params)._asdict(), "share": share})
        survey = told(found.survey, trigger, target)
    return rows


def _measure(stage: Callable[[str], Scene], name: str, seed: int,
             args: argparse.Namespace) -> list[dict[str, Any]]:
    """`measure`, of an attack's name."""
    return measure(stage(name), seed, args)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in percent: a row a network and way, means and standard deviations over seeds.

    Args:
      rows: from `measure`.

    Example:
      >>> row = {'network': 'a', 'way': 'oracle', 'seed': 0, 'share': .5,
      ...        'after': {'acc': 90., 'asr': 1., 'asr_all': 2.}}
      >>> table([row]).splitlines()[-1]
      '| a | oracle | 90.00 | 1.00 | 2.00 | 50.00 | 1 |'
    """
    lines = [["network", "survey", "ACC", "ASR", "ASR(all)", "of its trigger on the true one",
              "seeds"]]
    for name, way in dict.fromkeys((row["network"], row["way"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["way"]) == (name, way)]
        scores = [results.mean_std([row["after"][what] for row in mine])
                  for what in ("acc", "asr", "asr_all")]
        share = results.mean_std([100 * row["share"] for row in mine])
        lines.append([name, way, *scores, share, str(len(mine))])
    return pages.rows_of(lines)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole job; returns the rows of known_trigger.json."""
    dataset = cli.load(args)
    scene.check(args, dataset, (args.samples,))
    for name in args.attack:
        _fits(scene.untrained(name, args, dataset))
    rows: list[dict[str, Any]] = []
    kept = resuming.Rows(args.out / "known_trigger.json", "experiments.known_trigger", args,
                         dataset)
    stage = functools.lru_cache(maxsize=1)(
        lambda name: scene.make(name, args, dataset, networks.directory()))
    settings = f"{defending.fingerprint('awm', args, dataset)}-{args.samples}"
    for name in args.attack:
        network = scene.network_name(name, args, dataset)
        for seed in range(args.seeds):
            rows += kept.of(f"{network}/{settings}/{seed}", _measure, stage, name, seed, args)
            print("; ".join(
                f"{row['network']}, seed {seed}, {row['way']}: ACC {row['after']['acc']:.1f}, ASR "
                f"{row['after']['asr']:.1f}" for row in rows[-len(_WAYS):]), flush=True)
    results.write_text(args.out / "known_trigger.md", table(rows) + "\n")
    print(f"\n{table(rows)}\n\nEverything is in {args.out}/.")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors of the user's making end in one line and status 2."""
    args = _parser().parse_args(argv)
    return cli.run("experiments.known_trigger", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
