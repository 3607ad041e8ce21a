"""Defences: clean data and a suspect network in, a purified network out.

Each one is called alike: ``awm_jax.defences.ft(params, batch)`` gives a `Result`. `DEFENCES` lists
them by name.
"""

from awm_jax.defences.abl import abl
from awm_jax.defences.ac import ac
from awm_jax.defences.anp import anp
from awm_jax.defences.awm import (
    awm,
    awm_l2_reg,
    awm_l2_reg_nc,
    awm_nc_ns,
    awm_no_clip,
    awm_no_shrink,
    awm_official,
    awm_paper,
    swm_atr,
)
from awm_jax.defences.awm_config import AWMConfig
from awm_jax.defences.awm_purify import Purified, purify
from awm_jax.defences.base import Defence, Outcome, Result, Status
from awm_jax.defences.clp import clp
from awm_jax.defences.fine_prune import fp
from awm_jax.defences.fine_tune import ft
from awm_jax.defences.fst import fst
from awm_jax.defences.ft_sam import ft_sam
from awm_jax.defences.ibau import ibau, ibau_official
from awm_jax.defences.mcr import mcr
from awm_jax.defences.nad import nad
from awm_jax.defences.neural_cleanse import nc
from awm_jax.defences.nft import nft
from awm_jax.defences.ngd import ngd
from awm_jax.defences.rnp import rnp
from awm_jax.defences.sau import sau
from awm_jax.defences.swm import swm
from awm_jax.defences.weight_norm import weight_norm

DEFENCES: dict[str, Defence] = {defence.name: defence for defence in (
    awm,
    awm_paper,
    awm_official,
    swm_atr,
    awm_no_clip,
    awm_no_shrink,
    awm_nc_ns,
    awm_l2_reg,
    awm_l2_reg_nc,
    ft,
    anp,
    swm,
    ft_sam,
    fst,
    mcr,
    ngd,
    weight_norm,
    ibau,
    ibau_official,
    ac,
    abl,
    clp,
    fp,
    nad,
    nc,
    nft,
    rnp,
    sau,
)}

__all__ = [
    "DEFENCES",
    "AWMConfig",
    "Defence",
    "Outcome",
    "Purified",
    "Result",
    "Status",
    "abl",
    "ac",
    "anp",
    "awm",
    "awm_l2_reg",
    "awm_l2_reg_nc",
    "awm_nc_ns",
    "awm_no_clip",
    "awm_no_shrink",
    "awm_official",
    "awm_paper",
    "clp",
    "fp",
    "fst",
    "ft",
    "ft_sam",
    "ibau",
    "ibau_official",
    "mcr",
    "nad",
    "nc",
    "nft",
    "ngd",
    "purify",
    "rnp",
    "sau",
    "swm",
    "swm_atr",
    "weight_norm",
]
