"""Erase backdoors from neural networks with almost no clean data.

    import awm_jax
    purified = awm_jax.purify(params, awm_jax.Batch(images, labels))
    purified.params, purified.status, purified.masks, purified.trigger
"""

from awm_jax import detection, formats
from awm_jax.defences.awm_config import AWMConfig
from awm_jax.defences.awm_purify import Purified, Status, purify
from awm_jax.types import Arch, Batch, Params

__all__ = ["AWMConfig", "Arch", "Batch", "Params", "Purified", "Status", "detection", "formats",
           "purify"]
__version__ = "0.1.0"
