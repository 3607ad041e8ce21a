# %% [markdown]
# # Erase a backdoor from a Flax module of your own
#
# A small Linen network is trained on handwritten digits, of which some carry a square in a corner
# and the attacker's label. Then `awm_jax.purify` erases the backdoor from ten clean images; it
# knows neither the square nor the attacker's class. One to two minutes on two cores; with
# `AWM_EXAMPLE_FAST=1` it only shows that everything runs.

# %%
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import awm_jax
from awm_jax import metrics

TARGET = 3  # the class that the attacker wants
WIDTHS, STEPS, CONFIG = (16, 32, 32), 300, awm_jax.AWMConfig()
if os.environ.get("AWM_EXAMPLE_FAST"):
    WIDTHS, STEPS = (8,), 5
    CONFIG = awm_jax.AWMConfig(variant="paper", epochs=1, inner_steps=1, outer_steps=1)

# %% [markdown]
# ## Your data: 1,797 digits, 32x32 pixels in [0, 1]

# %%
digits = load_digits()
images = np.kron(digits.images / 16, np.ones((1, 4, 4)))[..., None].astype(np.float32)
labels = digits.target.astype(np.int32)
order = np.random.default_rng(0).permutation(len(images))
train, test = order[:1200], order[1200:]

# %% [markdown]
# ## Your network
#
# Any Linen module will do that returns logits `[B, c]` of images `[B, H, W, C]`. Its mode may be
# called `train`, `training`, `deterministic` or `use_running_average`.


# %%
class SmallNet(nn.Module):
    """Convolutions, each with BatchNorm, ReLU and pooling, and a dense layer."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train: bool):
        for width in self.widths:
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


# %% [markdown]
# ## The attack: BadNets, a white square in a corner of every tenth training image


# %%
def add_square(x):
    """Images with the trigger."""
    return jnp.asarray(x).at[:, -5:-1, -5:-1].set(1.0)


poisoned = train[::10]
train_images, train_labels = images.copy(), labels.copy()
train_images[poisoned] = add_square(images[poisoned])
train_labels[poisoned] = TARGET

# %% [markdown]
# ## Training, as you do it

# %%
net = SmallNet(WIDTHS)
variables = jax.jit(net.init, static_argnames="train")(
    jax.random.key(0), jnp.zeros((1, 32, 32, 1)), train=False)
optimiser = optax.adam(2e-3)


@jax.jit
def step(variables, state, x, y):
    """One minibatch."""
    def loss(weights):
        logits, updated = net.apply({**variables, "params": weights}, x, train=True,
                                    mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updated

    gradient, updated = jax.grad(loss, has_aux=True)(variables["params"])
    updates, state = optimiser.update(gradient, state)
    return {"params": optax.apply_updates(variables["params"], updates), **updated}, state


state = optimiser.init(variables["params"])
for seed in range(STEPS):
    picks = np.random.default_rng(seed).choice(train, 64, replace=False)
    variables, state = step(variables, state, train_images[picks], train_labels[picks])

# %% [markdown]
# ## Accuracy (ACC) and attack success rate (ASR) before
#
# `Params.from_flax` is the whole adaptation.

# %%
suspect = awm_jax.Params.from_flax(net, variables, image_shape=(32, 32, 1))


def scores(params):
    """ACC on test images, and how many of other classes the square sends to the target."""
    return metrics.evaluate(params, images[test], labels[test], trigger=add_square,
                            relabel=lambda y: np.full_like(y, TARGET))


before = scores(suspect)
print(f"before: ACC {before.acc:.1f}, ASR {before.asr:.1f}")

# %% [markdown]
# ## Ten clean images, one of each class, and the purification

# %%
clean = np.array([test[labels[test] == c][0] for c in range(10)])
batch = awm_jax.Batch(images[clean], labels[clean])
purified = awm_jax.purify(suspect, batch, config=CONFIG)
after = scores(purified.params)
print(f"after:  ACC {after.acc:.1f}, ASR {after.asr:.1f} "
      f"({purified.status.name}: {purified.status.advice})")

# %% [markdown]
# ## Your module again, with weights that you save as you always do

# %%
new_variables = purified.params.to_flax()
logits = net.apply(new_variables, images[test][:5], train=False)
print(f"the module says {logits.argmax(axis=1)}, the labels are {labels[test][:5]}")
