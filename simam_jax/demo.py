"""A trained network in the browser, on Gradio: `python -m simam_jax.demo --checkpoint PATH`.

"Use via API" at the foot of the page says how programs ask it. This file is a Hugging Face Space as it is: copy it there as
app.py, beside it a workdir and a requirements.txt with simam-jax[demo]; the Space's variable SIMAM_CHECKPOINT names the workdir.
"""

import argparse
import dataclasses
import functools
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from simam_jax import errors, preprocessing
from simam_jax.classification import explain, figures, predictions
from simam_jax.command_line import add_checkpoint_arguments, load_predictor, run_compiling
from simam_jax.detection.drawing import OPACITY, class_colour
from simam_jax.inference import ClassifierPredictor, Predictor

MAX_WAITING = 64  # images: whoever comes then is told that the queue is full; what came is deleted after an hour
MAX_SIDE = 1600  # pixels of what a detector is shown: a hundred masks of more are gigabytes
LAUNCH = {"max_file_size": 20 * 2**20, "show_error": True, "quiet": True, "share": False, "run_history": False}


def look(predictor: ClassifierPredictor, image: Any) -> tuple[Any, ...]:
    """The five likeliest classes of an image, SimAM's weights in the last layer (None without SimAM) and Grad-CAM."""
    pixels = predictor.preprocessing(image)[None]
    results = predictions.Predictions(np.asarray(predictor.probabilities(pixels)), predictor.class_names)
    (best,), (seen,) = results.top(5), map(np.asarray, results.draw(pixels))
    network = predictor.model, predictor.variables, predictor.normalized(pixels)
    last = [weights[0].mean(-1) for weights in explain.attention_weights(*network).values()][-1:] or [None]
    heats = *last, explain.grad_cam(*network, results.probabilities.argmax(1))[0]
    return dict(best), *(None if heat is None else figures.overlay(seen, np.asarray(heat)) for heat in heats)


def page(predictor: Predictor) -> Any:
    """The page of a network: a `gradio.Blocks`, to be launched with `LAUNCH`."""
    import gradio as gr

    def read(path, how=preprocessing.read_rgb):
        path = Path(path or "nothing")
        try:
            if Path(image.GRADIO_CACHE).resolve() not in path.resolve().parents:
                raise errors.UserError(f"{path} was not uploaded.")
            return how(path)
        except errors.UserError as error:
            raise gr.Error(str(error).replace(str(path), path.name), print_exception=False) from error

    def classify(photograph):
        """The five likeliest classes of an image, and where the network looks: SimAM's weights and Grad-CAM."""
        return look(predictor, read(photograph["path"])) if photograph else (None, None, None)  # pyright: ignore[reportArgumentType]

    @functools.lru_cache(maxsize=1)  # Gradio's path has the file's hash: another score is not another image
    def find(path):
        photograph = read(path, preprocessing.read_upright)
        photograph.thumbnail((MAX_SIDE, MAX_SIDE))
        return np.asarray(photograph), predictor(photograph)[0]

    def detect(photograph, score, classes):
        """The objects in an image whose score is at least `score`: of some classes or, where none are named, of all."""
        if not photograph:
            return None, None
        pixels, found = find(photograph["path"])
        found = found.chosen(score, classes or None)
        picture = dataclasses.replace(found, segmentation=None).draw(pixels, threshold=0)
        layers = [(OPACITY * mask, name) for name, mask in found.covered(pixels.shape[:2], picture.size).items()]
        return (picture, layers), [[row["class"], round(row["score"], 3), *row["box"]] for row in found.rows()]

    def click(classes, event: gr.SelectData):
        return [] if classes == [event.value] else [event.value]

    title, names, sklearn = predictor.model.architecture, predictor.class_names, find_spec("sklearn")
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as blocks, gr.Row():
        with gr.Column():
            gr.Markdown(f"# {title}\n{figures.TITLES[predictor.model.attention]}, {len(names):,} classes")
            image = gr.Image(label="Photograph", sources=["upload", "webcam", "clipboard"], type="filepath")
            if sklearn and (images := sorted(Path(sklearn.origin or "").parent.glob("datasets/images/*.jpg"))):
                gr.Examples([[str(path)] for path in images], image)
        with gr.Column():  # Gradio's preprocessing is left out: it has no message for what is no image
            if isinstance(predictor, ClassifierPredictor):
                top, there = gr.Label(label="The likeliest classes"), predictor.model.attention == "simam"
                with gr.Row():
                    attention = gr.Image(label="SimAM, last layer", visible=there, buttons=[])
                    cam = gr.Image(label="Grad-CAM", buttons=[])
                image.change(classify, image, [top, attention, cam], preprocess=False)
            else:
                colours = {name: "#{:02x}{:02x}{:02x}".format(*class_colour(i)) for i, name in enumerate(names)}
                objects = gr.AnnotatedImage(label="Click a class to see it alone", color_map=colours)
                score = gr.Slider(0, 1, 0.3, step=0.05, label="The least score")
                classes = gr.Dropdown(list(names), value=[], multiselect=True, label="Only these classes")
                table = gr.Dataframe(headers=["class", "score", "x1", "y1", "x2", "y2"], label="Objects, in pixels")
                inputs, outputs = [image, score, classes], [objects, table]
                gr.on([each.change for each in inputs], detect, inputs, outputs, preprocess=False)
                objects.select(click, classes, classes, queue=False, api_visibility="private")
    return blocks.queue(max_size=MAX_WAITING, api_open=False)


def main(argv: list[str] | None = None) -> None:
    import gradio  # noqa: F401 - if it is missing, say so before the weights are read

    parser = argparse.ArgumentParser(prog="python -m simam_jax.demo", description="A page of what a network sees.")
    add_checkpoint_arguments(parser, default=os.environ.get("SIMAM_CHECKPOINT"))
    parser.add_argument("--host", help="where to listen (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, help="default: the first that is free from 7860 on")
    args = parser.parse_args(argv)
    blocks = page(load_predictor(args))
    try:
        blocks.launch(server_name=args.host, server_port=args.port, prevent_thread_lock=True, **LAUNCH)
    except (OSError, OverflowError) as error:
        raise errors.UserError(f"Nothing can listen at --host={args.host} --port={args.port}: {error}") from error
    print(f"{blocks.title} is at {blocks.local_url} until Ctrl-C.", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    run_compiling(main)
