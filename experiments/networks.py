"""Backdoored networks: trained once, cached by configuration and seed, resumed when interrupted."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from awm_jax import attacks, checkpoint, data, training
from awm_jax.attacks import Attack
from awm_jax.data import Dataset
from awm_jax.progress import Progress, waiting
from awm_jax.types import Arch, Params
from experiments import presets

_VERSION = 2  # raise it when training or triggers change, so that stale networks are not reused


def directory() -> pathlib.Path:
    """Where networks and trained triggers are kept."""
    return data.cache_directory() / "networks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """Everything that decides a backdoored network.

    Args:
      dataset: name of the data set, as it calls itself.
      arch: name of the architecture.
      attack: name of the attack, or None for a clean network.
      rate: share of the training images that are poisoned, in (0, 1]; of the target class's where
        the attack is clean-label.
      epochs: training epochs.
      seed: seed of the trigger, the poisoned images and the training.
    """

    dataset: str
    arch: str
    attack: str | None
    rate: float
    epochs: int
    seed: int

    @property
    def kind(self) -> str | None:
        """The attack's name without the target that `scene.attack_of` may have added."""
        return self.attack and self.attack.partition("-")[0]

    @property
    def digest(self) -> str:
        """A name for the cache, the same for the same network."""
        fields = {"version": _VERSION, **dataclasses.asdict(self)}
        if self.kind in attacks.IN_TRAINING:
            fields["poisoned"] = "in every batch"
        text = json.dumps(fields, sort_keys=True)
        return f"{self.dataset}-{self.arch}-{self.attack or 'clean'}-" + hashlib.sha256(
            text.encode()).hexdigest()[:12]


def benign(spec: NetworkSpec, epochs: int) -> NetworkSpec:
    """The same network without a backdoor."""
    return dataclasses.replace(spec, attack=None, rate=0.0, epochs=epochs)


def make_attack(spec: NetworkSpec, dataset: Dataset, cache: pathlib.Path,
                target: int | None = None) -> Attack:
    """The attack of a spec.

    Triggers found by optimisation get their surrogate network first; those that are networks of
    their own are trained once, whatever network they are for, and kept beside the networks.
    """
    assert spec.attack is not None
    key = jax.random.key(spec.seed)
    make = functools.partial(attacks.make, spec.attack, key, dataset.train_images.shape[1:],
                             dataset.num_classes, target=target)
    if spec.attack in attacks.ON_TRAINING_SET:
        return kept_attack(cache / _trigger_name(spec, target), make(),
                           lambda: make(images=dataset.train_images))
    if spec.attack not in attacks.ON_SURROGATE:
        return make()
    surrogate = benign(spec, presets.of(dataset).surrogate_epochs)

    def optimised() -> Attack:
        params = get_network(surrogate, dataset, cache)
        count = len(dataset.train_images)
        picks = np.random.default_rng(spec.seed).choice(count, min(32, count), replace=False)
        images = dataset.train_images[picks].astype(np.float32) / 255.0
        return make(params=params, images=images)

    if spec.attack in ("clb", "multi"):  # more than a trigger of fixed shape
        return optimised()
    return kept_attack(cache / _trigger_name(spec, target, surrogate.digest), make(), optimised)


def _trigger_name(spec: NetworkSpec, target: int | None, surrogate: str = "") -> str:
    """A name for the cache, the same for the same trigger: how it is used does not matter."""
    # No field for a surrogate where there is none: triggers kept before it counted are found still.
    fields = [_VERSION, spec.dataset, spec.attack, target, spec.seed, *([surrogate] if surrogate
                                                                        else [])]
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:12]
    return f"{spec.dataset}-{spec.attack}-trigger-{digest}"


def kept_attack(folder: pathlib.Path, untrained: Attack, train: Callable[[], Attack]) -> Attack:
    """An attack whose trigger is trained: from the cache, or trained now and kept there.

    Args:
      folder: its checkpoint.
      untrained: the same attack before training; its arrays have the shapes of the trained ones.
      train: gives the trained one.

    Returns:
      `Attack`.
    """
    def arrays(attack: Attack) -> dict:
        found = {name: getattr(attack, name) for name in ("trigger", "in_training")}
        return {name: value for name, value in found.items() if value is not None}

    if not checkpoint.exists(folder):
        with waiting(f"training the trigger {folder.name}"):
            trained = jax.device_get(arrays(train()))
        if not checkpoint.exists(folder):  # another process was at it, too
            checkpoint.save_tree(folder, trained)
    like = arrays(untrained)
    leaves = jax.tree.leaves(checkpoint.load_tree(folder, like))
    on_device = jax.tree.unflatten(jax.tree.structure(like), map(jax.numpy.asarray, leaves))
    return dataclasses.replace(untrained, **on_device)


def training_set(spec: NetworkSpec, dataset: Dataset,
                 attack: Attack | None) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels that a spec's network is trained on, the poisoned ones among them.

    Of an attack that poisons every batch anew, one draw for the whole set, by its final trigger.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if attack is not None:
        key = jax.random.split(jax.random.key(spec.seed))[0]
        images, labels, *_ = attacks.poison(key, attack, images, labels, spec.rate)
    return np.asarray(images), np.asarray(labels)


def get_network(spec: NetworkSpec, dataset: Dataset, cache: pathlib.Path,
                attack: Attack | None = None) -> Params:
    """The network of a spec, from the cache or trained now.

    Args:
      spec: what to train.
      dataset: its data.
      cache: directory of networks.
      attack: as `make_attack` gives it; needed when ``spec.attack`` is set.

    Returns:
      `Params`.
    """
    folder = cache / spec.digest
    if checkpoint.exists(folder / "network"):
        return checkpoint.load(folder / "network")[0]
    preset = presets.of(dataset)
    config = training.TrainConfig(epochs=spec.epochs, batch_size=preset.batch_size,
                                  peak_lr=preset.peak_lr, crop=preset.crop, flip=dataset.flip)
    attacker: attacks.InBatches | None = None
    begin: attacks.State | tuple = ()
    if attack is not None and attack.every_batch:
        attacker = attacks.in_batches(attack, spec.rate, config.batch_size)
        begin = attacks.State(attack.trigger, attack.learner)
    images, labels = training_set(spec, dataset, attack if attacker is None else None)
    key_train = jax.random.split(jax.random.key(spec.seed))[1]
    arch = Arch(name=spec.arch, num_classes=dataset.num_classes,
                image_shape=tuple(images.shape[1:]))
    key_init = jax.random.split(key_train)[0]
    like = training.init(key_init, arch, config, len(images), begin)
    state = None
    if checkpoint.exists(folder / "state"):
        state = checkpoint.load_tree(folder / "state", like)
    begun, started = 0 if state is None else int(state.epoch), time.monotonic()
    progress = Progress(f"training {spec.digest}", config.epochs, begun)

    def on_epoch(done, total, state, loss):
        progress.update(done, loss=loss)
        if done < total:
            checkpoint.save_tree(folder / "state", jax.device_get(state), overwrite=True)
        elif attacker is not None and attacker.learn is not None:
            # Before the network, whose being there says that all is.
            checkpoint.save_tree(folder / "trigger", jax.device_get(state.attacker.trigger),
                                 overwrite=True)

    params = training.train(key_train, images, labels, arch, config, state=state,
                            attacker=attacker, attacker_state=begin, on_epoch=on_epoch)
    if checkpoint.exists(folder / "network"):  # another process was at it too, and was faster
        return checkpoint.load(folder / "network")[0]
    told = dataclasses.asdict(spec)
    if begun < config.epochs:
        told["epoch_seconds"] = (time.monotonic() - started) / (config.epochs - begun)
    checkpoint.save(folder / "network", params, told)
    return params


def epoch_seconds(dataset: str, arch: str, cache: pathlib.Path) -> float | None:
    """How long an epoch of networks like these took here, compiling and saving included.

    Args:
      dataset: a ``--dataset``.
      arch: an ``--arch``.
      cache: directory of networks.

    Returns:
      The median of those in the cache, in seconds, > 0; None if none says it.

    Example:
      >>> epoch_seconds('digits', 'small_vgg', pathlib.Path('nowhere')) is None
      True
    """
    kept = (checkpoint.metadata(path)["metadata"].get("epoch_seconds")
            for path in cache.glob(f"{dataset}*-{arch}-*/network") if checkpoint.exists(path))
    found = [seconds for seconds in kept if seconds is not None]
    return float(np.median(found)) if found else None


def learnt(spec: NetworkSpec, dataset: Dataset, cache: pathlib.Path, attack: Attack) -> Attack:
    """The attack with the trigger that its network's training ended with, where that learns one.

    Args:
      spec, dataset, cache, attack: as `get_network`, which is called if it was not before.

    Returns:
      `Attack`, the one given where its trigger is fixed.
    """
    if attack.learn is None:
        return attack
    get_network(spec, dataset, cache, attack)
    return dataclasses.replace(attack, trigger=checkpoint.load_tree(
        cache / spec.digest / "trigger", attack.trigger))
