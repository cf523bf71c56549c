"""Detectors as networks: their tree, inputs, extents, devices, precisions, lowerings. Small ones, with random weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from simam_jax import errors
from simam_jax.models import ATTENTIONS, create_model, init_variables, list_models, variable_shapes
from simam_jax.models.detector import trainable
from simam_jax.models.detector_losses import LOSSES, Targets, losses, total
from simam_jax.ops.dispatch import lowering_for

pytestmark = pytest.mark.usefixtures("quickly_compiled")

NUM_CLASSES = 5
SIZE = 64, 96


def detector(name: str = "mask_rcnn_tiny_fpn", **settings):
    return create_model(name, **{"num_classes": NUM_CLASSES, "attention": "simam", **settings})


def lively(model):
    """Variables with which an image has many detections."""
    variables = init_variables(model, jax.random.key(0))
    for head, layer, factor in (("rpn_head", "rpn_cls", 30), ("bbox_head", "fc_cls", 30), ("bbox_head", "fc_reg", 30)):
        variables["params"][head][layer]["kernel"] *= factor
    return variables


@pytest.fixture(scope="module")
def mask_rcnn():
    """A model, its variables and its compiled `apply`."""
    model = detector()
    return model, lively(model), jax.jit(model.apply)


def images(count: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *size, 3), np.float32)


def test_every_detector_has_its_parameters():
    counts = {}
    for name in list_models("detection"):
        shapes = variable_shapes(create_model(name, attention="simam"))["params"]
        counts[name] = sum(x.size for x in jax.tree.leaves(shapes))
        assert set(shapes) == {"backbone", "neck", "rpn_head", "bbox_head"} | (
            {"mask_head"} if name.startswith("mask") else set()
        )
    # param_counts.json of the reference implementation's numbers.
    assert counts["faster_rcnn_resnet50_fpn"] == 41_753_056
    assert counts["faster_rcnn_resnet101_fpn"] == 60_745_184
    assert counts["mask_rcnn_resnet50_fpn"] == 44_396_336
    assert counts["mask_rcnn_resnet101_fpn"] == 63_388_464


def test_double_precision_ends_at_the_pyramid():
    with jax.enable_x64(True):
        model = detector(dtype="float64")
        shapes, x = variable_shapes(model), jnp.zeros((1, *SIZE, 3))
        assert {level.dtype for level in jax.eval_shape(partial(model.apply, method="pyramid"), shapes, x)} == {x.dtype}
        found = jax.eval_shape(model.apply, shapes, x)
        key = jax.random.split(jax.random.key(0), 1)
        of_training = jax.eval_shape(lambda v: losses(model, v, x, targets(1), key)[0], shapes)
    assert {array.dtype.name for array in found} == {"float32", "int32"}
    assert {of_images.dtype.name for of_images, _ in map(of_training.get, LOSSES)} == {"float32"}


def test_what_is_trained():
    shapes = variable_shapes(detector("faster_rcnn_resnet50_fpn", num_classes=80))["params"]
    trained = {path: x.size for path, x in flatten_dict(shapes).items() if trainable(path)}
    assert sum(trained.values()) == 41_527_712
    frozen = {path[1] for path in flatten_dict(shapes) if path not in trained}
    assert frozen == {"conv1", "bn1", "layer1_0", "layer1_1", "layer1_2"}


def test_a_spec_makes_the_network_again():
    model = detector(min_bbox_size=0, dtype="bfloat16")
    assert create_model(**model.spec()) == model


def test_inputs_are_checked(mask_rcnn):
    model, variables, _ = mask_rcnn
    with pytest.raises(errors.UserError, match=r"extent of images \(2, 64, 96, 3\) must be \(2, 2\)"):
        jax.eval_shape(model.apply, variables, images(2), np.array([64, 96]))
    with pytest.raises(errors.UserError, match="min_bbox_size is a detector's"):
        create_model("resnet18", min_bbox_size=0)


def test_detections_have_a_count_and_are_in_order(mask_rcnn):
    _, variables, apply = mask_rcnn

    found = apply(variables, images(2))

    assert found.boxes.shape == (2, 100, 4)
    assert found.masks.shape == (2, 100, 28, 28)
    for i in range(2):
        count = int(found.count[i])
        assert count > 10
        assert (np.diff(found.scores[i, :count]) <= 0).all()
        assert (found.scores[i, :count] > 0.05).all()
        boxes = found.boxes[i, :count]
        assert (boxes >= 0).all()
        assert (boxes <= np.array([96, 64, 96, 64])).all()
        assert set(np.unique(found.labels[i])) <= set(range(NUM_CLASSES))
        assert (found.masks[i, :count] > 0).all()
        for rest in (found.boxes, found.scores, found.labels, found.masks):
            assert not rest[i, count:].any()


def test_an_image_depends_neither_on_its_bucket_nor_on_its_neighbours(mask_rcnn):
    _, variables, apply = mask_rcnn
    alone = apply(variables, images(1))
    assert alone.count[0] > 10
    batch = np.full((2, 128, 160, 3), 7, np.float32)
    batch[0, :64, :96] = images(1)[0]

    found = apply(variables, batch, np.array([[64, 96], [128, 160]]))

    assert found.count[0] == alone.count[0]
    np.testing.assert_array_equal(found.labels[0], alone.labels[0])
    np.testing.assert_allclose(found.boxes[0], alone.boxes[0], atol=1e-4)
    np.testing.assert_allclose(found.masks[0], alone.masks[0], atol=1e-5)


@pytest.mark.parametrize(
    "attention", [pytest.param(kind, marks=[] if kind == "simam" else pytest.mark.slow) for kind in ATTENTIONS]
)
def test_maps_within_the_extent_are_those_of_the_image_alone(attention):
    model = detector("faster_rcnn_tiny_fpn", attention=attention)
    variables = init_variables(model, jax.random.key(0))
    batch = np.full((1, 128, 128, 3), 7, np.float32)
    batch[:, :64, :96] = images(1)

    @jax.jit
    def maps(x, extent=None):
        levels = model.apply(variables, x, extent, method="pyramid")
        return levels, model.apply(variables, levels, extent, method="rpn")

    (alone, _), (padded, outputs) = maps(images(1)), maps(batch, np.array([[64, 96]]))

    for level, ours in zip(alone, padded, strict=True):
        height, width = level.shape[1:3]
        np.testing.assert_allclose(ours[:, :height, :width], level, atol=2e-6 * float(jnp.abs(level).max()))
    assert outputs.deltas[0].shape == (1, 32 * 32 * 3, 4)


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(mask_rcnn, mesh_of):
    model, variables, apply = mask_rcnn
    x = images(8, (32, 64))
    one = apply(variables, x)

    split = jax.shard_map(model.apply, mesh=mesh_of(8), in_specs=(P(), P("data")), out_specs=P("data"))
    eight = jax.jit(split)(variables, x)

    np.testing.assert_array_equal(eight.count, one.count)
    np.testing.assert_array_equal(eight.labels, one.labels)
    np.testing.assert_allclose(eight.boxes, one.boxes, atol=1e-4)


def test_losses_can_be_taken_inside_shard_map(mesh_of):
    model = detector()
    variables = variable_shapes(model)
    truth = targets(8)
    keys = jax.random.split(jax.random.key(0), 8)

    def of_device(params, *batch):
        local = jax.lax.pcast(params, "data", to="varying")
        gradients = jax.grad(lambda p: total(losses(model, variables_of(p), *batch)[0]))(local)
        return jax.lax.pmean(gradients, "data")

    def variables_of(params):
        return {"params": params, "batch_stats": jax.tree.map(jnp.zeros_like, variables["batch_stats"])}

    mapped = jax.shard_map(of_device, mesh=mesh_of(8), in_specs=(P(), *(P("data"),) * 3), out_specs=P())
    shapes = jax.eval_shape(mapped, variables["params"], images(8), truth, keys)
    assert jax.tree.structure(shapes) == jax.tree.structure(variables["params"])


@pytest.mark.slow
def test_vmap_over_images(mask_rcnn):
    model, variables, apply = mask_rcnn
    batch = apply(variables, images(2))

    each = jax.jit(jax.vmap(lambda x: jax.tree.map(lambda y: y[0], model.apply(variables, x[None]))))(images(2))

    np.testing.assert_array_equal(each.count, batch.count)
    np.testing.assert_allclose(each.boxes, batch.boxes, atol=1e-4)


def targets(count: int, room: int = 3) -> Targets:
    """One object in the first image, two in the second, ..., none beyond `room`."""
    boxes = np.zeros((count, room, 4), np.float32)
    boxes[:] = np.array([[4, 4, 50, 40], [30, 10, 90, 60], [0, 0, 20, 20]])[:room]
    masks = np.zeros((count, room, SIZE[0], SIZE[1] // 8), np.uint8)
    masks[:, :, 5:35, 1:6] = 255
    labels = np.tile(np.arange(room, dtype=np.int32), (count, 1))
    return Targets(*map(jnp.asarray, (boxes, labels, np.arange(1, count + 1) % (room + 1), masks)))


@pytest.fixture(scope="module")
def gradient_of():
    def make(model):
        def loss(params, variables, x, truth, keys, extent):
            found, _ = losses(model, {**variables, "params": params}, x, truth, keys, extent=extent)
            return total(found), found

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    return make


@pytest.mark.slow
def test_losses_and_gradients(mask_rcnn, gradient_of):
    model, variables, _ = mask_rcnn
    keys = jax.random.split(jax.random.key(0), 2)
    extent = np.array([SIZE] * 2)
    gradient = gradient_of(model)
    args = variables["params"], variables, images(2)

    (value, found), gradients = gradient(*args, targets(2), keys, extent)

    assert np.isfinite(value)
    assert value > 0
    for path, leaf in flatten_dict(gradients).items():
        assert np.isfinite(leaf).all(), path
        assert leaf.any() == trainable(path), path
    assert (found["recall"][1] == np.array([1, 2])).all()
    assert (found["positives"][0] >= np.array([1, 2])).all()  # the ground truth itself is among the rois

    # Images without any object: the box and mask losses are 0, and nothing is NaN.
    nothing = targets(2)._replace(count=jnp.zeros(2, int))
    (value, found), gradients = gradient(*args, nothing, keys, extent)
    assert np.isfinite(value)
    assert not any(found[name][0].any() for name in ("loss_rpn_bbox", "loss_bbox", "loss_mask", "positives"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_bfloat16_is_near_float32(mask_rcnn):
    _, variables, _ = mask_rcnn
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        model = detector(dtype=dtype)
        levels = jax.jit(lambda v, x, model=model: model.apply(v, x, method="pyramid"))(variables, images(1))
        assert {level.dtype for level in levels} == {jnp.dtype(dtype)}
        outputs[dtype] = levels
        found = jax.jit(model.apply)(variables, images(1))
        assert {x.dtype for x in (found.boxes, found.scores, found.masks)} == {jnp.dtype("float32")}
    for full, half in zip(outputs["float32"], outputs["bfloat16"], strict=True):
        error = jnp.abs(half.astype(jnp.float32) - full).mean() / jnp.abs(full).mean()
        assert error < 0.02


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_other_platforms_call_nothing_outside_of_them(platform):
    model = detector()
    shapes = variable_shapes(model)
    x, extent = jax.ShapeDtypeStruct((2, *SIZE, 3), jnp.float32), jax.ShapeDtypeStruct((2, 2), jnp.int32)
    truth = jax.eval_shape(lambda: targets(2))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))

    def loss(params, variables, x, truth, keys, extent):
        return total(losses(model, {**variables, "params": params}, x, truth, keys, extent=extent)[0])

    with lowering_for({"cuda": "gpu"}.get(platform, platform)):
        programs = [
            jax.jit(model.apply).trace(shapes, x, extent).lower(lowering_platforms=(platform,)).as_text(),
            jax.jit(jax.grad(loss))
            .trace(shapes["params"], shapes, x, truth, keys, extent)
            .lower(lowering_platforms=(platform,))
            .as_text(),
        ]
    for text in programs:
        assert "custom_call" not in text
