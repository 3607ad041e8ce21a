"""The PyTorch side of the benchmark: the same algorithms, written as well as we can.

Channels-last tensors; clean predictions once an epoch; no gradient of weights while the trigger
moves, and weights masked once for all of its steps; one forward pass for the clean and the
triggered images of a mask step. ``compile`` gives each forward pass to `torch.compile`; in
bfloat16 each is under `torch.autocast`, weights and everything outside it stay float32.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from experiments.benchmark_cells import Cell, Times, images_of, process_peak

_TAU = 1000.0


def torch_small_vgg(classes: int) -> torch.nn.Sequential:
    """The small VGG as a PyTorch module whose state_dict has the published files' names."""
    layers: list[torch.nn.Module] = []
    width = 3
    for features in (32, 64, 128):
        for _ in range(2):
            layers += [torch.nn.Conv2d(width, features, 3, padding=1),
                       torch.nn.BatchNorm2d(features), torch.nn.ELU()]
            width = features
        layers += [torch.nn.MaxPool2d(2), torch.nn.Dropout(0.4)]
    net = torch.nn.Sequential()
    net.add_module("features", torch.nn.Sequential(*layers))
    net.add_module("flatten", torch.nn.Flatten())
    net.add_module("classifier", torch.nn.Linear(2048, classes))
    return net.eval()


class _Block(torch.nn.Module):
    """A basic residual block."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(after)
        self.conv2 = torch.nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(after)
        self.shortcut = torch.nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = torch.nn.Sequential(
                torch.nn.Conv2d(before, after, 1, stride, bias=False), torch.nn.BatchNorm2d(after))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class _ResNet18(torch.nn.Module):
    """ResNet-18 for 32x32 images, under the names that `awm_jax.torch_compat` reads."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(64)
        stages, width = [], 64
        for features, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            stages.append(torch.nn.Sequential(_Block(width, features, stride),
                                              _Block(features, features, 1)))
            width = features
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = torch.nn.Linear(512, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def network(cell: Cell) -> torch.nn.Module:
    """A random network."""
    torch.manual_seed(0)
    makers: dict[str, Callable[[int], torch.nn.Module]] = {
        "small_vgg": torch_small_vgg, "resnet18": _ResNet18}
    return makers[cell.arch](cell.classes).eval()


def _device(cell: Cell) -> torch.device:
    """Where the cell runs."""
    return torch.device("cuda" if cell.device == "gpu" else "cpu")


def _autocast(cell: Cell) -> torch.autocast:
    """Where a forward pass computes in bfloat16, if it should."""
    return torch.autocast(_device(cell).type, torch.bfloat16, enabled=cell.precision == "bfloat16")


def _wait(cell: Cell) -> None:
    """Until the device is done."""
    if cell.device == "gpu":
        torch.cuda.synchronize()


def _peak(cell: Cell) -> float:
    """Most memory used so far, in MiB: of the GPU, or of this process."""
    if cell.device == "gpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return process_peak()


def _times(cell: Cell, first: float, seconds: float, before: float, figure: float) -> Times:
    """What a job took whose first epoch, which compiles if anything does, took ``first``."""
    compiling = max(0.0, first - seconds / cell.epochs / cell.seeds)
    return Times(seconds, compiling, _peak(cell), before, figure)


def _convolutions(net: torch.nn.Module, size: tuple[int, int], device: torch.device, *,
                  deep: bool) -> list[str]:
    """Kernels of the convolutions, or of those whose maps are smaller than the largest."""
    areas: dict[str, int] = {}

    def noting(name):
        return lambda _layer, _given, out: areas.update({f"{name}.weight": out[0, 0].numel()})

    hooks = [layer.register_forward_hook(noting(name)) for name, layer in net.named_modules()
             if isinstance(layer, torch.nn.Conv2d)]
    with torch.no_grad():
        net(torch.zeros(1, 3, *size, device=device))
    for hook in hooks:
        hook.remove()
    largest = max(areas.values())
    return [name for name, area in areas.items() if not deep or area < largest]


class _Purifier:
    """One-shot AWM, Algorithm 1, on one network."""

    def __init__(self, cell: Cell, compiled: bool):
        device = _device(cell)
        images, labels = images_of(cell)
        net: Any = network(cell)
        net = net.to(device, memory_format=torch.channels_last)
        self.cell = cell
        self.weights = {k: v.detach() for k, v in net.named_parameters()}
        self.rest = dict(net.named_buffers())
        chosen = _convolutions(net, images.shape[1:3], device, deep=cell.layers == "deep")
        self.masks = {k: torch.ones_like(self.weights[k], requires_grad=True) for k in chosen}
        self.x = torch.tensor(images.transpose(0, 3, 1, 2), device=device).contiguous(
            memory_format=torch.channels_last)
        self.y = torch.tensor(labels, device=device).long()
        self.optimiser = torch.optim.Adam(self.masks.values(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(
            self.optimiser, [max(1, cell.epochs // 2)], 0.1)

        def forward(weights, x):
            with _autocast(cell):
                return torch.func.functional_call(net, {**weights, **self.rest}, (x,)).float()

        self.forward = torch.compile(forward) if compiled else forward

    def masked(self) -> dict[str, torch.Tensor]:
        """The weights with their masks."""
        return {**self.weights, **{k: self.weights[k] * m for k, m in self.masks.items()}}

    def batch(self, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A minibatch without replacement."""
        picks = torch.randperm(len(self.x), device=self.x.device)[:self.cell.batch]
        return tuple(t[picks] for t in of)

    def trigger(self) -> torch.Tensor:
        """The inner phase."""
        with torch.no_grad():
            fixed = self.masked()
            own = torch.cat([self.forward(fixed, x).argmax(1)
                             for x in self.x.split(self.cell.batch)])
        delta = torch.zeros_like(self.x[:1], requires_grad=True)
        for _ in range(self.cell.steps):
            x, y = self.batch(self.x, own)
            loss = F.cross_entropy(self.forward(fixed, x + delta), y)
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = (delta + 10.0 * gradient).detach().requires_grad_()
        return (delta * torch.clamp(_TAU / (delta.abs().sum() + 1e-12), max=1)).detach()

    def epoch(self) -> None:
        """Both phases."""
        delta = self.trigger()
        for _ in range(self.cell.steps):
            x, y = self.batch(self.x, self.y)
            logits = self.forward(self.masked(), torch.cat([x, (x + delta).clamp(0, 1)]))
            clean, triggered = logits.split(len(x))
            loss = 0.9 * F.cross_entropy(clean, y) + 0.1 * F.cross_entropy(triggered, y)
            loss = loss + 1e-8 * sum(m.abs().sum() for m in self.masks.values())
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            with torch.no_grad():
                for m in self.masks.values():
                    m.clamp_(0, 1)
        self.schedule.step()

    def mask_mean(self) -> float:
        """Mean mask value, which both sides should bring to about the same."""
        return float(torch.cat([m.detach().ravel() for m in self.masks.values()]).mean())


def purify(cell: Cell, compiled: bool) -> Times:
    """Seconds of ``cell.seeds`` purifications, one after another, an epoch before them left out."""
    before, started = _peak(cell), time.perf_counter()
    warm = _Purifier(cell, compiled)
    warm.epoch()
    _wait(cell)
    first, means = time.perf_counter() - started, []
    started = time.perf_counter()
    for _ in range(cell.seeds):
        job = _Purifier(cell, compiled)
        job.forward = warm.forward
        for _ in range(cell.epochs):
            job.epoch()
        means.append(job.mask_mean())
    _wait(cell)
    return _times(cell, first, time.perf_counter() - started, before, float(np.mean(means)))


def _cropped(x: torch.Tensor, pad: int) -> torch.Tensor:
    """A random crop of each image, padded with zeros: ``[B, C, H, W]`` in channels-last order."""
    count, _, height, width = x.shape
    top, left = (torch.randint(2 * pad + 1, (count, 1), device=x.device) for _ in range(2))
    rows = top + torch.arange(height, device=x.device)
    columns = left + torch.arange(width, device=x.device)
    image = torch.arange(count, device=x.device)[:, None, None]
    padded = F.pad(x, (pad,) * 4).permute(0, 2, 3, 1)
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(cell: Cell, compiled: bool) -> Times:
    """Seconds of ``cell.epochs`` training epochs, the one before them left out."""
    device = _device(cell)
    images, labels = images_of(cell)
    before = _peak(cell)
    x_all = torch.tensor((255 * images).astype(np.uint8).transpose(0, 3, 1, 2), device=device
                         ).contiguous(memory_format=torch.channels_last)
    y_all = torch.tensor(labels, device=device).long()
    net: Any = network(cell)
    net = net.to(device, memory_format=torch.channels_last).train()
    forward = torch.compile(net) if compiled else net
    steps = len(x_all) // cell.batch
    kernels = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim == 1]
    optimiser = torch.optim.AdamW([{"params": kernels, "weight_decay": 5e-4},
                                   {"params": others, "weight_decay": 0.0}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps * (cell.epochs + 1))

    def epoch():
        order, losses = torch.randperm(len(x_all), device=device), []
        for picks in order[: steps * cell.batch].split(cell.batch):
            x = _cropped(x_all[picks].float() / 255, 4)
            with _autocast(cell):
                logits = forward(x)
            loss = F.cross_entropy(logits.float(), y_all[picks])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    started = time.perf_counter()
    epoch()
    _wait(cell)
    first, started = time.perf_counter() - started, time.perf_counter()
    for _ in range(cell.epochs):
        loss = epoch()
    _wait(cell)
    return _times(cell, first, time.perf_counter() - started, before, float(loss))


JOBS = {"purify": purify, "sweep": purify, "train": train}
