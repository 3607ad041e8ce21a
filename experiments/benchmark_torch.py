"""One-shot AWM beside a plain PyTorch loop of the same algorithm, on the same processor.

    python -m experiments.benchmark_torch [--epochs 100] [--images 43] [--out times.json]

The loop does what the published code does: clean predictions recomputed at every trigger step, two
forward passes in a mask step. Both sides move the trigger away from the network's own predictions,
with the paper's other settings. Each side runs in a process of its own, one after the other.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

_INNER, _OUTER, _BATCH, _TAU = 10, 10, 16, 1000.0


def _data(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels that stand for GTSRB's; the time does not depend on what they show."""
    rng = np.random.default_rng(0)
    return rng.random((count, 32, 32, 3), np.float32), (np.arange(count) % 43).astype(np.int32)


def _network():
    """The small VGG in PyTorch."""
    import torch

    torch.manual_seed(0)
    layers, width = [], 3
    for features in (32, 64, 128):
        for _ in range(2):
            layers += [torch.nn.Conv2d(width, features, 3, padding=1),
                       torch.nn.BatchNorm2d(features), torch.nn.ELU()]
            width = features
        layers.append(torch.nn.MaxPool2d(2))
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(2048, 43)).eval()


def time_torch(epochs: int, count: int) -> dict[str, float]:
    """Seconds of the PyTorch loop."""
    import torch
    import torch.nn.functional as F

    net = _network()
    images, labels = _data(count)
    x_all, y_all = torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(labels).long()
    weights = {k: v.detach() for k, v in net.named_parameters()}
    masks = {k: torch.ones_like(v, requires_grad=True) for k, v in weights.items() if v.ndim == 4}
    optimiser = torch.optim.Adam(masks.values(), lr=0.01)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [max(1, epochs // 2)], 0.1)

    def forward(x):
        masked = {**weights, **{k: weights[k] * m for k, m in masks.items()}}
        return torch.func.functional_call(net, masked, (x,))

    def batch():
        picks = torch.randperm(count)[:_BATCH]
        return x_all[picks], y_all[picks]

    started = time.perf_counter()
    for _ in range(epochs):
        delta = torch.zeros(1, 3, 32, 32, requires_grad=True)
        for _ in range(_INNER):
            x, _ = batch()
            with torch.no_grad():
                own = forward(x).argmax(1)
            loss = F.cross_entropy(forward(x + delta), own)
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = (delta + 10.0 * gradient).detach().requires_grad_()
        delta = (delta * min(1.0, _TAU / (delta.abs().sum().item() + 1e-12))).detach()
        for _ in range(_OUTER):
            x, y = batch()
            loss = 0.9 * F.cross_entropy(forward(x), y)
            loss = loss + 0.1 * F.cross_entropy(forward((x + delta).clamp(0, 1)), y)
            loss = loss + 1e-8 * sum(m.abs().sum() for m in masks.values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                for m in masks.values():
                    m.clamp_(0, 1)
        schedule.step()
    return {"seconds": time.perf_counter() - started, "compile": 0.0}


def time_jax(epochs: int, count: int) -> dict[str, float]:
    """Seconds of the compiled run, and of compiling it."""
    import dataclasses

    import jax

    from awm_jax import Arch, models
    from awm_jax.defences import awm

    params = models.create(jax.random.key(0), Arch(name="small_vgg", num_classes=43))
    images, labels = (jax.numpy.asarray(a) for a in _data(count))
    settings = dataclasses.replace(
        awm.AWMConfig(variant="paper", epochs=epochs).resolve(count, (32, 32, 3)),
        inner_target="own", clamp_outer=True)
    run = jax.jit(awm.run, static_argnames="settings")
    started = time.perf_counter()
    compiled = run.lower(jax.random.key(0), params, images, labels, settings=settings).compile()
    compile_seconds = time.perf_counter() - started
    started = time.perf_counter()
    jax.block_until_ready(compiled(jax.random.key(0), params, images, labels))
    return {"seconds": time.perf_counter() - started, "compile": compile_seconds}


def main(argv: list[str] | None = None) -> None:
    """Runs both sides ``--reps`` times, alternating, and prints medians and their ratio."""
    p = argparse.ArgumentParser(prog="python -m experiments.benchmark_torch", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epochs", type=int, default=100)
    p.add_argument("--images", type=int, default=43)
    p.add_argument("--reps", type=int, default=1)
    p.add_argument("--out", type=pathlib.Path)
    p.add_argument("--side", choices=("torch", "jax"), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.side:
        side = time_torch if args.side == "torch" else time_jax
        print(json.dumps(side(args.epochs, args.images)))
        return
    times: dict[str, list[dict[str, float]]] = {"torch": [], "jax": []}
    for _ in range(args.reps):
        for side_name, found in times.items():
            done = subprocess.run(
                [sys.executable, "-m", "experiments.benchmark_torch", "--side", side_name,
                 "--epochs", str(args.epochs), "--images", str(args.images)],
                check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    median = {k: float(np.median([t["seconds"] for t in v])) for k, v in times.items()}
    compiling = float(np.median([t["compile"] for t in times["jax"]]))
    ratio = median["jax"] / median["torch"]
    print(f"small VGG, {args.images} images, {args.epochs} epochs of {_INNER}+{_OUTER} steps of "
          f"{_BATCH}\nPyTorch {median['torch']:.1f} s; awm_jax {median['jax']:.1f} s "
          f"(and {compiling:.1f} s to compile); ratio ours/PyTorch {ratio:.2f}")
    if args.out:
        args.out.write_text(json.dumps({**vars(args), "out": str(args.out), "times": times,
                                        "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
