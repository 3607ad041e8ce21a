"""Adversarial Weight Masking and its parts, as registered defences; see `awm_purify.purify`."""

import jax
import numpy as np

from awm_jax.defences import awm_purify, awm_steps
from awm_jax.defences.awm_config import AWMConfig
from awm_jax.defences.base import HIDDEN_KERNELS, Defence
from awm_jax.types import Params

_REMIT = HIDDEN_KERNELS._replace(batch_stats=True)  # with ``recalibration``; ``repair`` moves all


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: AWMConfig) -> tuple[Params, dict]:
    """`awm_purify.run`, with the masks multiplied in."""
    settings = config.resolve(len(images), params.arch.image_shape)
    state, history = awm_purify.run(key, params, images, labels, settings)
    last = settings.epochs - 1 if settings.replay else 0
    # Where the suspect answers to a warp, nothing is added: the warp is what was found.
    warp = {} if state.warps is None else {"warp": state.warps[last]}
    return awm_steps.network(params, state), {
        "masks": state.masks, "history": history._asdict(), "trigger": state.triggers[last], **warp}


def _awm(name: str, variant: str, paper: str, ablation: bool = False) -> Defence:
    """One variant of `AWMConfig` as a defence of its own."""
    return Defence(name=name, method=_method, default=AWMConfig(variant=variant),
                   remit=_REMIT, paper=f"AWM paper, {paper}", ablation=ablation,
                   ended=lambda outcome: awm_purify.settled(
                       np.asarray(outcome.info["history"]["mask_mean"])),
                   fixed=() if name == "awm" else ("variant",))


awm = _awm("awm", "distilled", "Algorithm 1, with this project's changes")
awm_paper = _awm("awm_paper", "paper", "eq. 4.4, Algorithm 1 and appendix A")
awm_official = _awm("awm_official", "official", "its published code as run one-shot")
swm_atr = _awm("swm_atr", "no_shrink", "eq. 4.3 (Table 4's ANP+SWM+ATR)", ablation=True)
awm_no_clip = _awm("awm_no_clip", "no_clip", "eq. D.2", ablation=True)
awm_no_shrink = _awm("awm_no_shrink", "no_shrink", "eq. D.3", ablation=True)
awm_nc_ns = _awm("awm_nc_ns", "nc_ns", "eq. D.4", ablation=True)
awm_l2_reg = _awm("awm_l2_reg", "l2_reg", "eq. D.5", ablation=True)
awm_l2_reg_nc = _awm("awm_l2_reg_nc", "l2_reg_nc", "eq. D.6", ablation=True)
