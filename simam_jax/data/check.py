"""What is in a json of COCO's form, and what would go wrong in training on it: `python -m simam_jax.data.check`."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simam_jax import errors
from simam_jax.data import coco, coco_masks
from simam_jax.data.coco_index import Index, read_index
from simam_jax.data.self_score import score
from simam_jax.paths import local
from simam_jax.preprocessing import ORIENTATION, DetectionPreprocessing, read_upright, stored_and_upright
from simam_jax.rcnn.anchors import STRIDES, base_anchors

SHOWN = 5  # of each kind of fault, by number
PICTURED = 12  # images in a picture
_SLACK = 1.0  # pixels by which a box may leave its image, or a mask its box


@dataclass
class Report:
    """Lines for people, and whether training can start."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def say(self, name: str, text: str) -> None:
        self.lines.append(f"{name:16} {text}")

    def count(self, name: str, what: str, found: list[str] | np.ndarray, *, stops: bool = False) -> None:
        """Says how many there are and names the first; `stops`: training cannot start with them."""
        names = [str(each) for each in found]
        if names:
            more = ", ..." if len(names) > SHOWN else ""
            text = f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}"
            self.say(name, text)
            if stops:
                self.faults.append(f"{name}: {text}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m simam_jax.data.check", description=__doc__)
    parser.add_argument("--annotations", required=True, help="the json")
    parser.add_argument("--images", required=True, help="the folder of its images")
    parser.add_argument("--min-size", type=int, default=800, help="config.data.min_size (default 800)")
    parser.add_argument("--max-size", type=int, default=1333, help="config.data.max_size (default 1333)")
    parser.add_argument("--buckets", type=int, default=6, help="config.data.buckets (default 6)")
    parser.add_argument("--picture", help="draw the ground truth of some images into this file, a .png or .jpg")
    parser.add_argument(
        "--score", action="store_true", help="score the ground truth against itself, which must give 1.0"
    )
    args = parser.parse_args(argv)
    index, folder = read_index(args.annotations), local(args.images)
    report = check(index, folder, DetectionPreprocessing(args.min_size, args.max_size, buckets=args.buckets))
    print("\n".join(report.lines))
    if args.score:
        print(score(index))
    if args.picture:
        print("\n".join(draw(index, folder, local(args.picture))))
    print("Training cannot start: " + "; ".join(report.faults) if report.faults else "Training can start.")
    return 1 if report.faults else 0


def check(index: Index, folder: Path, preprocessing: DetectionPreprocessing) -> Report:
    """Everything that can be said of the data before training."""
    report, image_of = Report(), index.image_of()
    seen, per_image = coco.select_for_training(index), np.diff(index.first)
    counts = Counter(index.labels[~index.crowd].tolist())
    report.say("images", f"{len(index.files)}, {int((per_image == 0).sum())} without annotations")
    if len(index.sizes):
        low, high = index.sizes.min(0), index.sizes.max(0)
        report.say("sizes", f"{low[0]} to {high[0]} pixels high, {low[1]} to {high[1]} wide")
    report.say("annotations", f"{len(index.boxes)}, {int(index.crowd.sum())} of crowds")
    for label, name in enumerate(index.class_names):
        report.say("  class", f"{counts[label]:8} {name}")
    own = [int(seen.annotations[a:b].sum()) for a, b in zip(index.first[:-1], index.first[1:], strict=True)]
    report.say("objects", f"{int(seen.annotations.sum())} to learn from, at most {max(own, default=0)} in an image")
    for reason, count in seen.left_out.items():
        report.say("left out", f"{count} {reason}")
    if not len(seen.images):
        report.count(
            "images", "images to learn from are missing", ["none has an annotation of a listed category"], stops=True
        )
    shapes = Counter(preprocessing.bucket(*preprocessing.resized(*size)) for size in index.sizes[seen.images].tolist())
    for (height, width), count in sorted(shapes.items()):
        report.say("  bucket", f"{count:8} images are padded to {height} x {width}")

    _check_boxes(report, index, image_of)
    _check_masks(report, index, image_of)
    _check_files(report, index, folder)
    if seen.annotations.any():
        best = anchor_overlap(index, seen.annotations, image_of, preprocessing)
        half, most = (100 * (best >= least).mean() for least in (0.5, 0.7))
        report.say(
            "anchors",
            f"overlap {half:.1f} % of the objects by 0.5 and {most:.1f} % by 0.7, {best.mean():.2f} in the mean",
        )
    return report


def _check_boxes(report: Report, index: Index, image_of: np.ndarray) -> None:
    x, y, w, h = index.boxes.T
    height, width = index.sizes[image_of].T
    outside = (x < -_SLACK) | (y < -_SLACK) | (x + w > width + _SLACK) | (y + h > height + _SLACK)
    report.count("boxes", "leave their image (cut to it), annotation", index.annotation_ids[outside])
    report.count(
        "boxes", "are narrower or lower than a pixel (left out), annotation", index.annotation_ids[(w < 1) | (h < 1)]
    )
    if coco.looks_like_corners(index):
        report.count("boxes", "annotations look like x y x y, where COCO has x y width height", ["all"], stops=True)


def _check_masks(report: Report, index: Index, image_of: np.ndarray) -> None:
    lengths = np.diff(index.segmentation_ends)
    if not lengths.any():
        report.say("masks", "none: for a Faster R-CNN")
        return
    report.count("masks", "annotations without one (a Mask R-CNN needs them)", index.annotation_ids[lengths == 0])
    unreadable, elsewhere = [], []
    for a in _progress("masks", np.flatnonzero(lengths).tolist()):
        number, (height, width) = int(index.annotation_ids[a]), index.sizes[image_of[a]].tolist()
        try:
            mask = coco_masks.mask_of(index.segmentation(a), height, width)
        except errors.UserError as error:
            unreadable.append(f"{number} ({str(error).rstrip('.')})")
            continue
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            elsewhere.append(number)
            continue
        x, y, w, h = index.boxes[a]
        away = columns[0] - x, rows[0] - y, columns[-1] + 1 - (x + w), rows[-1] + 1 - (y + h)
        if np.abs(away).max() > max(4 * _SLACK, 0.05 * max(w, h)):
            elsewhere.append(number)
    report.count("masks", "cannot be read, annotation", unreadable, stops=True)
    report.count("masks", "do not fit their boxes, annotation", elsewhere)


def _check_files(report: Report, index: Index, folder: Path) -> None:
    from PIL import Image

    missing = coco.missing_files(index, folder)
    report.count("files", f"are not in {folder}", missing, stops=True)
    gone, unreadable, tagged, stored, lying, other = set(missing), [], [], [], [], []
    for file, size in _progress("files", list(zip(index.files, index.sizes.tolist(), strict=True))):
        if file in gone:
            continue
        try:
            with Image.open(folder / file) as image:
                if image.mode == "F":
                    raise errors.UserError("floating-point values: save it with 8 or 16 bits a value")
                found, turned = map(list, stored_and_upright(image))
                tag = image.getexif().get(ORIENTATION, 1)
        except Exception as error:  # damaged files make PIL raise anything
            unreadable.append(f"{file} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
            continue
        if size == turned:
            tagged += [file] if 1 < tag <= 8 else []
        elif size == found:
            stored.append(file)
        else:
            (lying if size == found[::-1] else other).append(file)
    report.count("files", "cannot be read", unreadable, stops=True)
    report.count("files", "are turned as their EXIF tag says, which the json agrees with", tagged)
    report.count(
        "files",
        "have an EXIF tag that turns them, but the json is of them as they are stored: so are they read",
        stored,
    )
    report.count("files", "lie on their side, without an EXIF tag that says so; save them upright", lying, stops=True)
    report.count("files", "are of another size than the json says", other, stops=True)


def anchor_overlap(
    index: Index, which: np.ndarray, image_of: np.ndarray, preprocessing: DetectionPreprocessing
) -> np.ndarray:
    """(objects,) the largest IoU of any anchor with each object's box, cut to its image as for training, when resized.

    Of all anchors of a shape the one whose centre is nearest overlaps a box the most.
    """
    sizes = index.sizes[image_of[which]]
    resized = np.array([preprocessing.resized(*size) for size in sizes.tolist()])
    scale = (resized / sizes)[:, ::-1]
    x1y1, x2y2 = index.boxes[which, :2], index.boxes[which, :2] + index.boxes[which, 2:]
    corner, end = (points.clip(0, sizes[:, ::-1]) * scale for points in (x1y1, x2y2))
    side = end - corner
    centre, best = corner + side / 2, np.zeros(len(side))
    for stride in STRIDES:
        last = -(-resized[:, ::-1] // stride) - 1
        nearest = np.clip(np.rint(centre / stride), 0, last) * stride
        for x1, y1, x2, y2 in base_anchors(stride):
            low = np.maximum(np.add(nearest, (x1, y1)), corner)
            high = np.minimum(np.add(nearest, (x2, y2)), corner + side)
            inter = np.clip(high - low, 0, None).prod(1)
            best = np.maximum(best, inter / ((x2 - x1) * (y2 - y1) + side.prod(1) - inter))
    return best


def draw(index: Index, folder: Path, path: Path) -> list[str]:
    """Draws boxes and class names of some images, evenly chosen, into one picture; lines that say what was drawn.

    Raises:
        UserError: the picture cannot be written.
    """
    from PIL import Image, ImageDraw

    chosen = np.unique(np.linspace(0, len(index.files) - 1, PICTURED).round().astype(int)) if index.files else []
    tiles, lines, side = [], [], 400
    for place in chosen:
        try:
            image = read_upright(folder / index.files[place], tuple(index.sizes[place].tolist()))
        except errors.UserError as error:
            lines.append(f"{'picture':16} without {index.files[place]}: {error}")
            continue
        pen, factor = ImageDraw.Draw(image), max(image.size) / side
        for a in range(index.first[place], index.first[place + 1]):
            x, y, w, h = index.boxes[a].tolist()
            name = index.class_names[index.labels[a]] if index.labels[a] >= 0 else "?"
            colour = "orange" if index.crowd[a] else "lime"
            pen.rectangle((x, y, x + max(w, 0), y + max(h, 0)), outline=colour, width=max(round(2 * factor), 1))
            pen.text(
                (x + 2 * factor, y),
                name,
                fill=colour,
                font_size=max(12 * factor, 8),
                stroke_width=round(factor),
                stroke_fill="black",
            )
        image.thumbnail((side, side))
        tiles.append(image)
    if not tiles:
        return [*lines, f"{'picture':16} none: there is no image to draw"]
    columns = min(4, len(tiles))
    sheet = Image.new("RGB", (columns * side, -(-len(tiles) // columns) * side))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * side, i // columns * side))
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise errors.UserError(f"The picture {path} cannot be written: {error}.") from error
    return [*lines, f"{'picture':16} {path}"]


def _progress(name: str, items: list[Any]) -> Iterator[Any]:
    """The items, with a line that counts them on a terminal."""
    shown = sys.stderr.isatty()
    for i, item in enumerate(items, 1):
        if shown and (i % 100 == 0 or i == len(items)):
            print(f"\r\x1b[K{name} {i}/{len(items)}", end="" if i < len(items) else "\n", file=sys.stderr, flush=True)
        yield item


if __name__ == "__main__":
    errors.run_cli(main)
