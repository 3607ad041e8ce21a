"""The min-max scan on a problem whose every step is known."""

import jax
import jax.numpy as jnp
import numpy as np

from awm_jax import bilevel


def test_steps_and_their_order_by_hand():
    """Ascent doubles 1 three times, settling adds 0.5, descent subtracts the adversary twice."""
    problem = bilevel.Problem(
        start=lambda key, epoch, outer: jnp.ones(()),
        ascend=lambda key, epoch, inner, outer: inner * 2,
        settle=lambda epoch, inner: inner + 0.5 + epoch,
        descend=lambda key, epoch, inner, outer: (outer - inner, outer),
    )
    outer, inner, info = bilevel.epoch(problem, jax.random.key(0), jnp.array(1), jnp.array(20.0),
                                       inner_steps=3, outer_steps=2)
    assert float(inner) == 9.5 and float(outer) == 1.0
    np.testing.assert_array_equal(info, [20.0, 10.5])


def test_every_step_has_its_own_key():
    def draw(key):
        return jax.random.uniform(key)

    problem = bilevel.Problem(
        start=lambda key, epoch, outer: jnp.zeros(()),
        ascend=lambda key, epoch, inner, outer: inner + draw(key),
        settle=lambda epoch, inner: inner,
        descend=lambda key, epoch, inner, outer: (outer, draw(key)),
    )
    _, inner, info = bilevel.epoch(problem, jax.random.key(0), jnp.array(0), jnp.zeros(()),
                                   inner_steps=4, outer_steps=4)
    assert len(set(np.asarray(info).tolist())) == 4
    assert not np.isclose(float(inner), 4 * float(info[0]))
