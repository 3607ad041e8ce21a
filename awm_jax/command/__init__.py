"""``awm-jax scan`` and ``awm-jax purify``: a network of somebody else and a few clean images in,
a verdict, a purified network in the same format, and a report out.
"""

import argparse
import pathlib
import shlex
import sys

from awm_jax import models
from awm_jax.command.options import (
    FROM_THE_START,
    OneLine,
    able,
    image_size,
    positive,
    run,
    seed,
    share,
)
from awm_jax.defences import Status

EXITS = ("exit status: 0: done, whatever the verdict; 2: an error, told in one line; 3: a network "
         "was written, but over a tenth of the images changed their class, or it ended too soon "
         "(see its report before you use it); 130: interrupted")


class _Normalise(argparse.Action):
    """Keeps what is given; 'help' lists what can be and ends, without the options a job needs."""

    def __call__(self, parser, namespace, values, option_string=None):
        """As argparse calls it."""
        if values == "help":
            from awm_jax.command import normalisation

            print("\n".join(normalisation.listed().split("; ")))
            parser.exit()
        setattr(namespace, self.dest, values)


def _shared(p: argparse.ArgumentParser) -> None:
    """What both commands ask for."""
    p.add_argument("model", type=pathlib.Path, metavar="MODEL",
                   help="the network: a PyTorch .pth or .pt file, .safetensors, or an Orbax "
                   "directory; nothing in it is executed")
    p.add_argument("--images", type=pathlib.Path, required=True, metavar="DIR|CSV",
                   help="clean images: a folder of each class, called by its number from 0 (or as "
                   "many folders as there are classes, in their order), or a CSV with columns "
                   "'file' and 'label'")
    p.add_argument("--arch", metavar="NAME",
                   help=f"architecture: {', '.join(models.MODELS)} (default: told by the tensors' "
                   "names; for others there is Params.from_flax in Python)")
    p.add_argument("--image_size", type=image_size, metavar="N|HxW",
                   help="what the network takes (default: by its tensors, or how it then does)")
    p.add_argument("--normalise", metavar="NAME|MEAN/STD", action=_Normalise,
                   help="what images in [0, 1] are normalised by: none, imagenet, cifar10, ... or "
                   "MEAN/STD, such as .5,.5,.5/.2,.2,.2; 'help' lists them (default: told by "
                   "what the network then says of the images)")
    p.add_argument("--flip", action="store_true",
                   help="images keep their class when mirrored (photographs, not signs)")
    p.add_argument("--seed", type=seed, default=0, help="seed (default: %(default)s)")
    p.add_argument("--report", type=pathlib.Path, metavar="FILE.html",
                   help="the report, with its numbers in FILE.json (default: MODEL-scan.html "
                   "beside the model, OUT-report.html beside --out)")
    p.add_argument("--force", action="store_true",
                   help="go on where the images are too few or the network gets most of them wrong")


def parser() -> argparse.ArgumentParser:
    """The parser of ``awm-jax``."""
    p = OneLine(prog="awm-jax", description=__doc__, epilog=EXITS)
    commands = p.add_subparsers(dest="command", required=True, metavar="scan|purify")
    scan = commands.add_parser("scan", prog="awm-jax scan", description="Look for a backdoor.",
                               help="look for a backdoor, and write a report")
    _shared(scan)
    purify = commands.add_parser(
        "purify", prog="awm-jax purify", description="Erase a backdoor, found or not.",
        help="erase a backdoor, found or not, and write the network and a report", epilog=EXITS)
    _shared(purify)
    purify.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE",
                        help="the purified network; .pth, .safetensors, or a new directory "
                        "(Orbax); never what is there already")
    purify.add_argument("--defence", default="awm", metavar="NAME",
                        help=f"what erases it: {', '.join(able())} (default: %(default)s, of "
                        "which ten images suffice)")
    purify.add_argument("--epochs", type=positive,
                        help="epochs of the defence, where it counts any (default: its own)")
    purify.add_argument("--alpha", type=share,
                        help="AWM's weight of clean answers, 0 to 1: less may erase more, of "
                        "several triggers say, and costs accuracy (default: .9; .8 against "
                        "several triggers or a large one, .5 against an all-to-all backdoor)")
    purify.add_argument("--repair", action="store_true",
                        help="after AWM's masks, where one small trigger is suspected: teach the "
                        "network its former answers on strongly changed clean images; gives back "
                        "accuracy where much was lost, and may bring some of a backdoor back")
    return p


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status, of which `EXITS` has the meanings."""
    given = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(given)
    ended: list[Status] = []

    def job():
        from awm_jax.command import jobs  # plots and pages: not for --help

        args.said = shlex.join(["python", "-m", "awm_jax", *given])
        if args.command == "scan":
            jobs.scan(args)
        else:
            ended.append(jobs.purify(args))

    status = run(f"awm-jax {args.command}", job, stopped=FROM_THE_START)
    doubtful = set(ended) - {Status.OK, Status.NOT_CONVERGED}
    return 3 if status == 0 and doubtful else status
