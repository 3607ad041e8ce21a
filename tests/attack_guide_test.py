"""docs/adding_an_attack.md does what it says."""

import doctest
import pathlib
import re
import types

import jax
import numpy as np
import pytest

from awm_jax import attacks

GUIDE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "adding_an_attack.md"
TEXT = GUIDE.read_text()
SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def module():
    """The page's module, as if it were a file."""
    found = types.ModuleType("lower_edge_of_the_guide")
    exec(compile(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1], str(GUIDE), "exec"),
         found.__dict__)
    return found


def test_the_example_poisons_as_the_registered_ones_do(module, monkeypatch):
    monkeypatch.setitem(attacks.ATTACKS, "lower_edge", module.lower_edge)
    attack = attacks.make("lower_edge", jax.random.key(0), SHAPE, 4)
    images = np.full((20, *SHAPE), 0.75, np.float32)
    labels = np.arange(20) % 4
    found = attacks.poison(jax.random.key(1), attack, images, labels, 0.2)
    assert found.poisoned.sum() == 4 and (found.labels[found.poisoned] == 0).all()
    np.testing.assert_array_equal(found.images[~found.poisoned], images[~found.poisoned])
    np.testing.assert_allclose(found.images[found.poisoned][:, -2:], 1.0)  # clipped
    np.testing.assert_allclose(found.images[found.poisoned][:, :-2], 0.75)


def test_its_docstring_runs(module):
    tests = doctest.DocTestFinder().find(module.lower_edge, globs=vars(module))
    assert sum(len(test.examples) for test in tests) == 1
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.failures == 0


def test_the_sets_that_it_names_are_there():
    sets = re.findall(r"^\| [^|]*\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert set(sets) == {"ON_SURROGATE", "ON_TRAINING_SET", "IN_TRAINING", "_RATES"}
    assert all(hasattr(attacks, name) for name in sets)
