"""Defences: clean data and a suspect network in, a purified network out."""

from awm_jax.defences.awm import Purified, Status, purify
from awm_jax.defences.awm_config import AWMConfig

__all__ = ["AWMConfig", "Purified", "Status", "purify"]
