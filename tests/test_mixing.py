"""What the jitted step does with a batch of bytes: normalisation, mixup, cutmix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from simam_jax.classification import mixing
from simam_jax.ops.images import normalize

pytestmark = pytest.mark.usefixtures("quickly_compiled")

N, SIZE = 512, 16
KEY = jax.random.key(0)
INDEX = jnp.arange(N)
IMAGES = jnp.broadcast_to(jnp.arange(N, dtype=jnp.float32)[:, None, None, None] % 2, (N, SIZE, SIZE, 1))  # 0, 1, 0, ...
TARGETS = jax.nn.one_hot(INDEX % 2, 2)


def mixed(**alphas):
    return mixing.mix(KEY, INDEX, IMAGES, TARGETS, **{"mixup_alpha": 0.0, "cutmix_alpha": 0.0, **alphas})


def test_normalize():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = jax.jit(lambda x: normalize(x, mean, std))(pixels)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, (pixels / 255.0 - mean) / std, atol=2e-6)
    assert normalize(pixels, mean, std, jnp.bfloat16).dtype == jnp.bfloat16


def test_without_alphas_nothing_happens():
    images, targets = mixed()
    assert images is IMAGES
    assert targets is TARGETS


@pytest.mark.parametrize(
    "alphas", [{"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}]
)
def test_targets_are_the_shares_of_the_two_images(alphas):
    images, targets = mixed(**alphas)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(images.mean((1, 2, 3)), targets[:, 1], atol=1e-5)  # images of class 1 are all ones
    np.testing.assert_allclose(images[::2] + images[1::2], 1, atol=1e-6)  # partners mix with mirrored weights


def test_mixup_weights_are_beta_distributed():
    images, targets = mixed(mixup_alpha=0.5)
    assert float(jnp.ptp(images, axis=(1, 2)).max()) == 0
    weights = np.asarray(targets[::2, 0])
    assert abs(weights.mean() - 0.5) < 0.06
    assert abs(weights.var() - 1 / (4 * (2 * 0.5 + 1))) < 0.02


def test_cutmix_swaps_one_rectangle():
    images, targets = mixed(cutmix_alpha=1.0)
    assert set(np.unique(images)) == {0.0, 1.0}
    for image in np.asarray(images[::2, :, :, 0][:50]):
        rows, columns = np.nonzero(image)
        if len(rows):
            assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    kept = np.asarray(targets[::2, 0])
    assert np.std(kept) > 0.15
    assert 0.6 < kept.mean() < 0.85  # Beta(1, 1) keeps a half; what of the rectangle lies outside is kept too


def test_with_both_each_pair_draws_one():
    images, _ = mixed(mixup_alpha=5.0, cutmix_alpha=1.0)
    is_mixup = np.asarray(((images > 0) & (images < 1)).any((1, 2, 3)))[::2]
    assert 0.4 < is_mixup.mean() < 0.6


def test_draws_do_not_depend_on_the_number_of_devices():
    one = mixed(mixup_alpha=0.4, cutmix_alpha=1.0)

    def on(count):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        rows = PartitionSpec("data")
        step = jax.shard_map(
            lambda key, *args: mixing.mix(key, *args, mixup_alpha=0.4, cutmix_alpha=1.0),
            mesh=mesh,
            in_specs=(PartitionSpec(), rows, rows, rows),
            out_specs=(rows, rows),
        )
        return jax.jit(step)(KEY, INDEX, IMAGES, TARGETS)

    for ours, theirs in zip((*one, *one), (*on(1), *on(8)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_an_odd_number_of_images_is_an_error():
    with pytest.raises(ValueError, match="not 3"):
        mixing.mix(KEY, INDEX[:3], IMAGES[:3], TARGETS[:3], mixup_alpha=0.2, cutmix_alpha=0.0)
