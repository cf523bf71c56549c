"""Detectors beside the ground truth of a COCO json: how they score, and the images in which they are worst."""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simam_jax.data import coco
from simam_jax.data.coco_index import read_index
from simam_jax.detection.drawing import draw_objects
from simam_jax.detection.evaluation import KINDS, Evaluated, Truth, evaluate, truth_of
from simam_jax.detection.figures import PANEL, Panel, examples_figure
from simam_jax.detection.mistakes import IOU, Mistakes, compare, drawn_results, drawn_truth
from simam_jax.errors import UserError, naming_extras
from simam_jax.paths import local
from simam_jax.preprocessing import ImageLike, read_upright, stored_and_upright

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
Row = dict[str, Any]  # an annotation or a result in COCO's form


def read_truth(
    annotations: str | os.PathLike[str], images: str | os.PathLike[str], first: int | None = None
) -> tuple[Truth, list[Path]]:
    """The ground truth in a json and the files of its images.

    Args:
        annotations: the json, in COCO's form.
        images: the folder.
        first: so many images; None: all.

    Raises:
        UserError: what `read_index` says; no images, or files that are missing or of another size than the json says.
    """
    index, folder = read_index(annotations), local(images)
    count = len(index.files) if first is None else first
    if not len(index.files) or count < 1:
        raise UserError(f"There is nothing to look at: {annotations} has {len(index.files)} images, --first={first}.")
    paths = [folder / file for file in index.files[:count]]
    absent = set(coco.missing_files(index, folder)) & set(index.files[:count])
    if absent:
        raise UserError(
            f"{len(absent)} of {len(paths)} images of {annotations} are not in {folder}, the first is {min(absent)}: name "
            f"their folder with --images."
        )
    for path, size in zip(paths, index.sizes.tolist(), strict=False):
        _check_size(path, size)
    masks = bool(len(index.boxes)) and bool((np.diff(index.segmentation_ends) > 0)[index.labels >= 0].all())
    truth = truth_of(index, coco.annotations_of(index, masks=masks))
    return subset(truth, np.arange(len(index.files)) < count), paths


def subset(truth: Truth, chosen: np.ndarray) -> Truth:
    """The ground truth of some images: `chosen` is (n,) bool."""
    ids = truth.image_ids[chosen]
    kept = set(ids.tolist())
    annotations = [each for each in truth.annotations if each["image_id"] in kept]
    return Truth(ids, truth.sizes[chosen], truth.category_ids, truth.class_names, annotations)


def images(truth: Truth, paths: Sequence[Path]) -> Iterator[ImageLike]:
    """What a detector is to see: the paths, or the pixels where these are annotated as they are stored, against the EXIF tag."""
    for place, path in enumerate(paths):
        size = _size(truth, place)
        stored, upright = _sizes_in(path) or (size, size)
        yield np.asarray(read_upright(path, size)) if stored == size != upright else path


def category_ids(truth: Truth, class_names: Sequence[str], source: str) -> list[int | None]:
    """The categories of a detector's classes, by their names; None for those that the ground truth does not have.

    Args:
        truth: has the categories.
        class_names: the detector's.
        source: what the detector is called in messages.

    Raises:
        UserError: none of the classes is there.
    """
    ids = dict(zip(truth.class_names, truth.category_ids.tolist(), strict=True))
    strange = [name for name in class_names if name not in ids]
    unknown = [name for name in ids if name not in class_names]
    if len(strange) == len(class_names):
        raise UserError(
            f"None of the classes of {source} ({_some(class_names)}) is a category of the ground truth "
            f"({_some(truth.class_names)}): they are compared by name."
        )
    if strange:
        logger.warning("%s: classes without ground truth are left out: %s.", source, _some(strange))
    if unknown:
        logger.warning("%s does not know these categories, of which it finds none: %s.", source, _some(unknown))
    return [ids.get(name) for name in class_names]


def scores(truth: Truth, found: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Evaluated]]:
    """COCO's evaluation of all results, by kind and detector; of masks where the ground truth and all results have them.

    Args:
        truth: what is right.
        found: in COCO's results form, by the detector's title.
    """
    rows = [*truth.annotations, *(row for results in found.values() for row in results)]
    kinds = KINDS if all(row.get("segmentation") for row in rows) else KINDS[:1]
    return {kind: {title: evaluate(truth, results, kind) for title, results in found.items()} for kind in kinds}


def examples(
    truth: Truth, paths: Sequence[Path], found: Mapping[str, Sequence[Row]], *, score: float, count: int
) -> "Figure":
    """The figure of the images with the worst mistakes: the ground truth, and what each detector finds.

    Args:
        truth: what is right.
        paths: of its images.
        found: in COCO's results form, by the detector's title.
        score: the least of a result that counts.
        count: so many images, at most.
    """
    right = _by_image(truth.annotations)
    shown = {title: _by_image(row for row in rows if row["score"] >= score) for title, rows in found.items()}
    ids = truth.image_ids.tolist()
    mistakes = {title: {image: compare(rows[image], right[image]) for image in ids} for title, rows in shown.items()}
    weights = [sum(of[image].weight for of in mistakes.values()) for image in ids]
    names = dict(zip(truth.category_ids.tolist(), truth.class_names, strict=True))
    rows = []
    for place in np.argsort(-np.array(weights), kind="stable")[:count]:
        image, size = ids[place], _size(truth, place)
        pixels, own = np.asarray(read_upright(paths[place], size)), right[image]
        row = [Panel(paths[place].name, draw_objects(pixels, drawn_truth(own, names, size), PANEL))]
        for title, of in mistakes.items():
            drawn = drawn_results(shown[title][image], own, of[image], names, size)
            row.append(Panel(_counted(of[image]), draw_objects(pixels, drawn, PANEL)))
        rows.append(row)
    note = f"right: blue; wrong: red; missed: yellow. Scores of at least {score}, boxes matched at an IoU of {IOU}."
    return examples_figure(["ground truth", *found], rows, note)


def _size(truth: Truth, place: int) -> tuple[int, int]:
    height, width = truth.sizes[place].tolist()
    return height, width


def _counted(mistakes: Mistakes) -> str:
    return f"{len(mistakes.right)} right, {len(mistakes.wrong)} wrong, {len(mistakes.missed)} missed"


def _by_image(rows) -> dict[int, list[Row]]:
    of_image = defaultdict(list)
    for row in rows:
        of_image[row["image_id"]].append(row)
    return of_image


def _check_size(path: Path, size: Sequence[int]) -> None:
    """Raises `UserError` if the file has other pixels than the json says: every box would be elsewhere."""
    sizes = _sizes_in(path)
    if sizes and tuple(size) not in sizes:
        raise UserError(
            f"{path} has {sizes[0][0]} x {sizes[0][1]} pixels, and the annotations say {size[0]} x {size[1]} (height, "
            f"width): see python -m simam_jax.data.check."
        )


def _sizes_in(path: Path) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """What `stored_and_upright` says of a file; None where it cannot be read, which is said when it is."""
    with naming_extras():
        from PIL import Image

    try:
        with Image.open(path) as image:
            return stored_and_upright(image)
    except OSError:
        return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
