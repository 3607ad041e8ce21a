"""The options of the commands, checked before any work starts."""

import argparse
import difflib
import pathlib

from awm_jax import attacks, data, models, validate
from awm_jax.command import normalisation
from awm_jax.command.options import GOES_ON as GOES_ON
from awm_jax.command.options import OneLine, image_size, positive, run, seed
from awm_jax.data import Dataset
from awm_jax.defences import DEFENCES
from experiments import networks, presets, scene

__all__ = ["check", "fresh_option", "image_size", "load", "parser", "positive", "run", "samples",
           "scene_parser", "seed", "several_samples"]


_MODE, _RATIO = "add", 0.1  # of a --trigger, unless told otherwise


def samples(text: str) -> str | int:
    """'one-shot' or a positive number."""
    if text == "one-shot":
        return text
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected 'one-shot' or a whole number > 0, got {text!r}")


def several_samples(text: str) -> tuple[str | int, ...]:
    """A comma-separated list of `samples`."""
    return tuple(dict.fromkeys(samples(part) for part in text.split(",")))


def _rate(text: str) -> float:
    """A share over 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 < value <= 1:
        return value
    raise argparse.ArgumentTypeError(f"expected a number over 0, up to 1, got {text!r}")


def several(choices, what: str):
    """A comma-separated list out of ``choices``, or 'all'."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(choices) if text == "all" else tuple(dict.fromkeys(text.split(",")))
        unknown = [name for name in names if name not in choices]
        if unknown:
            near = difflib.get_close_matches(unknown[0], list(choices), n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise argparse.ArgumentTypeError(
                f"unknown {what} {', '.join(map(repr, unknown))}; {meant}Choose from "
                f"{', '.join(choices)}, or 'all'")
        return names

    return parse


def attacks_of(text: str) -> tuple[str, ...]:
    """Names of attacks, or one of the two groups."""
    return attacks.AWM_ATTACKS if text == "awm" else several(attacks.ATTACKS, "attack")(text)


def _defences(text: str) -> tuple[str, ...]:
    """Names of defences, or one of the two groups."""
    groups = {"all": False, "ablations": True}
    if text in groups:
        return tuple(n for n, d in DEFENCES.items() if d.ablation == groups[text])
    return several(DEFENCES, "defence")(text)


def dataset_of(text: str) -> str:
    """The name of a data set, or 'folder:PATH'."""
    if text in data.NAMES or (text.startswith(data.FOLDER) and text != data.FOLDER):
        return text
    raise argparse.ArgumentTypeError(
        f"unknown data set {text!r}; choose from {', '.join(data.NAMES)}, or {data.FOLDER}PATH for "
        "a folder of each class")


def _setting(text: str) -> tuple[str, str]:
    """'NAME=VALUE' in two."""
    name, sign, value = text.partition("=")
    if name and sign and value:
        return name, value
    raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")


def _grid(text: str) -> tuple[str, tuple[str, ...]]:
    """'NAME=VALUE,VALUE' in parts."""
    name, values = _setting(text)
    several_values = tuple(values.split(","))
    if all(several_values) and len(set(several_values)) == len(several_values):
        return name, several_values
    raise argparse.ArgumentTypeError(f"expected NAME=VALUE,VALUE of different values, got {text!r}")


def check(args: argparse.Namespace) -> None:
    """What argparse cannot see of `scene_parser`'s options.

    Raises:
      FileNotFoundError: ``--checkpoint`` or ``--trigger`` is not there.
      ValueError: several attacks beside either, which is of one; beside ``--checkpoint`` options
        of training, or ``--benign``, where a command has it; or options of either without it.
    """
    if args.checkpoint is not None and not args.checkpoint.exists():
        raise FileNotFoundError(f"Expected a network at {args.checkpoint}, found nothing there.")
    if args.trigger is not None and not args.trigger.exists():
        raise FileNotFoundError(f"Expected a PNG at {args.trigger}, found nothing there.")
    if args.trigger is not None and len(args.attack) > 1:
        raise ValueError("Expected one --attack beside --trigger: a PNG is one trigger.")
    if args.trigger is not None and args.target is None:
        raise ValueError("Expected --target beside --trigger: a picture does not tell which class "
                         "it leads to.")
    if args.trigger is None and (args.trigger_mode, args.blend_ratio) != (_MODE, _RATIO):
        raise ValueError("Expected --trigger beside --trigger_mode or --blend_ratio, which are of "
                         "its PNG alone. Leave them out, or name one.")
    if args.checkpoint is None and args.normalise is not None:
        raise ValueError("Expected --checkpoint beside --normalise: what is trained here takes "
                         "images as they are. Leave it out.")
    if args.checkpoint is not None and len(args.attack) > 1:
        raise ValueError("Expected one --attack beside --checkpoint: a network carries one.")
    if args.checkpoint is not None and getattr(args, "benign", False):
        raise ValueError("Expected no --checkpoint beside --benign: how that network was trained "
                         "is not known, so none can be trained alike without a backdoor.")
    if args.checkpoint is not None and (args.epochs, args.poison_rate) != (None, None):
        raise ValueError("Expected no --epochs or --poison_rate beside --checkpoint: that network "
                         "is trained already. Leave them out.")


def load(args: argparse.Namespace) -> Dataset:
    """`check`, then the data set of ``--dataset``.

    Raises:
      ValueError: a data set that is too small, or a ``--target`` outside its classes.
      OSError: a cache of networks that cannot be written.
    """
    check(args)
    validate.writable(networks.directory() / "network")
    dataset = data.load(args.dataset, data_dir=args.data_dir, image_size=args.image_size,
                        flip=args.flip)
    if args.dataset.startswith(data.FOLDER):
        _tell(dataset)
    if args.checkpoint is None:
        presets.of(dataset)  # refuses what is too small to train on
    else:
        args.arch = scene.arch_of(args, dataset).name
    if args.target is not None and not 0 <= args.target < dataset.num_classes:
        raise ValueError(f"Expected --target={args.target} in 0..{dataset.num_classes - 1}.")
    return dataset


def _tell(dataset: Dataset) -> None:
    """What was found in a folder, and the numbers that ``--target`` calls its classes by."""
    height, width = dataset.train_images.shape[1:3]
    names = [f"{number} {name}" for number, name in enumerate(dataset.class_names)]
    more = "" if len(names) <= 20 else f", ... {names[-1]}"
    print(f"{dataset.name}: {len(dataset.train_images)} training and {len(dataset.test_images)} "
          f"test images of {height}x{width}; {len(names)} classes: {', '.join(names[:20])}{more}",
          flush=True)


class _Asked(argparse.Action):
    """Keeps a value, and that it is no default: of a file that tells it, it is a check."""

    def __call__(self, parser, namespace, values, option_string=None):
        """As argparse calls it."""
        setattr(namespace, self.dest, values)
        setattr(namespace, f"{self.dest}_asked", True)


def scene_parser(prog: str, description: str, attack: str = "badnets") -> argparse.ArgumentParser:
    """Options that say which data and which backdoored network: what `scene.make` reads.

    Args:
      prog: the command.
      description: what it does.
      attack: its ``--attack`` unless told otherwise.
    """
    p = OneLine(prog=prog, description=description)
    p.set_defaults(arch_asked=False)
    source = p.add_argument_group("data")
    source.add_argument("--dataset", type=dataset_of, default="digits",
                        metavar=f"NAME|{data.FOLDER}PATH",
                        help=f"one of: {', '.join(data.NAMES)}; or a folder of images of your own, "
                        "with PATH/CLASS/*.png or PATH/train/CLASS and PATH/test/CLASS; digits "
                        "needs no download (default: %(default)s)")
    source.add_argument("--data_dir", type=pathlib.Path,
                        help="where its files are (default: $AWM_DATA_DIR, then the cache)")
    source.add_argument("--image_size", type=image_size, metavar="N|HxW",
                        help="size to which images of a folder are resized (default: their own)")
    source.add_argument("--flip", action="store_true",
                        help="images of a folder keep their class when mirrored: train on both")
    net = p.add_argument_group("network and attack")
    net.add_argument("--arch", choices=sorted(models.MODELS), default="small_vgg", action=_Asked,
                     help="architecture (default: %(default)s)")
    net.add_argument("--attack", type=attacks_of, default=attacks_of(attack),
                     metavar="NAME[,NAME...]|awm|all",
                     help=f"one or more of: {', '.join(attacks.ATTACKS)}; 'awm' are the six of the "
                     f"AWM paper's main tables (default: {attack})")
    net.add_argument("--poison_rate", type=_rate,
                     help="share of the training images that are poisoned, of a clean-label attack "
                     "a share of the target class's (default: the attack's paper's, mostly .05)")
    net.add_argument("--epochs", type=positive,
                     help="training epochs (default: by data set and attack)")
    net.add_argument("--network_seed", type=seed, default=0,
                     help="seed of trigger, poisoning and training (default: %(default)s)")
    net.add_argument("--checkpoint", type=pathlib.Path,
                     help="a backdoored network of somebody else instead of training one: a "
                     "PyTorch .pth file, .safetensors or an Orbax directory, whose tensors tell "
                     "the architecture; --attack or --trigger says what to test")
    net.add_argument("--normalise", metavar="NAME|MEAN/STD",
                     help="what that network's images in [0, 1] are normalised by: "
                     f"{', '.join(normalisation.KNOWN)}, or MEAN/STD, such as .5,.5,.5/.2,.2,.2 "
                     "(default: what an Orbax directory says, else nothing)")
    net.add_argument("--trigger", type=pathlib.Path,
                     help="PNG of the trigger instead of --attack's own; as large as the images, "
                     "or of any size to be mixed in")
    net.add_argument("--trigger_mode", choices=("add", "stamp", "blend"), default=_MODE,
                     help="add the PNG and clip, paste its non-black pixels, or mix it in "
                     "(default: %(default)s)")
    net.add_argument("--blend_ratio", type=_rate, default=_RATIO,
                     help="its share of the mixture (default: %(default)s)")
    net.add_argument("--target", type=int,
                     help="the class the trigger leads to (default: the attack's own)")
    return p


def fresh_option(p) -> None:
    """Adds ``--fresh``.

    Args:
      p: the command's parser, or a group of its options.
    """
    p.add_argument("--fresh", action="store_true",
                   help="begin anew instead of going on; what the directory held is renamed")


def set_option(group) -> None:
    """Adds ``--set NAME=VALUE``, which `experiments.defending.config` reads.

    Args:
      group: the options of the defence.

    Example:
      >>> p = argparse.ArgumentParser()
      >>> set_option(p)
      >>> p.parse_args(['--set', 'lr=.1']).set
      [('lr', '.1')]
    """
    group.add_argument("--set", type=_setting, action="append", metavar="NAME=VALUE",
                       help="a setting of the chosen defences that have it, such as "
                       "threshold=.3; repeatable")


def parser() -> argparse.ArgumentParser:
    """The parser of the main job."""
    p = scene_parser(
        "python -m experiments.oneshot",
        "Train (or load) a backdoored network, purify it with a few clean images, and "
        "report accuracy (ACC) and attack success rate (ASR) before and after.",
    )
    defence = p.add_argument_group("defence")
    defence.add_argument("--defence", type=_defences, default=("awm",),
                         metavar="NAME[,NAME...]|all|ablations",
                         help=f"one or more of: {', '.join(DEFENCES)}; 'all' leaves the ablations "
                         "out (default: awm)")
    defence.add_argument("--samples", type=samples, default="one-shot",
                         help="clean images for the defence: 'one-shot' (one of each class) or a "
                         "number (default: %(default)s)")
    defence.add_argument("--purify_epochs", type=positive,
                         help="epochs of the defence, where it counts any (default: its own)")
    set_option(defence)
    defence.add_argument("--grid", type=_grid, action="append", metavar="NAME=VALUE,VALUE",
                         help="the chosen defences that have the setting once with each value, as "
                         "rows of their own; repeatable, each with each")
    defence.add_argument("--seeds", type=positive, default=3,
                         help="purifications, each with other clean images (default: %(default)s)")
    defence.add_argument("--first_seed", type=seed, default=0,
                         help="the first of them, counted from 0, that is done (default: "
                         "%(default)s); those before it are left out")
    out = p.add_argument_group("output")
    out.add_argument("--out", type=pathlib.Path,
                     help="run directory (default: runs/oneshot-DATASET-ARCH)")
    fresh_option(out)
    _sweep_options(p)
    p.set_defaults(variant="")
    return p


def _sweep_options(p: argparse.ArgumentParser) -> None:
    """Options that say how purifications share devices and hosts."""
    many = p.add_argument_group("many at once")
    many.add_argument("--sweep", choices=("auto", "on", "off"), default="auto",
                      help="purify attacks, seeds and settings together, as many at a time as fit "
                      "into memory, on all devices; auto: unless there is one CPU device alone")
    many.add_argument("--chunk", type=positive,
                      help="purifications at a time on each device in a sweep (default: as many "
                      "as fit; on a CPU one)")
    many.add_argument("--distributed", action="store_true",
                      help="this is one of several hosts, each with a share of the work: "
                      "jax.distributed.initialize, which knows clusters; elsewhere with the three "
                      "options below, the same command on each host")
    many.add_argument("--coordinator", metavar="HOST:PORT", help="where host 0 listens")
    many.add_argument("--num_hosts", type=positive, help="how many there are")
    many.add_argument("--host", type=int, metavar="I", help="which of them this is, from 0")
