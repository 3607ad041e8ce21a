"""What a defence is: a pure function of a key, a suspect network and clean data."""

import dataclasses
import enum
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import metrics, models, validate
from awm_jax.types import Arch, Batch, ForeignArch, Params, Weights


class Status(enum.IntEnum):
    """How a purification ended."""

    OK = 0
    NONFINITE = 1
    """Something became NaN or infinite; what is returned is from before that."""
    NOT_CONVERGED = 2
    """The masks still moved at the end: their mean by over 0.01 in the last tenth of the epochs."""
    CLEAN_ACCURACY_LOST = 3
    """The purified network disagrees with the suspect one on over a tenth of the given images."""
    STOPPED = 4
    """The caller ended the run before its first stretch of epochs was kept: nothing was changed."""

    @property
    def advice(self) -> str:
        """What to do about it, one line."""
        return {
            Status.OK: "nothing to do",
            Status.NONFINITE: "lower the learning rates, and check the network's weights",
            Status.NOT_CONVERGED: "run more epochs, or lower outer_lr",
            Status.CLEAN_ACCURACY_LOST: "give more clean images, or ask for a milder purification "
            "(for AWM: raise alpha or lower tau)",
            Status.STOPPED: "nothing was erased: give more clean images, or ask for a milder "
            "purification (for AWM: raise alpha or lower tau)",
        }[self]


class Outcome(NamedTuple):
    """What a defence makes of a network; a tree of arrays, so it can be jitted and vmapped.

    Args:
      params: the purified network; the suspect one where ``finite`` is false.
      info: what is only looked at: losses, masks, triggers, choices made.
      finite: scalar bool, whether everything stayed finite.
    """

    params: Params
    info: dict[str, Any]
    finite: jax.Array


class Result(NamedTuple):
    """What calling a `Defence` returns.

    Args:
      params: the purified network.
      info: as in `Outcome`, on the host.
      status: `Status`; ``status.advice`` says what to do.
    """

    params: Params
    info: dict[str, Any]
    status: Status


class Remit(NamedTuple):
    """Which numbers of a network a defence may change.

    Args:
      weights: ``(path, leaf) -> bool`` over slash-joined paths such as ``'bn1/scale'``.
      batch_stats: whether BatchNorm's running statistics may change.
      classifier: whether the weights of `awm_jax.models.classifier` may, whatever ``weights`` says;
        None for as it says.
    """

    weights: Callable[[str, jax.Array], bool]
    batch_stats: bool
    classifier: bool | None = None

    def allows(self, params: Params) -> Any:
        """Which weights of a network may change: a tree of its shape, of bools.

        Example:
          >>> from awm_jax.types import Arch
          >>> params = models.create(jax.random.key(0), Arch(name='small_vgg', num_classes=10))
          >>> HIDDEN_KERNELS.allows(params)['dense']
          {'bias': False, 'kernel': False}
        """
        last = None if self.classifier is None else models.classifier(params.arch)

        def allowed(path, leaf):
            return self.classifier if path.rpartition("/")[0] == last else self.weights(path, leaf)

        return map_weights(allowed, params.weights)


EVERYTHING = Remit(lambda path, leaf: True, True)
WEIGHTS = Remit(lambda path, leaf: True, False)
# Of the convolutions; all of these in a network without any.
HIDDEN_KERNELS = Remit(lambda path, leaf: path.endswith("kernel"), False, classifier=False)
CLASSIFIER = Remit(lambda path, leaf: False, False, classifier=True)


def _in_norm(path: str, leaf: jax.Array) -> bool:
    """Scale or bias of a normalisation layer, known by its name: bn1, norm2, BatchNorm_0."""
    layer, _, part = path.rpartition("/")
    name = layer.rpartition("/")[2].lower()
    return part == "scale" or (part == "bias" and ("bn" in name or "norm" in name))


NORMS = Remit(_in_norm, False)

_NEEDS = ("clean", "nothing", "training")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Defence:
    """A registered defence; call it as ``defence(params, batch)``.

    Args:
      name: a key of `awm_jax.defences.DEFENCES`.
      method: ``(key, params, images, labels, config) -> (params, info)``, pure and traceable.
      default: its settings unless told otherwise, an instance of a frozen dataclass.
      remit: what it may change in a network.
      paper: where it is described, and in which section or equation.
      needs: ``'clean'`` labelled images, ``'nothing'`` (data-free), or the whole poisoned
        ``'training'`` set in uint8.
      ablation: a method taken apart for study, not meant for use.
      fits: raises ValueError, saying what is missing, for an architecture it cannot work on.
      fixed: settings that make it this defence: another value of theirs is refused.
      ended: what else there is to say of a run that stayed finite and kept the images' classes.

    Example: see docs/adding_a_defence.md.
    """

    name: str
    method: Callable[..., tuple[Params, dict[str, Any]]]
    default: Any
    remit: Remit
    paper: str
    needs: str = "clean"
    ablation: bool = False
    fits: Callable[[Arch], Any] = lambda arch: None
    fixed: tuple[str, ...] = ()
    ended: Callable[[Outcome], Status] = lambda outcome: Status.OK

    def __post_init__(self):
        """Checks what can be checked without running."""
        validate.choice(_NEEDS, needs=self.needs)

    def Config(self, **settings: Any) -> Any:
        """Its settings, of which some are given: a record of the type of ``default``.

        Args:
          **settings: fields of that type; the others are as in ``default``.

        Returns:
          The record, which a call takes as ``config``.

        Raises:
          TypeError: no such field.
          ValueError: a value outside its range, or another one of a setting that is ``fixed``.

        Example: ``defences.ft(params, batch, config=defences.ft.Config(epochs=20))``.
        """
        config = dataclasses.replace(self.default, **settings)
        self._check_fixed(config)
        return config

    def _check_fixed(self, config: Any) -> None:
        """ValueError for settings that are another defence's."""
        for name in self.fixed:
            own, given = getattr(self.default, name), getattr(config, name)
            if given != own:
                raise ValueError(f"Expected {name}={own!r} of {self.name}, got {given!r}, which is "
                                 f"another defence. awm_jax.defences.{self.name}.Config(...) has "
                                 "the settings of this one.")

    def run(self, key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: Any) -> Outcome:
        """The whole defence as one traceable function: ``jit`` it, ``vmap`` it over keys.

        Args:
          key: PRNG key.
          params: the suspect network.
          images: ``[n, H, W, C]`` float32 in [0, 1] (uint8 where ``needs`` is ``'training'``).
          labels: ``[n]`` int32 in 0..c-1.
          config: of the type of ``default``; static under `jit`.

        Returns:
          `Outcome`. Where something is not finite, the suspect network itself comes back.

        Raises:
          ValueError: a network that it cannot work on, see `fits`.

        Example: `jax.vmap(lambda k: defence.run(k, params, images, labels, config))(keys)`.
        """
        self.fits(params.arch)
        found, info = self.method(key, params, images, labels, config)
        leaves = [leaf for leaf in jax.tree.leaves((found, info))
                  if jnp.issubdtype(leaf.dtype, jnp.floating)]
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), found, params)
        return Outcome(kept, info, finite)

    @functools.cached_property
    def _jitted(self) -> Callable[..., Outcome]:
        """One compilation for each network, number of images and config."""
        return jax.jit(self.run, static_argnames="config")

    def __call__(self, params: Params, batch: Batch | None = None, *,
                 key: jax.Array | int | None = None, config: Any = None) -> Result:
        """Purifies a network.

        Args:
          params: the suspect network.
          batch: clean images ``[n, H, W, C]`` float32 in [0, 1] and labels ``[n]``; for a defence
            that needs the training set, all of that, in uint8; a data-free one takes none.
          key: PRNG key, or a seed; the same key gives the same result.
          config: settings, of the type of ``default``: ``Config(...)`` makes them.

        Returns:
          `Result`.

        Raises:
          ValueError: a network that it cannot work on (`fits`), no data where some are needed,
            data that do not fit the network or lie outside [0, 1], NaN in images or weights.
          TypeError: network, images, labels or key of the wrong kind, or another defence's config.

        Warns (UserWarning) where the network gets half of the clean images or more wrong.
        """
        config = self.default if config is None else config
        if not isinstance(config, type(self.default)):
            raise TypeError(f"Expected config of type {type(self.default).__name__} for "
                            f"{self.name}, got {type(config).__name__}.")
        self._check_fixed(config)
        key = as_key(key)
        images, labels = self.checked(params, batch)
        if self.needs == "clean":
            warn_if_wrong(params, images, labels)
        outcome = self._jitted(key, params, images, labels, config)
        return self.conclude(params, images, outcome)

    def conclude(self, params: Params, images: jax.Array, outcome: Outcome) -> Result:
        """What a call returns, from what `run` does; its arguments too."""
        return Result(outcome.params, jax.device_get(outcome.info),
                      self._status(params, images, outcome))

    def checked(self, params: Params, batch: Batch | None) -> tuple[jax.Array, jax.Array]:
        """Images and labels as `run` takes them, once they and the weights are seen to be sound."""
        sound_network(params)
        if self.needs == "nothing":
            batch = None
        elif batch is None:
            raise ValueError(f"Expected a batch for {self.name}, which needs "
                             + ("clean images." if self.needs == "clean" else "the training set."))
        if batch is None:
            return jnp.zeros((0, *params.arch.image_shape)), jnp.zeros(0, jnp.int32)
        arch, batch = params.arch, as_batch(batch)
        images = np.asarray(batch.images)
        if self.needs == "training":
            validate.training_set(images, np.asarray(batch.labels), num_classes=arch.num_classes,
                                  image_shape=arch.image_shape)
            return jnp.asarray(images), jnp.asarray(batch.labels, jnp.int32)
        validate.labelled_images(images, batch.labels, num_classes=arch.num_classes,
                                 image_shape=arch.image_shape)
        return jnp.asarray(images, jnp.float32), jnp.asarray(batch.labels, jnp.int32)

    def _status(self, params: Params, images: jax.Array, outcome: Outcome) -> Status:
        """Reads the end of a run."""
        if not bool(outcome.finite):
            return Status.NONFINITE
        if self.needs == "clean" and agreement(params, outcome.params, images) < 0.9:
            return Status.CLEAN_ACCURACY_LOST
        return self.ended(outcome)


def sound_network(params: Any) -> None:
    """TypeError for what is no network, ValueError for one that cannot be, or holds NaN."""
    if not isinstance(params, Params):
        raise TypeError(f"Expected a network as awm_jax.Params, got {type(params).__name__}: "
                        "torch_compat.load and formats.read make one of a file, Params.from_flax "
                        "of a Flax module.")
    models.check(params.arch)
    finite_weights(params)


def as_key(key: Any) -> jax.Array:
    """A PRNG key: the one given, that of a seed, of seed 0 for None; TypeError for anything else.

    Example:
      >>> bool(as_key(3) == jax.random.key(3))
      True
    """
    if key is None or (isinstance(key, (int, np.integer)) and not isinstance(key, bool)):
        return jax.random.key(int(key or 0))
    if isinstance(key, jax.Array) and key.shape == () and (
            jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        return key
    if getattr(key, "dtype", None) == np.uint32 and key.shape == (2,):  # of jax.random.PRNGKey
        return jnp.asarray(key)
    raise TypeError(f"Expected key to be one PRNG key, such as jax.random.key(0), or a seed; got "
                    f"{key!r}.")


def as_batch(batch: Any) -> Batch:
    """A batch, also of a pair of images and labels; TypeError for what is neither."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return Batch(*batch)
    raise TypeError(f"Expected awm_jax.Batch(images, labels), got {type(batch).__name__}.")


def norms_needed(arch: Arch) -> None:
    """ValueError for a network without BatchNorm, `Defence.fits` of what prunes its channels."""
    if not models.norm_inputs(arch):
        more = (", or give the module a method norm_inputs() that returns {'norm': 'convolution'}"
                if isinstance(arch, ForeignArch) else "")
        raise ValueError(f"Expected a network with BatchNorm behind convolutions, {arch.name} has "
                         f"none. Choose another defence{more}.")


def finite_weights(params: Params) -> None:
    """ValueError if the network holds NaN or infinity."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise ValueError("Expected finite weights, found NaN or infinity in the network.")


def warn_if_wrong(params: Params, images: jax.Array, labels: jax.Array) -> None:
    """Warns where half of the images or more are misclassified: mostly preprocessing's fault."""
    right, count = int((metrics.predict(params, images) == np.asarray(labels)).sum()), len(labels)
    if count > 1 and 2 * right <= count:
        warnings.warn(
            f"The network gives {right} of {count} images their label. Were its images normalised "
            f"in training (params.arch.mean is {params.arch.mean}, params.arch.std "
            f"{params.arch.std}, which awm_jax.torch_compat.load takes), are labels and colours in "
            "its order? What is purified here is what it does on these images.",
            UserWarning, stacklevel=3)


def agreement(suspect: Params, purified: Params, images: jax.Array) -> float:
    """Share of images that both networks give the same class, in [0, 1]."""
    return float((metrics.predict(suspect, images) == metrics.predict(purified, images)).mean())


def map_weights(fun: Callable[[str, jax.Array], Any], weights: Weights) -> Any:
    """``fun(path, leaf)`` over a tree, with slash-joined paths.

    Example:
      >>> map_weights(lambda path, leaf: path, {'conv1': {'kernel': jnp.ones(1)}})
      {'conv1': {'kernel': 'conv1/kernel'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fun(jax.tree_util.keystr(path, simple=True, separator="/"), leaf),
        weights)


def by_path(tree: Any) -> dict[str, Any]:
    """A tree's leaves by slash-joined path.

    Example:
      >>> by_path({'bn1': {'scale': 1, 'bias': 2}})
      {'bn1/bias': 2, 'bn1/scale': 1}
    """
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
