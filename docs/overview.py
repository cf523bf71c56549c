"""The picture at the top of the README, from the test scenes of runs/scenes: python -m docs.overview [WORKDIR] [OUTPUT]"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs.digit_scenes_mask_rcnn import get_config
from simam_jax import Predictor
from simam_jax.classification.explain import attention_weights
from simam_jax.classification.figures import overlay
from simam_jax.data.detection_sources import open_examples
from simam_jax.detection.apply import prepared
from simam_jax.preprocessing import read_rgb

SCENES = (39, 20)  # of the test
LAYERS = ("backbone/layer1_0", "backbone/layer2_0", "backbone/layer3_0")
SIDE, GAP = 240, 6  # pixels


def main(workdir: str = "runs/scenes", output: str = "docs/images/overview.jpg") -> None:
    """Writes a row for each scene: the photograph, SimAM's weights in three layers, and what is found with a score of 0.9."""
    predictor: Any = Predictor.load(workdir)
    preprocessing = predictor.preprocessing
    examples = open_examples(get_config().data, "eval", masks=False)
    rows = []
    for index in SCENES:
        pixels = np.asarray(read_rgb(examples.read(index).image).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        seen = preprocessing(pixels).pixels[None]  # a square has no padding
        images = prepared(seen, [seen.shape[1:3]], preprocessing.mean, preprocessing.std, predictor.model.dtype)
        weights = attention_weights(predictor.model, predictor.variables, images, method="pyramid")
        heats = [overlay(pixels, np.asarray(weights[layer][0]).mean(-1)) for layer in LAYERS]
        (found,) = predictor(pixels)
        rows.append([Image.fromarray(pixels), *heats, found.draw(pixels, threshold=0.9)])
    picture = Image.new("RGB", (len(rows[0]) * (SIDE + GAP) - GAP, len(rows) * (SIDE + GAP) - GAP), "white")
    for y, row in enumerate(rows):
        for x, part in enumerate(row):
            picture.paste(part.resize((SIDE, SIDE)), (x * (SIDE + GAP), y * (SIDE + GAP)))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    picture.save(output, quality=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
