"""Settings of Adversarial Weight Masking: the project's, the paper's, the published code's."""

import dataclasses
import math
from typing import Any

from awm_jax import validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Every constant of one run, resolved; hashable, so `jit` treats it as static.

    Args:
      epochs: alternations of the two phases.
      inner_steps: trigger steps an epoch.
      outer_steps: mask steps an epoch.
      batch_size: images a step.
      alpha: weight of the clean loss in [0, 1]; the triggered loss weighs ``1 - alpha``.
      gamma: weight of ``||m||_1``, >= 0.
      taus: L1 bounds of the trigger, taken in turn epoch by epoch, each > 0.
      inner_lr: step length of the trigger.
      outer_lr: Adam's rate for the masks.
      decay_epoch: from here on the rate is a tenth; ``epochs`` or more means never.
      steady: keep the full rate where the survey suspects an all-to-all backdoor or a warp.
      layers: what is masked: ``'deep'``, or as `awm_jax.masks.init` takes it.
      spare: masks of convolutions at the first resolution stay 1, unless the survey suspects an
        all-to-all backdoor.
      spared: set by `purify` once the survey has ruled that out: the gradients of these
        convolutions are then left out.
      objective: ``'labels'`` (cross-entropy) or ``'distil'`` (match the unmasked network).
      inner_target: the trigger moves predictions away from ``'labels'`` or from ``'own'`` ones.
      normalised: divide each trigger gradient by its L2 norm.
      sparse: nearest point of the L1 ball after every step, not one rescaling after the last.
      clamp_inner: clip ``x + delta`` to [0, 1] in the trigger phase.
      clamp_outer: clip it in the mask phase.
      augment: fresh crops (and flips) and MixUp/CutMix of every minibatch.
      flip: horizontal flips keep the label.
      replay: share of the images in a mask step that get an earlier epoch's trigger, in [0, 1].
      monotone: masks only fall, step by step.
      survey_steps: trigger steps of the survey in all (at least 10 a class); 0 for none.
      suspects: how many of the survey's most damaging triggers are replayed; the worst also starts
        the second epoch's search.
      pursuit: every second trigger goes for the survey's most damaging class, within this many
        times tau; 0 for none. Every one, where it suspects several triggers of that class.
      pursuit_start: the first epoch, counted from 0, that may do so.
      all_to_all_alpha: alpha where the survey suspects an all-to-all backdoor, which then is what
        every trigger goes for.
      several_alpha: alpha where it suspects several triggers of one class, or a large one.
      bound: the norm that ``taus`` bound: ``'l1'``, ``'l2'`` or ``'none'`` (no bound).
      l2_weight: coefficient of the trigger's L2 norm in what the trigger phase maximises.
      copies: fixed randomly cropped (and flipped) copies of each image added beforehand.
      recalibration: minibatches on which BatchNorm's statistics follow the masks, unless the survey
        suspects an all-to-all backdoor; 0 for never.
      repair: epochs, at the end, in which the masked network is distilled from the suspect one,
        where the survey suspects one small trigger; 0 for none. See `awm_jax.defences.awm_repair`.
    """

    epochs: int
    inner_steps: int
    outer_steps: int
    batch_size: int
    alpha: float
    gamma: float
    taus: tuple[float, ...]
    inner_lr: float
    outer_lr: float
    decay_epoch: int
    steady: bool
    layers: str | tuple[str, ...]
    spare: bool
    spared: bool
    objective: str
    inner_target: str
    normalised: bool
    sparse: bool
    clamp_inner: bool
    clamp_outer: bool
    augment: bool
    flip: bool
    replay: float
    monotone: bool
    survey_steps: int
    suspects: int
    pursuit: float
    pursuit_start: int
    all_to_all_alpha: float
    several_alpha: float
    bound: str
    l2_weight: float
    copies: int
    recalibration: int
    repair: int


_SHARED = {"gamma": 1e-8, "outer_lr": 0.01, "inner_lr": 10.0, "normalised": False,
           "sparse": False, "clamp_inner": False, "augment": False, "replay": 0.0,
           "steady": False, "layers": "conv", "spare": False, "monotone": False,
           "survey_steps": 0, "suspects": 0, "pursuit": 0.0, "pursuit_start": 0,
           "all_to_all_alpha": 0.0, "several_alpha": 0.0, "bound": "l1", "l2_weight": 0.0,
           "recalibration": 0}

_PAPER = {
    **_SHARED, "epochs": 100, "inner_steps": 10, "outer_steps": 10, "alpha": 0.9,
    "taus": (1000.0,), "objective": "labels", "inner_target": "labels", "clamp_outer": False,
}

# What each variant fixes; sizes that depend on the data are filled in by `AWMConfig.resolve`.
VARIANTS: dict[str, dict] = {
    "distilled": {
        **_SHARED, "epochs": 16, "inner_steps": 10, "outer_steps": 10, "alpha": 0.9,
        "taus": (50.0,), "inner_lr": 1.0, "objective": "distil",
        "inner_target": "own", "normalised": True, "sparse": True, "clamp_inner": True,
        "clamp_outer": True, "augment": True, "replay": 0.75, "steady": True, "spare": True,
        "monotone": True, "survey_steps": 400, "suspects": 4, "pursuit": 4.0,
        "pursuit_start": 3, "all_to_all_alpha": 0.5, "several_alpha": 0.8,
    },
    "paper": _PAPER,
    "official": {
        **_SHARED, "epochs": 20, "alpha": 0.99, "taus": (100.0,), "objective": "labels",
        "inner_target": "own", "clamp_outer": True,
    },
    "no_clip": {**_PAPER, "bound": "none"},
    "no_shrink": {**_PAPER, "gamma": 0.0},
    "nc_ns": {**_PAPER, "bound": "none", "gamma": 0.0},
    "l2_reg": {**_PAPER, "bound": "l2"},
    "l2_reg_nc": {**_PAPER, "bound": "none", "l2_weight": 1.0},
}

# Batches of 128 gained a quarter of a point for three times the time (docs/results.md).
_LARGEST_BATCH = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWMConfig:
    """How to run Adversarial Weight Masking; None takes the variant's own value.

    The variants:

    * ``'distilled'``, the default: the masked network is asked to give, on the augmented clean
      images with and without the trigger, the outputs that the suspect network gives without it.
      The trigger is found by normalised steps, each followed by projection onto the L1 ball, so it
      is sparse. A survey comes first: one trigger towards every class, of which the four that drive
      the network farthest are among the triggers from the start; every second epoch searches for
      the worst of these classes again, within four times the bound. Where the survey suspects an
      all-to-all backdoor instead, every epoch searches for that, and alpha falls to .5 unless it is
      given; where most answers follow a smooth warp of under a pixel (`awm_jax.warps`), every epoch
      searches for such warps. Where a class stands out on other pixels than its trigger's, too,
      it may have several triggers, of which the strongest alone would be erased, or a large one,
      which wants more weight: every epoch searches for that class, and alpha is .8 unless it is
      given. Two rules keep erased what was erased: three quarters of the images in a mask step
      carry an earlier trigger, and masks never rise. Convolutions at the first resolution are
      masked against an all-to-all backdoor only: their filters serve every class, and masking them
      against one target costs accuracy and erases little more. Naming ``layers`` masks just those.
      16 epochs; half of them in, Adam's rate falls to a tenth, but not against all-to-all or warps.
    * ``'paper'``: Algorithm 1 and appendix A: true labels in both phases, steps along the plain
      gradient, one rescaling to ``tau`` = 1000, no clipping of images, 100 epochs of 10 + 10 steps,
      the batch sizes of Table 7. (Algorithm 1 prints a minus before the trigger's gradient and a
      plus before the mask's; both are read as misprints.)
    * ``'official'``: the published code as its README runs it one-shot: the trigger moves the
      network away from its own predictions, images are clipped in the mask phase only, ``tau`` =
      100, ``alpha`` = .99, batches of 32, ``5 * (n // 32)`` steps a phase, 20 epochs, one rate.
    * ``'no_clip'``, ``'no_shrink'``, ``'nc_ns'``, ``'l2_reg'``, ``'l2_reg_nc'``: the paper's
      variant without the bound on the trigger (eq. D.2), without ``gamma`` (D.3, which is eq. 4.3),
      without both (D.4), with ``||d||_2 <= tau`` (D.5), and with ``||d||_2`` added to what the
      trigger maximises instead of a bound (D.6, its sign as printed: it rewards large triggers).
      D.5 prints the same ``tau``; 1000 bounds nothing there, since no trigger in [-1, 1] has an L2
      norm over 55.5 at 32x32x3.

    Args:
      variant: one of these names.
      epochs: alternations, >= 1.
      inner_steps: trigger steps an epoch, >= 1.
      outer_steps: mask steps an epoch, >= 1.
      batch_size: images a step, >= 1; never more than there are images unless they are augmented.
        By default Table 7's, of ``'distilled'`` at most 32.
      alpha: weight of the clean loss, in [0, 1]; beta is ``1 - alpha``.
      gamma: weight of the masks' L1 norm, >= 0.
      tau: L1 bound of the trigger for 32x32x3 images (or several, taken in turn), each > 0, in
        intensity summed over pixels and channels; scaled by the number of pixels for other sizes
        (by its root where the variant bounds the L2 norm).
      inner_lr: step length of the trigger, > 0.
      outer_lr: Adam's rate, > 0.
      replay: share of the images in a mask step that get an earlier epoch's trigger, in [0, 1].
      layers: ``'deep'`` (convolutions below the first resolution, as
        `awm_jax.models.deep_convolutions` lists them), ``'conv'``, ``'all'`` or a tuple of layer
        names (Table 9's VGG-i is ``('conv<i>',)``).
      l2_weight: coefficient of ``||d||_2`` in what the trigger phase maximises, any sign.
      flip: True if horizontal flips keep the label (CIFAR-10, not traffic signs or digits).
      copies: fixed augmented copies of each image added beforehand, >= 0 (the paper's one-shot
        CIFAR-10 runs use 9).
      repair: epochs, 10 say, at the end, in which the masked network is distilled from the suspect
        one on strongly changed clean images (`awm_jax.defences.awm_repair`), >= 0; with
        ``'distilled'`` and ``replay`` alone; by default 0. Where one small trigger is suspected, it
        gives back accuracy, and on some networks a little of the backdoor (docs/results.md).
      recalibration: minibatches, 10 say, on which BatchNorm's statistics follow the masks at the
        end, >= 0 (`awm_jax.defences.recalibrate`); by default 0. It gains accuracy where much was
        lost, and may bring some of the backdoor back (docs/results.md).

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> AWMConfig(variant='paper').resolve(43, (32, 32, 3)).batch_size
      16

    Reference: AWM paper, Algorithm 1, section 5 and appendix A.
    """

    variant: str = "distilled"
    epochs: int | None = None
    inner_steps: int | None = None
    outer_steps: int | None = None
    batch_size: int | None = None
    alpha: float | None = None
    gamma: float | None = None
    tau: float | tuple[float, ...] | None = None
    inner_lr: float | None = None
    outer_lr: float | None = None
    replay: float | None = None
    l2_weight: float | None = None
    layers: str | tuple[str, ...] | None = None
    flip: bool = False
    copies: int = 0
    recalibration: int | None = None
    repair: int = 0

    def __post_init__(self):
        """Checks every range at once, before any work starts."""
        for name in ("tau", "layers"):  # the record is a static argument of `jit`: hashable
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        validate.choice(VARIANTS, variant=self.variant)
        validate.boolean(flip=self.flip)
        if self.layers is not None:
            validate.layers(layers=self.layers)
        for name in ("epochs", "inner_steps", "outer_steps", "batch_size"):
            if getattr(self, name) is not None:
                validate.whole(1, **{name: getattr(self, name)})
        for name in ("inner_lr", "outer_lr"):
            if getattr(self, name) is not None:
                validate.positive(**{name: getattr(self, name)})
        if self.tau is not None and not _as_tuple(self.tau):
            raise ValueError("Expected tau to be a number > 0 or several, got none.")
        for tau in _as_tuple(self.tau):
            validate.positive(tau=tau)
        if self.alpha is not None:
            validate.between(0.0, 1.0, alpha=self.alpha)
        if self.replay is not None:
            validate.between(0.0, 1.0, replay=self.replay)
        if self.l2_weight is not None:
            validate.between(-math.inf, math.inf, l2_weight=self.l2_weight)
        if self.gamma is not None:
            validate.at_least(0.0, gamma=self.gamma)
        validate.whole(0, copies=self.copies, repair=self.repair)
        if self.recalibration is not None:
            validate.whole(0, recalibration=self.recalibration)
        if self.repair and (self.variant != "distilled" or self.replay == 0):
            raise ValueError(f"Expected repair={self.repair} with the variant 'distilled', whose "
                             f"survey it needs, and replay > 0; got {self.variant!r} and "
                             f"replay={self.replay}. Leave repair out, or these.")

    def resolve(self, num_images: int, image_shape: tuple[int, int, int]) -> Settings:
        """Fills in what the variant and the data leave open.

        Args:
          num_images: clean images at hand, >= 1.
          image_shape: ``(height, width, channels)``.

        Returns:
          `Settings`, every constant of the run.
        """
        values: dict[str, Any] = dict(VARIANTS[self.variant])
        for name in ("epochs", "inner_steps", "outer_steps", "alpha", "gamma", "inner_lr",
                     "outer_lr", "replay", "l2_weight", "layers", "recalibration"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        if self.layers is not None:
            values["spare"] = False
        if self.tau is not None:
            values["taus"] = _as_tuple(self.tau)
        if not values["replay"]:  # what the survey finds is used by replaying it
            values["survey_steps"] = values["suspects"] = 0
            values["pursuit"] = 0.0
        if self.alpha is not None:
            values["all_to_all_alpha"] = values["several_alpha"] = values["alpha"]
        height, width, _ = image_shape
        scale = (height * width / 1024) ** (0.5 if values["bound"] == "l2" else 1.0)
        values["taus"] = tuple(tau * scale for tau in values["taus"])
        total = num_images * (1 + self.copies)
        usual = 32 if self.variant == "official" else table_7_batch_size(num_images)
        batch_size = self.batch_size or (min(usual, _LARGEST_BATCH) if values["augment"] else usual)
        values["batch_size"] = batch_size if values["augment"] else min(batch_size, total)
        if self.variant == "official":
            steps = 5 * max(1, total // batch_size)
            values.setdefault("inner_steps", steps)
            values.setdefault("outer_steps", steps)
        decay = values["epochs"] if self.variant == "official" else max(1, values["epochs"] // 2)
        return Settings(**values, decay_epoch=decay, flip=self.flip, copies=self.copies,
                        spared=False, repair=self.repair)


def _as_tuple(tau: float | tuple[float, ...] | None) -> tuple[float, ...]:
    """No bound, one bound or several, as a tuple."""
    if tau is None:
        return ()
    return tau if isinstance(tau, tuple) else (tau,)


def table_7_batch_size(num_images: int) -> int:
    """Batch size for so many clean images: 16 one-shot, 32 for 100 and 200, 128 from 500 on.

    Example:
      >>> [table_7_batch_size(n) for n in (10, 100, 200, 500, 5000)]
      [16, 32, 32, 128, 128]

    Reference: AWM paper, Table 7.
    """
    return 16 if num_images < 100 else 32 if num_images < 500 else 128
