"""What `purify` shows while it runs, where it is asked to."""

import re

import jax
import numpy as np

import awm_jax

QUICK = {"epochs": 4, "inner_steps": 2, "outer_steps": 2, "batch_size": 4, "tau": 100.0}


def _purify(tiny, small_batch, **options):
    return awm_jax.purify(tiny, small_batch, config=awm_jax.AWMConfig(**QUICK), every=2, **options)


def test_figures_where_asked_and_silence_otherwise(tiny, small_batch, capsys):
    silent = _purify(tiny, small_batch)
    assert capsys.readouterr() == ("", "")
    seen = []
    shown = _purify(tiny, small_batch, progress=True,
                    on_epochs=lambda *args: seen.append(args[0]))
    said = capsys.readouterr().out
    assert "purifying: 0/4" in said and seen == [2, 4]
    last = re.search(r"purifying: 4/4 clean_loss=(\S+) trigger_loss=(\S+) mask_mean=(\S+)", said)
    for text, name in zip(last.groups(), ("clean_loss", "trigger_loss", "mask_mean"), strict=True):
        np.testing.assert_allclose(float(text), shown.history[name][-1], rtol=6e-3)
    for a, b in zip(jax.tree.leaves(silent.masks), jax.tree.leaves(shown.masks), strict=True):
        np.testing.assert_array_equal(a, b)


def test_who_watches_still_ends_the_run(tiny, small_batch, capsys):
    found = _purify(tiny, small_batch, progress=True, on_epochs=lambda done, *_: done == 4)
    assert len(found.history["mask_mean"]) == 2
    assert "purifying: 4/4" in capsys.readouterr().out


def test_a_repair_is_told(tiny, small_batch, capsys, monkeypatch):
    """It runs as one program: only that it does, and how long, can be told."""
    told = []
    waiting = awm_jax.defences.awm_purify.waiting
    monkeypatch.setattr(awm_jax.defences.awm_purify, "waiting",
                        lambda what: told.append(what) or waiting(what))
    config = awm_jax.AWMConfig(**QUICK, repair=1)
    found = awm_jax.purify(tiny, small_batch, config=config, every=2, progress=True)
    assert found.survey.small  # else there is no repair
    assert told == ["looking for triggers", "repairing"]
