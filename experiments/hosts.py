"""Several hosts with a share of the work each: who does what, and waiting for one another."""

import pathlib
from collections.abc import Sequence
from typing import TypeVar

import jax

T = TypeVar("T")
_PATIENCE = 7 * 24 * 3600  # seconds that a host waits for another, which may train networks


def join(args) -> None:
    """Joins the other hosts if ``--distributed`` says so; before anything else uses JAX.

    Args:
      args: as `experiments.cli.parser` gives them.

    Raises:
      ValueError: options that do not go together, or hosts that do not find one another.
    """
    named = {"--coordinator": args.coordinator, "--num_hosts": args.num_hosts, "--host": args.host}
    given = [name for name, value in named.items() if value is not None]
    if not args.distributed:
        if given:
            raise ValueError(f"Expected --distributed beside {', '.join(given)}.")
        return
    if given and len(given) < len(named):
        raise ValueError(f"Expected all of {', '.join(named)} or, on a cluster that JAX knows, "
                         f"none; got {', '.join(given)}.")
    if given and not 0 <= args.host < args.num_hosts:
        raise ValueError(f"Expected --host={args.host} in 0..{args.num_hosts - 1}, as there are "
                         f"--num_hosts={args.num_hosts}.")
    try:
        jax.distributed.initialize(args.coordinator, args.num_hosts, args.host)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"The hosts did not find one another: {error} Name --coordinator, "
                         "--num_hosts and --host, the same command on each host.") from error


def alone() -> bool:
    """Whether this is the only host."""
    return jax.process_count() == 1


def first() -> bool:
    """Whether this is the host that does what is done once."""
    return jax.process_index() == 0


def share(work: Sequence[T]) -> list[T]:
    """This host's part of the work, all of it where there is but one: consecutive, of even size."""
    mine, hosts = jax.process_index(), jax.process_count()
    return list(work[mine * len(work) // hosts : (mine + 1) * len(work) // hosts])


def turns(work: Sequence[T]) -> list[T]:
    """The same, dealt out like cards: what takes longest is rarely all at one place."""
    return list(work[jax.process_index() :: jax.process_count()])


def wait(name: str) -> None:
    """Returns once every host has come to the point of this name, each of which is met once."""
    if not alone():
        from orbax.checkpoint import multihost

        # With the hosts named, a barrier of the coordinator's; without, a sum over all devices,
        # which on a CPU gives up after half a minute.
        multihost.sync_global_processes(f"awm_jax-{name}", timeout=_PATIENCE,
                                        processes=set(range(jax.process_count())))


def results_file(folder: pathlib.Path) -> pathlib.Path:
    """Where this host writes: results.json, or of several hosts each its own."""
    return folder / ("results.json" if alone() else f"results-host{jax.process_index()}.json")


def results_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files of results in a run directory, results.json first.

    Example:
      >>> results_files(pathlib.Path('/nowhere'))
      []
    """
    alone = folder / "results.json"
    # Not what `results.set_aside` renamed.
    several = [path for path in folder.glob("results-host*.json") if path.name.count(".") == 1]
    return [*([alone] if alone.is_file() else []), *sorted(several)]
