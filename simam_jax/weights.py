"""Weights from anywhere: a workdir, a checkpoint in it, or a file of PyTorch weights."""

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from simam_jax import checkpoints
from simam_jax.errors import UserError, unknown
from simam_jax.models import HEAD, MODELS, Network, create_model, init_variables, variable_shapes
from simam_jax.paths import local
from simam_jax.rcnn.categories import coco_category_ids
from simam_jax.torch_weights.files import read_state
from simam_jax.torch_weights.variables import check_finite, from_torch

if TYPE_CHECKING:  # a bare install reads weights without it
    from ml_collections import ConfigDict

Tree = Any
logger = logging.getLogger(__name__)
ABOUT_WEIGHTS = ("model", "preprocessing", "class_names", "category_ids")  # what a file of ours says beside the weights


@dataclass(frozen=True)
class Weights:
    """A network with weights, and what is known of it.

    Attributes:
        model, variables: for `model.apply(variables, images)`.
        spec: JSON as in checkpoints: `model`, and the rest of `ABOUT_WEIGHTS` where it is known.
    """

    model: Network
    variables: Tree
    spec: Mapping[str, Any]


def load(path: str | os.PathLike[str], *, ema: bool = False) -> tuple[Network, Tree]:
    """A trained network: `model, variables = load(path)`, then `model.apply(variables, images)`.

    Args:
        path: a workdir of train.py (its newest checkpoint) or a checkpoint in it (`WORKDIR/checkpoints/STEP`), written on
            any number of devices. The optimizer's state is not read.
        ema: the exponential moving average of the variables, where the run kept one.

    Returns:
        The linen module, and `{"params": ..., "batch_stats": ...}` on the first device of this process.

    Raises:
        UserError: there is no checkpoint, it is damaged or of another model, `ema` is asked of a run without one, or its
            weights are not finite.
    """
    found = _from_checkpoint(path, ema)
    return found.model, found.variables


def load_torch(
    path: str | os.PathLike[str],
    name: str,
    *,
    num_classes: int | None = None,
    attention: str = "simam",
    attention_param: float | None = None,
    dtype: DTypeLike = jnp.float32,
    skip_head: bool = False,
    key: str | None = None,
    ema: bool = False,
) -> tuple[Network, Tree]:
    """A network with the weights of a file of PyTorch's.

        model, variables = load_torch("resnet50_simam.pth.tar", "resnet50", attention="simam", attention_param=0.1)

    SimAM has no parameters, so weights of the plain network (torchvision's, say) are weights of the one with SimAM, and the
    other way round: they load by themselves, with a notice.

    Args:
        path: .safetensors, .npz, or what `torch.save` wrote: a state_dict, or a dict with one in it.
        name, attention, attention_param, dtype: as for `create_model`.
        num_classes: None: as many as the file has.
        skip_head: leave the classifier as freshly drawn, for another number of classes.
        key: under which key the weights are, where the file holds several.
        ema: take the exponential moving average in the file.

    Returns:
        The linen module and `{"params": ..., "batch_stats": ...}`.

    Raises:
        UserError: no such file, not a file of weights, or weights of another network.
    """
    state = read_state(path, key=key, ema=ema).state
    settings = {"attention": attention, "attention_param": attention_param, "dtype": dtype}
    return from_torch(state, name, num_classes=num_classes, skip_head=skip_head, source=str(path), **settings)


def load_weights(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    num_classes: int | None = None,
    attention: str = "simam",
    attention_param: float | None = None,
    key: str | None = None,
    ema: bool = False,
) -> Weights:
    """The network in a workdir, in a checkpoint, or in a file of PyTorch weights.

    Args:
        path: what to read.
        name, num_classes, attention, attention_param, key: of a file, as for `load_torch`. A checkpoint, and a file that we
            wrote, knows them; a `name` that is not the checkpoint's is an error.
        ema: the exponential moving average of the variables.

    Raises:
        UserError: nothing that can be read is there, or it is of another model.
    """
    path = local(path)
    if not path.is_file():
        found = _from_checkpoint(path, ema)
        if name not in (None, found.model.architecture):
            raise UserError(f"The checkpoint {path} is of {found.model.architecture}, not of {name}.")
        return found
    state, about = read_state(path, key=key, ema=ema)
    min_bbox_size = None
    if name is None:
        if "model" not in about:
            raise UserError(f"{path} does not say of which model it is: give its name, such as resnet50.")
        own = about["model"]
        name, attention, attention_param = own["name"], own["attention"], own["attention_param"]
        min_bbox_size = own.get("min_bbox_size")
    settings = {"attention": attention, "attention_param": attention_param, "min_bbox_size": min_bbox_size}
    model, variables = from_torch(state, str(name), num_classes=num_classes, source=str(path), **settings)
    spec = {"task": MODELS[str(name)].task} | {k: v for k, v in about.items() if k in ABOUT_WEIGHTS}
    return Weights(model, variables, spec | {"model": model.spec()})


def _from_checkpoint(path: str | os.PathLike[str], ema: bool) -> Weights:
    item = "ema" if ema else "variables"

    def read_one(checkpoint: Path) -> Weights:
        meta = checkpoints.read_meta(checkpoint)
        model = create_model(**meta["model"])
        items, _ = checkpoints.read(checkpoint, {item: variable_shapes(model)})
        check_finite(items[item], str(checkpoint))
        return Weights(model, items[item], meta)

    return checkpoints.first_readable(local(path), read_one)


def preprocessing_of(found: Weights) -> Any:
    """How the network wants its images: as stored with its weights, else as the reference implementation feeds it."""
    assumed = MODELS[found.model.architecture].preprocessing
    if stored := found.spec.get("preprocessing"):
        return type(assumed)(**stored | {name: tuple(stored[name]) for name in ("mean", "std")})
    logger.warning("The weights do not say how images were prepared; assumed: %s.", asdict(assumed))
    return assumed


def class_names_of(found: Weights) -> list[str] | None:
    """The names of the classes: as stored with the weights; else ImageNet's for its networks, COCO's for its detectors.

    None for another number of classes.
    """
    if stored := found.spec.get("class_names"):
        return list(stored)
    usual = MODELS[found.model.architecture].num_classes
    if found.model.num_classes != usual or usual not in _CLASS_NAMES:
        return None
    data_set, file = _CLASS_NAMES[usual]
    logger.warning("The weights do not name their classes; assumed: %s's %s.", data_set, f"{usual:,}")
    return (resources.files("simam_jax") / file).read_text().splitlines()


def category_ids_of(found: Weights, class_names: Sequence[str] | None) -> list[int] | None:
    """The numbers of a detector's classes in COCO's form: as stored with the weights; else COCO's for its 80 classes."""
    if stored := found.spec.get("category_ids"):
        return list(stored)
    return coco_category_ids(class_names or ())


_CLASS_NAMES = {1000: ("ImageNet", "imagenet_classes.txt"), 80: ("COCO", "coco_classes.txt")}


# ---- where a run starts from


def initial_variables(model: Network, spec: Mapping[str, Any], config: "ConfigDict", key: jax.Array) -> Tree:
    """The variables that a run begins with: freshly drawn, or with the weights of `config.init_from`."""
    fresh = init_variables(model, key)
    if not config.init_from:
        return fresh
    return start_from(
        config.init_from, model, spec, fresh, skip_head=config.init_skip_head, match_classes=config.data.match_classes
    )


def start_from(
    path: str,
    model: Network,
    spec: Mapping[str, Any],
    fresh: Tree,
    *,
    skip_head: bool,
    match_classes: str = "by_name",
) -> Tree:
    """`fresh` with the weights of `config.init_from`; with `init_skip_head` the classifier stays fresh.

    Raises:
        UserError: they do not fit, or their head is for other classes.
    """
    classifier = MODELS[model.architecture].classifier
    if local(path).is_dir():
        start = _from_checkpoint(path, ema=False)
        found = start.variables
        if start.model.architecture == classifier:
            return with_backbone(fresh, found)
        same = ("attention", "attention_param")  # what the parameters' names and shapes do not tell
        if any(getattr(start.model, name) != getattr(model, name) for name in same):
            had, has = ({name: getattr(m, name) for name in same} for m in (start.model, model))
            logger.warning("config.init_from=%s was trained with %s, this run has %s.", path, had, has)
        if not skip_head:
            check_class_names(start.spec, spec, f"config.init_from={path}", match_classes)
    else:
        state = read_state(path).state
        if classifier and not any(key.startswith("rpn_head.") for key in state):
            settings = {name: spec["model"][name] for name in ("attention", "attention_param", "dtype")}
            _, found = from_torch(state, classifier, source=path, **settings)
            return with_backbone(fresh, found)
        _, found = from_torch(state, skip_head=skip_head, source=path, **spec["model"])
    if skip_head:
        kept: dict[tuple[str, ...], Any] = flatten_dict(found)
        drawn: dict[tuple[str, ...], Any] = flatten_dict(fresh)
        anew = {path: x for path, x in drawn.items() if path[1:-1] in model.class_layers}
        found = unflatten_dict(kept | anew)
        layers = ", ".join(sorted({"/".join(path[1:-1]) for path in anew}))
        logger.warning("config.init_from=%s: all is taken but the layers for classes, drawn anew: %s.", path, layers)
    if wrong := checkpoints.differences(checkpoints.layout(found), checkpoints.layout(fresh)):
        raise UserError(
            f"The weights of config.init_from={path} do not fit {spec['model']['name']} with "
            f"{spec['model']['num_classes']} classes: {wrong}. Another number of classes is no obstacle with "
            f"--config.init_skip_head=True."
        )
    return found


def with_backbone(detector: Tree, classifier: Tree) -> Tree:
    """The variables of a detector with those of a classifier, all but its head, as its backbone.

    Raises:
        UserError: the classifier is not the one that the detector stands on.
    """
    found = {
        kind: {name: x for name, x in classifier[kind].items() if name != HEAD} for kind in ("params", "batch_stats")
    }
    wanted = {kind: detector[kind]["backbone"] for kind in found}
    if wrong := checkpoints.differences(checkpoints.layout(found), checkpoints.layout(wanted)):
        raise UserError(f"These weights are not those of this detector's backbone: {wrong}.")
    return detector | {kind: detector[kind] | {"backbone": found[kind]} for kind in found}


def check_class_names(held: Mapping[str, Any], wanted: Mapping[str, Any], source: str, match: str = "by_name") -> None:
    """Raises `UserError` if weights are for classes of other names than the data's, unless they match "by_order".

    Args:
        held, wanted: specs; where one has no `class_names`, nothing is compared.
        source: what has the weights.
        match: `config.data.match_classes`.
    """
    ours, theirs = wanted.get("class_names"), held.get("class_names")
    if not ours or not theirs or list(ours) == list(theirs) or len(ours) != len(theirs):
        return  # another number of classes is another model, which says so itself
    if match == "by_order":
        return
    if match != "by_name":
        raise unknown("config.data.match_classes", match, ("by_name", "by_order"))
    pairs: Sequence[tuple[int, str, str]] = [
        (i, a, b) for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b
    ]
    shown = ", ".join(f"{i}: {a!r} there, {b!r} in the data" for i, a, b in itertools.islice(pairs, 5))
    raise UserError(
        f"The classes of {source} have other names than those of the data ({len(pairs)} of {len(ours)} differ; {shown}). "
        f"If they mean the same in this order, --config.data.match_classes=by_order."
    )
