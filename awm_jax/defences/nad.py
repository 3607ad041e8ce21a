"""Neural Attention Distillation (NAD): a tuned copy of the network teaches it where to look."""

import dataclasses

import jax
import jax.numpy as jnp

from awm_jax import losses, models, validate
from awm_jax.defences import tuning
from awm_jax.defences.base import EVERYTHING, Defence
from awm_jax.types import Arch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class NADConfig(tuning.TuneConfig):
    """Settings of NAD; those of both tunings as in `tuning.TuneConfig`.

    Args:
      epochs: passes over the clean images that the student makes, >= 1.
      teacher_epochs: passes that the teacher made before, >= 1.
      first_beta: weight of the first block's attention in the loss, >= 0.
      beta: weight of each other block's attention, >= 0.
      power: p of the attention ``sum_c |F_c|^p``, >= 1.

    The weights 500, 1000, 1000 are BackdoorBench's for three groups; they go with a mean over the
    pixels of the attention map. Its rate is 0.01 to epoch 20 and 1e-4 after; here it falls along a
    cosine.

    Raises:
      ValueError: a value outside its range.
    """

    epochs: int = 20
    teacher_epochs: int = 10
    first_beta: float = 500.0
    beta: float = 1000.0
    power: float = 2.0

    def __post_init__(self):
        """Checks every range before any work starts."""
        super().__post_init__()
        validate.whole(1, teacher_epochs=self.teacher_epochs)
        validate.at_least(1, power=self.power)
        validate.at_least(0, first_beta=self.first_beta, beta=self.beta)


def attention(block: jax.Array, power: float = 2.0) -> jax.Array:
    """``A / ||A||_2`` with ``A = sum_c |F_c|^p``: where in an image a block is active.

    Args:
      block: ``[B, h, w, c]``, a block's output.
      power: p, >= 1.

    Returns:
      ``[B, h * w]``, each row of unit length; zero where the block is silent.

    Example:
      >>> attention(jnp.array([0., 2., 0.]).reshape(1, 1, 3, 1)).tolist()
      [[0.0, 1.0, 0.0]]

    Reference: Li et al., ICLR 2021, "Neural Attention Distillation", section 3 (attention).
    """
    powers = block**2 if power == 2 else jnp.abs(block) ** power
    total = powers.sum(axis=-1).reshape(len(block), -1)
    square = (total**2).sum(axis=1, keepdims=True)
    # Both guards: the gradient of a square root at zero is infinite, even where it is not chosen.
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return total / norm


def _has_pixels(blocks: dict[str, jax.Array]) -> None:
    """ValueError unless there is a place to attend to."""
    if all(block.shape[1] * block.shape[2] == 1 for block in blocks.values()):
        raise ValueError("Expected a network with a block of more than one pixel, whose attention "
                         f"NAD compares; got {', '.join(blocks)} of one each. Choose another "
                         "defence.")


def _fits(arch: Arch) -> None:
    """The same of a network that is not there yet."""
    def blocks(key):
        image = jnp.zeros((1, *arch.image_shape))
        return models.activations(models.create(key, arch), image)[1]

    _has_pixels(jax.eval_shape(blocks, jax.random.key(0)))


def distance(teacher: dict[str, jax.Array], student: dict[str, jax.Array],
             config: NADConfig) -> jax.Array:
    """``sum_l beta_l * mean (A_T^l - A_S^l)^2``, the mean over images and pixels.

    Args:
      teacher: its blocks ``[B, h, w, c]`` by name, in order.
      student: the same of the student.
      config: ``first_beta`` for the first block, ``beta`` for each other, and ``power``.

    Returns:
      A scalar >= 0.

    Raises:
      ValueError: no block has more than one pixel, as in a fully connected network: there is no
        place to attend to.

    Example:
      >>> blocks = {'block1': jnp.ones((2, 3, 3, 4))}
      >>> float(distance(blocks, blocks, NADConfig()))
      0.0

    Reference: Li et al., ICLR 2021, section 3 (distillation loss); the mean over pixels
    is that of its code.
    """
    _has_pixels(student)
    terms = [((attention(teacher[name], config.power) - attention(student[name], config.power))**2)
             .mean() * (config.beta if index else config.first_beta)
             for index, name in enumerate(student)]
    return sum(terms, start=jnp.zeros(()))


def _student_loss(teacher: Params, config: NADConfig) -> tuning.Loss:
    """Cross-entropy plus the distance to the attention of a frozen teacher."""

    def loss(key, params, images, labels):
        _, wanted, _ = models.activations(teacher, images)
        logits, blocks, batch_stats = models.activations(params, images, key=key)
        return losses.cross_entropy(logits, labels) + distance(wanted, blocks, config), batch_stats

    return loss


def _method(key: jax.Array, params: Params, images: jax.Array, labels: jax.Array,
            config: NADConfig) -> tuple[Params, dict]:
    """Fine-tunes a teacher, then the suspect network under the teacher's attention."""
    key_teacher, key_student = jax.random.split(key)
    schooling = dataclasses.replace(config, epochs=config.teacher_epochs)
    teacher, teacher_losses = tuning.descend(key_teacher, params, images, labels, schooling)
    student, student_losses = tuning.descend(
        key_student, params, images, labels, config,
        gradient=tuning.plain(_student_loss(teacher, config)))
    return student, {"loss": student_losses, "teacher_loss": teacher_losses}


nad = Defence(
    name="nad", method=_method, default=NADConfig(), remit=EVERYTHING, fits=_fits,
    paper="Li et al., ICLR 2021, section 3",
)
