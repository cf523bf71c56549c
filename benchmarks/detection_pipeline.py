"""How quickly training images of a detector are made ready, beside PIL with pycocotools, in images per CPU-second.

    python -m benchmarks.detection_pipeline

Photographs of 427 x 640 pixels with 7 polygons each, shorter side 800, mirrored every second time, in one thread. The peer
does what torchvision's reference loader does: PIL decodes and resizes, pycocotools makes the masks, pixels become float32.
Ours hands over uint8 pixels in their bucket and packed masks; normalising is left to the device.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from pycocotools import mask as mask_utils
from sklearn.datasets import load_sample_images

from benchmarks import measure
from simam_jax.data.detection_sources import open_examples
from simam_jax.detection.rows import Layout, View, train_row
from simam_jax.errors import run_cli
from simam_jax.preprocessing import COCO

POLYGONS = 7  # COCO's mean
MEAN, STD = np.array(COCO.mean, np.float32), np.array(COCO.std, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each contestant runs (default 5)")
    parser.add_argument("--count", type=int, default=40, help="images per run (default 40)")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        written = _write(Path(folder))
        for masks in (False, True):
            contestants = {"PIL": _pil(written, masks), "ours": _ours(written, masks)}
            times: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(args.rounds + 1):
                for name, load in contestants.items():
                    times[name].append(_cpu_seconds(load, args.count))
            ours, theirs = (times[name][1:] for name in ("ours", "PIL"))  # the first round warms up
            rows.append(
                {
                    "network": "Mask R-CNN" if masks else "Faster R-CNN",
                    "images per CPU-second": args.count / statistics.median(ours),
                    "over PIL and pycocotools": measure.ratio(theirs, ours),
                }
            )
            print(measure.table(rows[-1:]), flush=True)
    measure.write("detection_pipeline", rows, rounds=args.rounds, count=args.count)


def _cpu_seconds(load: Callable[[int], object], count: int) -> float:
    start = time.process_time()
    for i in range(count):
        load(i)
    return time.process_time() - start


def _write(folder: Path) -> ConfigDict:
    """COCO data of scikit-learn's two photographs; the config that names them."""
    rng, images, annotations = np.random.default_rng(0), [], []
    for number, pixels in enumerate(load_sample_images().images):
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=92)
        height, width = pixels.shape[:2]
        images.append({"id": number, "file_name": f"{number}.jpg", "height": height, "width": width})
        for _ in range(POLYGONS):
            angles = np.sort(rng.uniform(0, 2 * np.pi, 24))
            radius, centre = rng.uniform(20, 90), rng.uniform((90, 90), (width - 90, height - 90))
            points = centre + radius * rng.uniform(0.6, 1, (24, 1)) * np.stack((np.cos(angles), np.sin(angles)), -1)
            (x, y), (x2, y2) = points.min(0), points.max(0)
            box = [float(v) for v in (x, y, x2 - x, y2 - y)]
            of = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": 1,
                "iscrowd": 0,
                "area": box[2] * box[3],
            }
            annotations.append(of | {"bbox": box, "segmentation": [points.reshape(-1).tolist()]})
    found = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "all.json").write_text(json.dumps(found))
    os.environ["XDG_CACHE_HOME"] = str(folder)
    own = {
        "train_annotations": str(folder / "all.json"),
        "train_images": str(folder),
        "train_split": "",
        "data_dir": "",
    }
    return ConfigDict({"source": "coco"} | own)


def _ours(config: ConfigDict, masks: bool) -> Callable[[int], object]:
    examples = open_examples(config, "train", masks=masks)
    layout = Layout(COCO.bucket(800, 1199), examples.most_objects, masks)
    return lambda i: train_row(examples.read(i % 2), COCO, layout, View(mirrored=bool(i % 2)))


def _pil(config: ConfigDict, masks: bool) -> Callable[[int], object]:
    found = json.loads(Path(config.train_annotations).read_text())
    files = [(Path(config.train_images) / image["file_name"]).read_bytes() for image in found["images"]]

    def load(i: int) -> object:
        number = i % 2
        image = Image.open(io.BytesIO(files[number])).convert("RGB")
        width, height = image.size
        size = COCO.resized(height, width)
        across = size[1], size[0]
        resized = image.resize(across, Image.Resampling.BILINEAR)
        own = [a for a in found["annotations"] if a["image_id"] == number]
        bitmaps = []
        for annotation in own if masks else ():
            rle = mask_utils.merge(mask_utils.frPyObjects(annotation["segmentation"], height, width))
            bitmap = Image.fromarray(mask_utils.decode(rle)).resize(across, Image.Resampling.NEAREST)
            bitmaps.append(np.asarray(bitmap))
        if i % 2:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            bitmaps = [bitmap[:, ::-1] for bitmap in bitmaps]
        pixels = (np.asarray(resized, np.float32) / 255 - MEAN) / STD
        padded = np.zeros((*COCO.bucket(*size), 3), np.float32)
        padded[: size[0], : size[1]] = pixels
        return padded, np.array(bitmaps)

    return load


if __name__ == "__main__":
    run_cli(main)
