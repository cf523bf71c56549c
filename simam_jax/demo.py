"""A trained network in the browser: `python -m simam_jax.demo --checkpoint PATH`, from the standard library alone."""

import argparse
import base64
import html
import io
import json
import re
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from simam_jax import checkpoints, errors
from simam_jax.classification import explain, figures
from simam_jax.classification.predictions import Predictions
from simam_jax.command_line import add_checkpoint_arguments, load_classifier

if TYPE_CHECKING:
    from PIL import Image

    from simam_jax.inference import ClassifierPredictor

MAX_BYTES = 20_000_000  # of an upload


def look(predictor: "ClassifierPredictor", upload: bytes) -> dict[str, Any]:
    """What the page shows of an image file.

    Returns:
        JSON: "top", the five likeliest classes with their probabilities; "image", what the network saw, and "attention",
        SimAM's weights over it (None for networks without), as data URLs; "layer", where those are from, and "range", their
        lowest and highest value.

    Raises:
        UserError: the upload is no image that can be read.
    """
    if not upload:
        raise errors.UserError("The file is empty.")
    pixels = predictor.preprocessing(upload)
    probabilities = np.asarray(predictor.probabilities(pixels[None]))
    results = Predictions(probabilities, predictor.class_names)
    (top,), (shown,) = results.rows(5), results.draw(pixels[None])
    seen = {
        "top": top,
        "image": _data_url(shown),
        "attention": None,
    }
    if weights := explain.attention_weights(predictor.model, predictor.variables, predictor.normalized(pixels[None])):
        layer, last = list(weights.items())[-1]
        heat = np.asarray(last[0], np.float32).mean(-1)
        seen |= {
            "attention": _data_url(figures.overlay(np.asarray(shown), heat)),
            "layer": layer,
            "range": [float(heat.min()), float(heat.max())],
        }
    return seen


def _data_url(image: "Image.Image") -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Server(ThreadingHTTPServer):
    """Serves the page at / and answers images posted to /look; `predictor` and `page` are set before `serve_forever`."""

    daemon_threads = True
    predictor: "ClassifierPredictor"
    page: bytes

    def __init__(self, host: str, port: int):
        """Raises UserError where nothing can listen there."""
        self.one_at_a_time = threading.Lock()  # an image can take half a gigabyte
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise errors.UserError(f"Nothing can listen at {host}:{port}: {error}. Name another --port.") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that went away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60  # seconds without a byte

    def do_GET(self) -> None:
        if self.path != "/":
            return self._answer(HTTPStatus.NOT_FOUND, {"error": "There is nothing here: open / instead."})
        return self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/look":
            return self._answer(HTTPStatus.NOT_FOUND, {"error": "Images are posted to /look."})
        if not re.fullmatch(r"\d{1,18}", length):
            return self._answer(HTTPStatus.LENGTH_REQUIRED, {"error": "The upload does not say how long it is."})
        if int(length) > MAX_BYTES:
            self._throw_away(int(length))
            message = f"The file is larger than {MAX_BYTES // 1_000_000} MB: make the image smaller first."
            return self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": message})
        upload = self.rfile.read(int(length))
        try:
            with self.server.one_at_a_time:
                seen = look(self.server.predictor, upload)
        except errors.UserError as error:
            return self._answer(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except Exception:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "The demo failed; its terminal says how."})
            raise
        return self._answer(HTTPStatus.OK, seen)

    def _throw_away(self, length: int) -> None:
        """Browsers read the answer only once they have sent everything."""
        while length > 0 and (part := self.rfile.read(min(length, 2**20))):
            length -= len(part)

    def _answer(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what goes wrong."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simam_jax.demo",
        description="Drop a picture on a page and see what a trained network sees in it.",
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default 8000)")
    args = parser.parse_args(argv)
    try:
        with Server(args.host, args.port) as server:  # before the network is loaded: the port may be taken
            server.predictor = load_classifier(args)
            name = args.model or str(checkpoints.read_meta(args.checkpoint)["model"]["name"])
            server.page = page(name, server.predictor)
            look(server.predictor, _blank())  # compiles
            print(f"{name} is at http://{args.host}:{server.server_port} until Ctrl-C.", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print()


def _blank() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def page(name: str, predictor: "ClassifierPredictor") -> bytes:
    """The page for the network of that name: one HTML document that needs nothing else."""
    attention: str = predictor.model.attention  # pyright: ignore[reportAttributeAccessIssue]
    facts = {
        "NAME": name,
        "ATTENTION": figures.TITLES[attention],
        "CLASSES": f"{len(predictor.class_names):,}",
        "SIZE": str(predictor.preprocessing.image_size),
        "MAX_BYTES": str(MAX_BYTES),
        "MAX_MB": str(MAX_BYTES // 1_000_000),
    }
    template = resources.files("simam_jax").joinpath("demo.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: html.escape(facts[match[1]]), template).encode()


_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


if __name__ == "__main__":
    errors.run_cli(main)
