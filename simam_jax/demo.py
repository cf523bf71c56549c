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
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from simam_jax import checkpoints, errors
from simam_jax.command_line import add_model_arguments, load_predictor
from simam_jax.inference import Predictions, Predictor
from simam_jax.preprocessing import MAX_PIXELS
from simam_jax.visualize import TITLES, attention_weights, overlay

MAX_BYTES = 20_000_000  # of an upload
SHOWN = 336  # pixels: smaller images are enlarged before a heat map is laid over them


def look(predictor: Predictor, upload: bytes) -> dict[str, Any]:
    """What the page shows of an image file.

    Returns:
        JSON: "top", the five likeliest classes with their probabilities; "image", what the network saw, and "attention",
        SimAM's weights over it (None for networks without), as data URLs; "layer", where those are from, and "range", their
        lowest and highest value.

    Raises:
        UserError: the upload is no image that can be read.
    """
    pixels = predictor.preprocessing(_decode(upload))
    probabilities = np.asarray(predictor.probabilities(pixels[None]))
    (top,) = Predictions(probabilities, predictor.class_names).top(5)
    shown = Image.fromarray(pixels)
    if shown.width < SHOWN:
        shown = shown.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)
    seen = {
        "top": [{"class": name, "probability": probability} for name, probability in top],
        "image": _data_url(shown),
        "attention": None,
    }
    if weights := attention_weights(predictor.model, predictor.variables, predictor.normalized(pixels[None])):
        layer, last = list(weights.items())[-1]
        heat = np.asarray(last[0], np.float32).mean(-1)
        seen |= {
            "attention": _data_url(overlay(np.asarray(shown), heat)),
            "layer": layer,
            "range": [float(heat.min()), float(heat.max())],
        }
    return seen


def _decode(upload: bytes) -> Image.Image:
    if not upload:
        raise errors.UserError("The file is empty.")
    try:
        with Image.open(io.BytesIO(upload)) as image:
            return ImageOps.exif_transpose(image)  # turned as the browser shows it
    except Image.DecompressionBombError as error:
        raise errors.UserError(f"The image has more than {MAX_PIXELS:,} pixels: make it smaller first.") from error
    except Exception as error:  # broken files make decoders raise anything
        raise errors.UserError(
            "This is no image, or a damaged one, or of a kind that is not read. JPEG, PNG, WebP, GIF, BMP and TIFF are."
        ) from error


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Server(ThreadingHTTPServer):
    """Serves the page at / and answers images posted to /look; `predictor` and `page` are set before `serve_forever`."""

    daemon_threads = True
    predictor: Predictor
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
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default 8000)")
    args = parser.parse_args(argv)
    try:
        with Server(args.host, args.port) as server:  # before the network is loaded: the port may be taken
            server.predictor = load_predictor(args)
            name = args.model or str(checkpoints.read_meta(args.checkpoint)["model"]["name"])
            server.page = page(name, server.predictor)
            look(server.predictor, _blank())  # compiles
            print(f"{name} is at http://{args.host}:{server.server_port} until Ctrl-C.", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print()


def _blank() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def page(name: str, predictor: Predictor) -> bytes:
    """The page for the network of that name: one HTML document that needs nothing else."""
    attention: str = predictor.model.attention  # pyright: ignore[reportAttributeAccessIssue]
    facts = {
        "NAME": name,
        "ATTENTION": TITLES[attention],
        "CLASSES": f"{len(predictor.class_names):,}",
        "SIZE": str(predictor.preprocessing.image_size),
        "MAX_BYTES": str(MAX_BYTES),
        "MAX_MB": str(MAX_BYTES // 1_000_000),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: html.escape(facts[match[1]]), _PAGE).encode()


_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{NAME}}</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --ink: #1d1b22; --soft: #5f5b68; --line: #d8d4df;
  --accent: #6d28a8; --bar: #b48ad6; --bad: #a3142b; --bad-paper: #fdecee; }
@media (prefers-color-scheme: dark) { :root { --paper: #16141a; --card: #201d26; --ink: #f1eef5; --soft: #aea8ba;
  --line: #3b3645; --accent: #c79bf0; --bar: #7443a3; --bad: #ffb3bd; --bad-paper: #3d1a21; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 .75rem; font-size: 1.1rem; }
p { margin: .25rem 0 0; }
.soft, figcaption { color: var(--soft); }
.drop { display: block; margin: 1.5rem 0 1rem; padding: 2rem 1rem; text-align: center; cursor: pointer;
  background: var(--card); border: 2px dashed var(--soft); border-radius: .75rem; }
.drop:hover, .drop.over { border-color: var(--accent); }
.drop:focus-within { outline: 3px solid var(--accent); outline-offset: 2px; }
.drop input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.drop strong { color: var(--accent); }
.drop span { display: block; }
[role=alert]:not(:empty) { padding: .75rem 1rem; border-radius: .5rem; background: var(--bad-paper); color: var(--bad); }
[role=status] { min-height: 1.5rem; margin: .25rem 0 .5rem; color: var(--soft); overflow-wrap: anywhere; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.card { padding: 1.25rem; background: var(--card); border: 1px solid var(--line); border-radius: .75rem; }
.wide { grid-column: 1 / -1; }
ol { margin: 0; padding: 0; list-style: none; }
li + li { margin-top: .75rem; }
li div { display: flex; justify-content: space-between; gap: 1rem; overflow-wrap: anywhere; }
li:first-child div { font-weight: 650; }
li div span + span { font-variant-numeric: tabular-nums; white-space: nowrap; }
.track { height: .625rem; border-radius: .3125rem; background: var(--line); overflow: hidden; }
.track i { display: block; height: 100%; min-width: 2px; background: var(--bar); }
li:first-child .track i { background: var(--accent); }
figure { margin: 0; }
figure img { display: block; width: 100%; border-radius: .5rem; }
figcaption { margin-top: .5rem; font-size: .9rem; }
.scale { display: inline-block; width: 4rem; height: .625rem; border-radius: .3125rem; vertical-align: baseline;
  background: linear-gradient(90deg, #000004, #57106e, #bc3754, #f98e09, #fcffa4); }
[hidden] { display: none; }
</style>
</head>
<body>
<main>
<h1>{{NAME}}</h1>
<p class="soft">{{ATTENTION}}, {{CLASSES}} classes, {{SIZE}} &times; {{SIZE}} pixels</p>
<label class="drop" id="drop">
  <input type="file" id="file" accept="image/*" aria-describedby="limit">
  <span><strong>Choose a picture</strong> or drop one here</span>
  <span class="soft" id="limit">JPEG, PNG, WebP and others, up to {{MAX_MB}} MB. It stays on the computer that runs this demo.</span>
</label>
<div role="alert" id="alert"></div>
<p role="status" id="status"></p>
<div class="cards" id="result" hidden>
  <section class="card wide" aria-labelledby="top-title">
    <h2 id="top-title">What it is</h2>
    <ol id="top"></ol>
  </section>
  <figure class="card"><img id="image" alt="The part of the picture that the network sees">
    <figcaption>What the network sees</figcaption></figure>
  <figure class="card" id="attention-card"><img id="attention" alt="The same with SimAM's weights as colours over it">
    <figcaption>SimAM's weights in <span id="layer"></span>, mean over the channels:
      <span id="low"></span> <span class="scale"></span> <span id="high"></span></figcaption></figure>
</div>
</main>
<script>
"use strict";
const get = id => document.getElementById(id);
const drop = get("drop"), file = get("file"), result = get("result");
let latest = 0;

function row({class: name, probability}) {
  const percent = (100 * probability).toFixed(1) + " %";
  const item = document.createElement("li"), line = document.createElement("div");
  for (const text of [name, percent]) line.append(Object.assign(document.createElement("span"), {textContent: text}));
  const track = Object.assign(document.createElement("div"), {className: "track"}), bar = document.createElement("i");
  bar.style.width = percent.replace(" ", "");
  track.append(bar);
  item.append(line, track);
  return item;
}

function show(seen) {
  get("top").replaceChildren(...seen.top.map(row));
  get("image").src = seen.image;
  get("attention-card").hidden = !seen.attention;
  if (seen.attention) {
    get("attention").src = seen.attention;
    get("layer").textContent = seen.layer;
    [get("low").textContent, get("high").textContent] = seen.range.map(x => x.toFixed(3));
  }
}

async function ask(picture) {
  if (picture.size > {{MAX_BYTES}}) throw new Error("The file is larger than {{MAX_MB}} MB: make the image smaller first.");
  let answer;
  try {
    answer = await (await fetch("look", {method: "POST", body: picture})).json();
  } catch {
    throw new Error("The demo does not answer. Is it still running?");
  }
  if (answer.error) throw new Error(answer.error);
  return answer;
}

async function look(picture) {
  const mine = ++latest;  // a picture that was dropped later has the last word
  get("alert").textContent = "";
  get("status").textContent = "Looking at " + picture.name + " …";
  try {
    const seen = await ask(picture);
    if (mine !== latest) return;
    show(seen);
    get("status").textContent = picture.name;
    result.hidden = false;
  } catch (error) {
    if (mine !== latest) return;
    get("status").textContent = "";
    get("alert").textContent = picture.name + ": " + error.message;
    result.hidden = true;
  }
}

file.addEventListener("change", () => {
  if (file.files.length) look(file.files[0]);
  file.value = "";  // so that the same picture can be chosen again
});
addEventListener("dragover", event => { event.preventDefault(); drop.classList.add("over"); });
addEventListener("dragleave", event => { if (!event.relatedTarget) drop.classList.remove("over"); });
addEventListener("drop", event => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files.length) look(event.dataTransfer.files[0]);
});
</script>
</body>
</html>
"""


if __name__ == "__main__":
    errors.run_cli(main)
