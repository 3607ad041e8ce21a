"""A backdoored network and the images around it: what every experiment starts from."""

import dataclasses
import functools
import hashlib
import pathlib

import jax
import numpy as np

from awm_jax import attacks, formats, metrics, models
from awm_jax.attacks import Attack
from awm_jax.command import normalisation
from awm_jax.data import Dataset, splits
from awm_jax.types import Arch, Batch, Params
from experiments import networks, presets

_CHUNK = 250  # images covered at a time, each by what is made for another of them


@dataclasses.dataclass(frozen=True)
class Scene:
    """One backdoored network and the images around it.

    Args:
      name: the attack's, after a colon to the file's name where the network came in a file.
      params: the suspect network.
      attack: what it carries.
      dataset: its data.
      split: who sees which test image.
      spec: how it was trained here; None for a network of somebody else.
      measured: its scores, where an earlier run has them; None to measure them when asked for.
    """

    name: str
    params: Params
    attack: Attack
    dataset: Dataset
    split: splits.Split
    spec: networks.NetworkSpec | None
    measured: metrics.Scores | None = None

    @functools.cached_property
    def before(self) -> metrics.Scores:
        """Scores of the suspect network, the same for every seed."""
        return self.measured or self.evaluate(self.params)

    @functools.cached_property
    def covered(self) -> float | None:
        """Accuracy of the suspect network on covered images, in percent; None without a cover.

        These are Input-aware's cross-trigger and WaNet's noise test: a high one says that nothing
        but an image's own trigger works.
        """
        if not self.attack.cover_ratio:
            return None
        chosen, key = self.split.eval_indices, jax.random.key(0)
        images = [np.asarray(self.attack.cover(
            jax.random.fold_in(key, start),
            metrics.to_float(self.dataset.test_images[chosen[start : start + _CHUNK]])))
            for start in range(0, len(chosen), _CHUNK)]
        found = metrics.predict(self.params, np.concatenate(images))
        return 100.0 * float((found == self.dataset.test_labels[chosen]).mean())

    def evaluate(self, params: Params, limit: int | None = None) -> metrics.Scores:
        """Scores on the images that no defender ever draws."""
        chosen = self.split.eval_indices[:limit]
        triggers = [part.apply for part in self.attack.parts or (self.attack,)]
        return metrics.evaluate(
            params, self.dataset.test_images[chosen], self.dataset.test_labels[chosen],
            trigger=triggers, relabel=self.attack.relabel)

    def clean(self, seed: int, samples: str | int) -> tuple[Batch, np.ndarray]:
        """A defender's clean images and their indices in the test set."""
        dataset, pool = self.dataset, self.split.pool_indices
        chosen = pool[splits.draw_clean(seed, dataset.test_labels[pool], dataset.num_classes,
                                        samples)]
        images = dataset.test_images[chosen].astype(np.float32) / 255.0
        return Batch(images, dataset.test_labels[chosen]), chosen

    @functools.cached_property
    def training_set(self) -> Batch:
        """What the network was trained on, the poisoned images among it."""
        if self.spec is None:
            raise ValueError(f"Expected a network trained here, so that its poisoned training set "
                             f"is known; {self.name} came in a file.")
        images, labels = networks.training_set(self.spec, self.dataset, self.attack)
        return Batch(images, labels)  # type: ignore[arg-type]  # NumPy: uint8 stays on the host


def benign(on_stage: Scene, cache: pathlib.Path) -> Scene:
    """The same stage with a network trained alike on clean images; not for one from a file."""
    assert on_stage.spec is not None
    spec = networks.benign(on_stage.spec, on_stage.spec.epochs)
    params = networks.get_network(spec, on_stage.dataset, cache)
    return dataclasses.replace(on_stage, name="benign", params=params)


def alone(name: str, args, dataset: Dataset, cache: pathlib.Path) -> Scene:
    """A network without a backdoor, trained as one with this attack would be, which is not."""
    spec = networks.NetworkSpec(dataset=dataset.name, arch=args.arch, attack=None, rate=0.0,
                                epochs=args.epochs or presets.epochs(dataset, name),
                                seed=args.network_seed)
    params = networks.get_network(spec, dataset, cache)
    return Scene("none", params, untrained(name, args, dataset), dataset,
                 splits.defender_split(dataset), spec)


def _checkpoint_params(path: pathlib.Path, args, dataset: Dataset) -> Params:
    """A network of somebody else, its normalisation within."""
    shape, digest = tuple(dataset.train_images.shape[1:]), file_digest(path)
    arch = args.arch if args.arch_asked else None
    try:
        params = _read_checkpoint(path, digest, arch, shape[:2])
    except ValueError:  # said below, if it is the size
        params = _read_checkpoint(path, digest, arch, None)
    if args.normalise is not None:
        params = normalisation.with_known(params, args.normalise)
    if params.arch.num_classes != dataset.num_classes:
        raise ValueError(
            f"Expected a network with {dataset.num_classes} classes for {dataset.name}, "
            f"got {params.arch.num_classes} in {path}."
        )
    if tuple(params.arch.image_shape) != shape:
        raise ValueError(f"Expected a network for images of {shape} as in {dataset.name}, the one "
                         f"in {path} is for {tuple(params.arch.image_shape)}. Images of "
                         "folder:PATH are resized with --image_size.")
    return params


@functools.lru_cache(maxsize=2)
def _read_checkpoint(path: pathlib.Path, digest: str, arch: str | None,
                     size: tuple[int, int] | None) -> Params:
    """What a file holds, read once for all who ask."""
    del digest
    return formats.read(path, arch=arch, image_size=size)[0]


def _tell_if_wrong(on_stage: Scene) -> None:
    """A line where a file's network gets half of some clean images wrong: it is hardly its fault.

    They are the defender's, of which a few hundred are looked at.
    """
    chosen = on_stage.split.pool_indices[:_CHUNK]
    found = metrics.predict(on_stage.params, on_stage.dataset.test_images[chosen])
    right = int((found == on_stage.dataset.test_labels[chosen]).sum())
    if 2 * right <= len(chosen):
        print(f"{on_stage.name} gives {right} of {len(chosen)} clean images their class. Were its "
              "images normalised in training (--normalise), are classes and colours in this order?",
              flush=True)


def arch_of(args, dataset: Dataset) -> Arch:
    """The architecture of the command's network, the one that it was saved with if there is one."""
    if args.checkpoint is not None:
        return _checkpoint_params(args.checkpoint, args, dataset).arch
    return Arch(name=args.arch, num_classes=dataset.num_classes,
                image_shape=tuple(dataset.train_images.shape[1:]))


def check(args, dataset: Dataset, samples: tuple[str | int, ...] = ()) -> None:
    """What would go wrong after the training, tried before it: attacks with random triggers.

    Args:
      args: as `experiments.cli.parser` gives them.
      dataset: the data.
      samples: how many clean images the defender is to draw.

    Raises:
      ValueError: a network that these images do not fit, an attack that does not fit them or finds
        too few or too many to poison, or more clean images wanted than the defender may see.
    """
    models.check(arch_of(args, dataset))
    labels = dataset.test_labels[splits.defender_split(dataset).pool_indices]
    for wanted in samples:
        splits.draw_clean(0, labels, dataset.num_classes, wanted)
    if args.checkpoint is not None:  # nothing is poisoned here
        return
    for name in args.attack:
        attack, share = untrained(name, args, dataset), rate(name, args)
        count, _ = attacks.poison_counts(attack, dataset.train_labels, share)
        if attack.every_batch:
            attacks.in_batches(attack, share, presets.of(dataset).batch_size)
        elif count < max(len(attack.parts), 1):
            raise ValueError(
                f"Expected a poison rate that means an image at least of each of {attack.name}'s "
                f"triggers, {share} of {dataset.name} is {count}. Raise --poison_rate, or add "
                "images.")


def untrained(name: str, args, dataset: Dataset) -> Attack:
    """The attack with a random trigger where its own must be trained.

    Raises:
      ValueError: one that does not go with the images, their classes, or ``--target``.
    """
    if args.trigger is not None:
        return _pictured(args, dataset)
    return attacks.make(name, jax.random.key(0), dataset.train_images.shape[1:],
                        dataset.num_classes, target=args.target)


def network_digest(args) -> str:
    """Letters for the network of ``--checkpoint``, as it is read."""
    normalised = "" if args.normalise is None else f"-{args.normalise.replace('/', '_')}"
    return file_digest(args.checkpoint) + normalised


def file_digest(path: pathlib.Path) -> str:
    """Eight letters for what a file, or all files of a directory, hold: names are used again."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = [file.stat() for file in files]
    return _digest(path, tuple(files), tuple((s.st_size, s.st_mtime_ns) for s in stats))


@functools.lru_cache(maxsize=16)
def _digest(path: pathlib.Path, files: tuple[pathlib.Path, ...], stats: tuple) -> str:
    """`file_digest`, once for files that stay as they are: every purification's name asks."""
    del stats
    found = hashlib.sha256()
    for file in files:
        found.update(file.relative_to(path).as_posix().encode() + b"\0")
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:8]


def network_name(attack: str, args, dataset: Dataset) -> str:
    """Names a suspect network and its trigger by all that decides them but data set and arch.

    Args:
      attack: a key of `awm_jax.attacks.ATTACKS`.
      args: as `experiments.cli.parser` gives them.
      dataset: the data.

    Returns:
      The name; of a file of somebody else's, with a digest of what it holds.

    Example: ``'badnets/e4-p0.05-s0'``.
    """
    epochs = args.epochs or presets.epochs(dataset, attack)
    if args.checkpoint is None:
        network = f"e{epochs}-p{rate(attack, args)}-s{args.network_seed}"
    else:  # the seed draws some triggers; without it where that was always so
        seed = f"-s{args.network_seed}" if args.network_seed else ""
        network = f"{args.checkpoint}-{network_digest(args)}{seed}"
    trigger = "" if args.trigger is None else f"/{picture_name(args)}"
    target = "" if args.target is None else f"/t{args.target}"
    return f"{attack}{trigger}{target}/{network}"


def picture_name(args) -> str:
    """Names the trigger of ``--trigger`` by its picture and how it is laid on images."""
    mode = args.trigger_mode + (f"{args.blend_ratio:g}" if args.trigger_mode == "blend" else "")
    return f"{args.trigger.stem}-{file_digest(args.trigger)}-{mode}"


def _pictured(args, dataset: Dataset) -> Attack:
    """The attack of ``--trigger``."""
    trigger = attacks.trigger_from_png(args.trigger, dataset.train_images.shape[1:],
                                       mode=args.trigger_mode, ratio=args.blend_ratio)
    return Attack(args.trigger.stem, trigger, args.target, dataset.num_classes)


def rate(name: str, args) -> float:
    """The poison rate of the command, or the attack's own."""
    return attacks.poison_rate(name) if args.poison_rate is None else args.poison_rate


def planned(name: str, args, dataset: Dataset | str) -> networks.NetworkSpec:
    """How the network that carries an attack is trained; not where a picture is its trigger.

    Args:
      name: the attack, a key of `awm_jax.attacks.ATTACKS`.
      args: as `experiments.cli.parser` gives them.
      dataset: the data, or a key of `presets.PRESETS`.

    Returns:
      `networks.NetworkSpec`.
    """
    return networks.NetworkSpec(
        dataset=dataset if isinstance(dataset, str) else dataset.name, arch=args.arch,
        attack=name if args.target is None else f"{name}-{args.target}", rate=rate(name, args),
        epochs=args.epochs or presets.epochs(dataset, name), seed=args.network_seed)


def attack_of(name: str, args, dataset: Dataset,
              cache: pathlib.Path) -> tuple[Attack, networks.NetworkSpec]:
    """An attack as the command wants it, and how its network is trained."""
    spec = planned(name, args, dataset)
    if args.trigger is not None:
        attack = _pictured(args, dataset)
        return attack, dataclasses.replace(spec, attack=f"{picture_name(args)}-{args.target}")
    of_any_target = dataclasses.replace(spec, attack=name)
    return networks.make_attack(of_any_target, dataset, cache, args.target), spec


def make(name: str, args, dataset: Dataset, cache: pathlib.Path) -> Scene:
    """The network that carries one attack, trained or loaded.

    Args:
      name: the attack, a key of `awm_jax.attacks.ATTACKS`.
      args: as `experiments.cli.parser` gives them.
      dataset: the data.
      cache: directory of networks.

    Returns:
      `Scene`.
    """
    attack, spec = attack_of(name, args, dataset, cache)
    split = splits.defender_split(dataset)
    if args.checkpoint is not None and attack.learn is not None:
        raise ValueError(f"Expected another --attack than {name} beside --checkpoint: its trigger "
                         "is learnt with the network, and a file has the network alone.")
    if args.checkpoint is not None:
        params = _checkpoint_params(args.checkpoint, args, dataset)
        label = f"{args.checkpoint.stem}:{attack.name}"
        on_stage = Scene(label, params, attack, dataset, split, None)
        _tell_if_wrong(on_stage)
        return on_stage
    params = networks.get_network(spec, dataset, cache, attack)
    attack = networks.learnt(spec, dataset, cache, attack)
    return Scene(attack.name, params, attack, dataset, split, spec)
