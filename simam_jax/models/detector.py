"""Faster R-CNN (Ren et al., 2015) and Mask R-CNN (He et al., 2017) on a feature pyramid."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from simam_jax.errors import UserError
from simam_jax.models.backbone import as_images
from simam_jax.models.fpn import FPN
from simam_jax.models.network import Network
from simam_jax.models.resnet import ResNet
from simam_jax.models.roi_heads import BoxHead, MaskHead
from simam_jax.models.rpn import RPNHead, RPNOutputs
from simam_jax.ops.parts import apply_to_valid
from simam_jax.ops.roi_align import roi_align
from simam_jax.preprocessing import SIZE_DIVISOR
from simam_jax.rcnn.anchors import all_anchors, valid_anchors
from simam_jax.rcnn.levels import NUM_LEVELS, level_of
from simam_jax.rcnn.proposals import Detections, Proposals, detect, propose

BEFORE_NMS = 1000  # anchors of a level that become proposals at most, when the network is used
BOX_BINS, MASK_BINS = 7, 14  # of RoIAlign


class Sizes(NamedTuple):
    """Where images end that were padded to one shape, (N, 2) int32 each: height and width in pixels."""

    extent: jax.Array  # of the tensor that the image would be if it were padded for itself alone
    image: jax.Array  # of the image without padding: boxes are cut to it


class Detector(Network, kw_only=True):
    """A detector: `detections = model.apply(variables, images, extent, image_size, scale)`.

    An image's result depends neither on the images beside it nor on how far it is padded beyond its extent. Boxes, their
    scores and what SimAM sums are float32, whatever `dtype` the convolutions have.

    The reference implementation gives an image the extent of its size rounded up to a multiple of 32. Training is in
    `models.detector_losses`.
    """

    backbone: ResNet
    masks: bool = False  # whether it is a Mask R-CNN
    width: int = 256  # channels of the pyramid and of what looks at it
    hidden: int = 1024  # numbers in the box head's two layers
    sampled_rois: int = 512  # of an image, in training
    min_bbox_size: float = -1.0  # proposals must be wider and higher; below 0 none is dropped: see `rcnn.proposals`

    @property
    def class_layers(self) -> tuple[tuple[str, ...], ...]:
        masks = (("mask_head", "conv_logits"),) if self.masks else ()
        return ("bbox_head", "fc_cls"), ("bbox_head", "fc_reg"), *masks

    @property
    def num_scores(self) -> int:
        return self.num_classes + 1

    def setup(self):
        self.neck = FPN(self.width)
        self.rpn_head = RPNHead(self.width)
        self.bbox_head = BoxHead(self.num_classes, self.hidden)
        if self.masks:
            self.mask_head = MaskHead(self.num_classes, self.width)

    def __call__(
        self,
        images: jax.Array,
        extent: ArrayLike | None = None,
        image_size: ArrayLike | None = None,
        scale: ArrayLike | None = None,
    ) -> Detections:
        """The best 100 objects of every image, of score above 0.05, as arrays of fixed size with a count.

        Args:
            images: (N, H, W, 3), floating, RGB, normalised, padded right and below.
            extent: (N, 2) int32, height and width of each image padded for itself alone: what lies beyond changes
                nothing. None: H, W.
            image_size: (N, 2) int32, of each image without padding. None: the extent.
            scale: (N, 4) float32, that size over the size of the image as it was read: width, height, width, height.
                None: 1.

        Returns:
            boxes (N, 100, 4) float32 x1 y1 x2 y2 in pixels of the image as it was read, scores (N, 100) float32 high
            first, labels (N, 100) int32, count (N,) int32, and masks (N, 100, 28, 28) float32, probabilities over the
            box (`rcnn.masks.paste` brings them into the image), or None. Rows from `count` on are 0.

        Raises:
            UserError: the images or an extent have another shape.
        """
        levels = self.pyramid(images, extent)
        sizes = sizes_of(images, extent, image_size)
        found = self.proposals(levels, self.rpn(levels, extent), sizes, before_nms=BEFORE_NMS)
        logits, deltas = self.boxes(levels, sizes, found.boxes, _first(found.boxes, found.count))
        scale = jnp.ones((images.shape[0], 4), jnp.float32) if scale is None else jnp.asarray(scale, jnp.float32)
        detections = jax.vmap(detect)(logits, deltas, found.boxes, found.count, sizes.image, scale)
        if not self.masks:
            return detections

        real = _first(detections.boxes, detections.count)
        logits = self.mask_logits(levels, sizes, detections.boxes * scale[:, None], real, detections.labels)
        return detections._replace(masks=jnp.where(real[..., None, None], jax.nn.sigmoid(logits), 0))

    # The parts, which training calls too

    def pyramid(self, images: jax.Array, extent: ArrayLike | None = None, train_norm: bool = False) -> list[jax.Array]:
        """P2 to P6, (N, h, w, width) in `dtype`. With `train_norm` batch norm is trained, over whole maps: no extent then."""
        images, extent = as_images(images, self.dtype), _checked(extent, images, "extent")
        _, stages = self.backbone(images, train_norm, extent=extent)
        return self.neck(list(stages.values()), extent)

    def rpn(self, levels: Sequence[jax.Array], extent: ArrayLike | None = None) -> RPNOutputs:
        """Objectness and deltas of every anchor, float32."""
        extent = None if extent is None else jnp.asarray(extent, jnp.int32)
        return jax.tree.map(_in_float32, self.rpn_head(levels, extent))

    @nn.nowrap
    def proposals(
        self, levels: Sequence[jax.Array], outputs: RPNOutputs, sizes: Sizes, *, before_nms: int
    ) -> Proposals:
        """The RPN's proposals for every image: (N, R, 4), (N, R), (N,).

        Anchors within the extent are candidates, those in the image's own padding too.
        """
        maps = map_sizes(levels)
        grid = all_anchors(maps)

        def of_image(outputs: RPNOutputs, sizes: Sizes) -> Proposals:
            return propose(
                *outputs,
                grid,
                valid_anchors(maps, sizes.extent),
                sizes.image,
                before_nms=before_nms,
                min_bbox_size=self.min_bbox_size,
            )

        return jax.vmap(of_image)(outputs, sizes)

    def boxes(
        self, levels: Sequence[jax.Array], sizes: Sizes, rois: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Class logits (N, R, C + 1) and deltas (N, R, 4 C), float32, of rois (N, R, 4), of which `valid` (N, R) are real."""
        features = _features(levels, sizes, rois, valid, BOX_BINS)
        logits, deltas = self.bbox_head(features.reshape(-1, *features.shape[2:]))
        return jax.tree.map(lambda x: _in_float32(x).reshape(*valid.shape, -1), (logits, deltas))

    def mask_logits(
        self, levels: Sequence[jax.Array], sizes: Sizes, rois: jax.Array, valid: jax.Array, labels: jax.Array
    ) -> jax.Array:
        """(N, R, 28, 28) float32: of each roi (N, R, 4) the mask of its class, `labels` (N, R); not of those without `valid`."""
        features = _features(levels, sizes, rois, valid, MASK_BINS)
        rows = features.reshape(-1, *features.shape[2:]), labels.reshape(-1)
        if self.is_initializing():
            logits = self.mask_head(*rows)
        else:
            head, variables = self.mask_head.unbind()  # as a function, which loops and conditionals can take
            of_rows: Any = partial(head.apply, variables)
            logits = apply_to_valid(of_rows, valid.reshape(-1), *rows)
        return _in_float32(logits).reshape(*valid.shape, *logits.shape[1:])

    @nn.nowrap
    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "min_bbox_size": self.min_bbox_size}


def trainable(path: Sequence[str], frozen_stages: int = 1) -> bool:
    """Whether a detector's parameter at a path, such as ("backbone", "layer1_0", "conv1", "kernel"), is trained.

    Args:
        path: among the parameters.
        frozen_stages: so many of the backbone's stages, and its stem, are not; 1 in the reference implementation. 0: all is
            trained.
    """
    frozen = ("conv1", "bn1", *(f"layer{stage}_" for stage in range(1, frozen_stages + 1)))
    return not (frozen_stages and path[0] == "backbone" and path[1].startswith(frozen))


def sizes_of(images: jax.Array, extent: ArrayLike | None, image_size: ArrayLike | None) -> Sizes:
    """The sizes of images (N, H, W, 3), from what is known of them."""
    whole = _checked(extent, images, "extent")
    if whole is None:
        whole = jnp.broadcast_to(jnp.array(images.shape[1:3], jnp.int32), (images.shape[0], 2))
    image = _checked(image_size, images, "image_size")
    return Sizes(whole, whole if image is None else image)


def own_extent(sizes: ArrayLike) -> jax.Array:
    """(N, 2) int32: sizes rounded up to multiples of `SIZE_DIVISOR`, as the reference implementation pads an image alone."""
    return -(-jnp.asarray(sizes) // SIZE_DIVISOR) * SIZE_DIVISOR


def map_sizes(levels: Sequence[jax.Array]) -> list[tuple[int, int]]:
    """Height and width of each level."""
    return [(x.shape[1], x.shape[2]) for x in levels]


def _checked(size: ArrayLike | None, images: jax.Array, name: str) -> jax.Array | None:
    if size is None:
        return None
    size = jnp.asarray(size, jnp.int32)
    if size.shape != (images.shape[0], 2):
        raise UserError(f"The {name} of images {images.shape} must be ({images.shape[0]}, 2), got {size.shape}.")
    return size


def _features(levels: Sequence[jax.Array], sizes: Sizes, rois: jax.Array, valid: jax.Array, bins: int) -> jax.Array:
    return roi_align(levels[:NUM_LEVELS], sizes.extent, rois, level_of(rois), valid, size=bins)


def _first(rows: jax.Array, count: jax.Array) -> jax.Array:
    """(N, R) bool: the first `count` (N,) of rows (N, R, ...)."""
    return jnp.arange(rows.shape[1]) < count[:, None]


_in_float32 = partial(jnp.asarray, dtype=jnp.float32)
