"""Accuracy and attack success, counted by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from awm_jax import metrics


def test_scores_by_hand():
    labels = np.array([0, 1, 2, 2, 1])
    clean = np.array([0, 1, 2, 1, 1])  # four of five
    triggered = np.array([2, 2, 2, 2, 1])  # class 2 is wanted
    out = metrics.scores(clean, triggered, labels, np.full(5, 2))
    assert out.acc == pytest.approx(80)
    assert out.asr == pytest.approx(100 * 2 / 3)  # images 0, 1 and 4 count, two are hit
    assert out.asr_all == pytest.approx(80)
    assert out.recovered == pytest.approx(100 / 3)


def test_several_triggers_by_hand():
    labels = np.array([0, 1, 2, 2, 1])
    clean = labels.copy()
    first = np.array([2, 1, 2, 2, 1])  # class 2 is wanted: image 0 is led astray
    second = np.array([0, 2, 2, 2, 1])  # image 1; image 4 by neither
    out = metrics.scores(clean, np.stack([first, second]), labels, np.full(5, 2))
    assert out.asr == pytest.approx(200 / 3) and out.asr_all == pytest.approx(80)
    assert out.asr_parts == pytest.approx((100 / 3, 100 / 3))
    assert out.recovered == pytest.approx(100 / 3)  # image 4
    one = metrics.scores(clean, first[None], labels, np.full(5, 2))
    assert one == metrics.scores(clean, first, labels, np.full(5, 2)) and one.asr_parts == ()
    with pytest.raises(ValueError, match="lengths"):
        metrics.scores(clean, np.stack([first, second])[:, :4], labels, np.full(5, 2))


def test_evaluation_takes_several_triggers(small_params, small_batch):
    images, labels = small_batch.images, small_batch.labels

    def bright(x):
        return jnp.clip(x + 0.5, 0, 1)

    def dark(x):
        return x * 0.1

    several, *alone = (
        metrics.evaluate(small_params, images, labels, trigger=trigger, batch_size=6,
                         relabel=lambda y: np.full_like(y, 0))
        for trigger in ((bright, dark), bright, [dark]))
    assert several.asr_parts == tuple(one.asr for one in alone)
    assert several.acc == alone[0].acc and several.asr >= max(several.asr_parts)


def test_all_to_all_counts_every_image():
    labels = np.array([0, 1, 2])
    out = metrics.scores(labels, (labels + 1) % 3, labels, (labels + 1) % 3)
    assert out.asr == out.asr_all == 100 and out.recovered == 0


def test_only_target_images_is_an_error():
    with pytest.raises(ValueError, match="outside"):
        metrics.scores(np.array([1]), np.array([1]), np.array([1]), np.array([1]))
    with pytest.raises(ValueError, match="lengths"):
        metrics.scores(np.array([1]), np.array([1, 2]), np.array([1]), np.array([1]))


def test_batches_do_not_change_predictions(small_params, small_batch):
    images = (small_batch.images * 255).astype(np.uint8)
    whole = metrics.predict(small_params, images, batch_size=6)
    np.testing.assert_array_equal(metrics.predict(small_params, images, batch_size=4), whole)
    floats = metrics.predict(small_params, images.astype(np.float32) / 255, batch_size=6)
    np.testing.assert_array_equal(floats, whole)
    assert len(metrics.predict(small_params, images[:0])) == 0


def test_transform_sees_floats_in_unit_range(small_params, small_batch):
    seen = []
    metrics.predict(small_params, np.full((2, 8, 8, 3), 255, np.uint8),
                    transform=lambda x: seen.append(float(x.max())) or x, batch_size=2)
    assert seen == [1.0]


def test_success_bound():
    assert metrics.success_bound(43) == pytest.approx(3.488, abs=1e-3)
