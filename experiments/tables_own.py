"""This project's own table: every defence against every attack, wherever a paper has it or not."""

from awm_jax.attacks import ATTACKS
from awm_jax.defences import DEFENCES
from experiments.cells import ONE, Column, Table

# What does not look at the clean images is run once, not once for each number of them.
_COLUMNS = tuple(Column(name, name, samples=() if defence.needs == "clean" else (ONE,))
                 for name, defence in DEFENCES.items())

# The clean-label attacks poison images of their target alone: class 0, their default, has 210 of
# GTSRB's 39,209, from which SIG is not learnt; class 2 has 2,250 (docs/attacks.md).
_NETWORKS = {attack: ("--target", "2") for attack in ("sig", "clb")}

TABLES = {
    "defences": Table("Every defence against every attack: GTSRB, small VGG", "gtsrb", "small_vgg",
                      tuple(ATTACKS), (ONE, 500), _COLUMNS, {}, {},
                      "Every defence with its default settings (its paper's, where one is known, "
                      "but for FT-SAM's epochs: 100 instead of 50). "
                      "AWM's were developed on other networks with such triggers; the others are "
                      "untuned.",
                      ("acc", "asr", "der"), networks=_NETWORKS),
}
