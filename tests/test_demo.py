"""`python -m simam_jax.demo`: through Gradio's client and, where a browser is installed, its page clicked through."""

import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import gradio_client
import jax
import numpy as np
import pytest
from PIL import Image
from processes import ROOT, free_port, wait_for
from sklearn.datasets import load_sample_images
from trained import preprocessing, variables_of

import simam_jax
from simam_jax import demo
from simam_jax.classification.predictions import SHOWN
from simam_jax.detection.detections import Detections
from simam_jax.inference import Predictor
from simam_jax.models import init_variables

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PHOTOGRAPH = Image.fromarray(load_sample_images().images[0])
SIZES = simam_jax.DetectionPreprocessing(64, 96)
WAIT = 240  # seconds for what may have to be compiled first, beside other work
FILE = {"_type": "gradio.FileData"}


def encoded(image, kind="JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def png_that_claims(width, height) -> bytes:
    parts = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def detector(kind) -> Predictor:
    """A detector that finds things: its scores are spread."""
    model = simam_jax.create_model(f"{kind}_rcnn_tiny_fpn", num_classes=3)
    variables = init_variables(model, jax.random.key(0))
    for head, layer in (("rpn_head", "rpn_cls"), ("bbox_head", "fc_cls"), ("bbox_head", "fc_reg")):
        variables["params"][head][layer]["kernel"] *= 30
    return Predictor(model, variables, SIZES, ["cat", "dog", "bird"])


@pytest.fixture
def serve():
    """Serves a predictor's page in this process; Gradio's client of it."""
    started = []

    def start(predictor):
        started.append(demo.page(predictor))
        _, url, _ = started[-1].launch(prevent_thread_lock=True, **demo.LAUNCH)
        return gradio_client.Client(url, verbose=False, analytics_enabled=False)

    yield start
    for blocks in started:
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def space(workdir, tmp_path_factory):
    """The address of the demo as a Space runs it: the file alone, and variables. Ctrl-C ends it in good order."""
    folder = tmp_path_factory.mktemp("space")
    shutil.copy(demo.__file__, folder / "app.py")
    shutil.copytree(workdir, folder / "network")
    (folder / "watched.py").write_text(
        "import runpy, sys\n"
        "asked = ('socket.connect', 'socket.getaddrinfo')\n"
        "sys.addaudithook(lambda event, args: event in asked and print(args, flush=True))\n"
        "runpy.run_path('app.py', run_name='__main__')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "watched.py"],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        | {"SIMAM_CHECKPOINT": "network", "GRADIO_SERVER_PORT": str(free_port())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("cifar_resnet20 is at http://127.0.0.1:"):
            break
    else:
        raise AssertionError(process.stderr.read())
    yield lines[-1].split()[3]
    process.send_signal(signal.SIGINT)
    rest, complaints = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "app.py" not in complaints  # Gradio prints what it refuses itself
    assert all("127.0.0.1" in line for line in lines + rest.splitlines() if line.startswith("("))  # asked nobody else
    assert sorted(path.name for path in folder.iterdir()) == ["app.py", "network", "watched.py"]  # and left nothing


def test_what_objects_cover_is_their_masks_or_their_boxes():
    boxes = np.array([[1, 1, 3, 2], [0, 0, 2, 2], [2, 0, 4, 1]], np.float32)
    found = Detections(boxes, np.ones(3, np.float32), np.array([1, 0, 1]), None, ("cat", "dog"))
    covered = found.covered((2, 4), (8, 4))  # a picture twice as large
    assert list(covered) == ["dog", "cat"]
    assert covered["dog"][::2, ::2].tolist() == [[False, False, True, True], [False, True, True, False]]
    assert covered["cat"][::2, ::2].tolist() == [[True, True, False, False]] * 2
    masks = np.zeros((3, 2, 4), bool)
    masks[2, 1, 3] = True
    covered = dataclasses.replace(found, segmentation=masks).covered((2, 4), (4, 2))
    assert not covered["cat"].any()
    assert np.argwhere(covered["dog"]).tolist() == [[1, 3]]
    empty = Detections(boxes[:0], np.ones(0, np.float32), np.zeros(0, int), None, ("cat", "dog"))
    assert empty.covered((2, 4), (4, 2)) == {}


@pytest.mark.slow
def test_a_classifier_says_the_top_five_and_where_it_looks(space, workdir, photographs):
    client = gradio_client.Client(space, verbose=False, analytics_enabled=False)
    api = client.view_api(return_format="dict")["named_endpoints"]
    assert list(api) == ["/classify"]
    assert api["/classify"]["description"].startswith("The five likeliest classes")
    top, *pictures = client.predict(gradio_client.handle_file(photographs[0]), api_name="/classify")
    (expected,) = Predictor.load(workdir)(photographs[0]).top(5)
    assert [entry["label"] for entry in top["confidences"]] == [name for name, _ in expected]
    np.testing.assert_allclose([e["confidence"] for e in top["confidences"]], [p for _, p in expected], rtol=1e-4)
    assert len(pictures) == 2
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.size == (SHOWN, SHOWN)
            assert len(np.unique(np.asarray(image.convert("RGB")))) > 100


def test_networks_without_simam_show_grad_cam_alone():
    model = simam_jax.create_model("cifar_resnet20", num_classes=3, attention="none")
    top, attention, cam = demo.look(Predictor(model, variables_of(model), preprocessing(8)), PHOTOGRAPH)
    assert (len(top), attention, cam.size) == (3, None, (SHOWN, SHOWN))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask", "faster"])
def test_a_detector_draws_what_it_finds_and_lists_it(serve, kind, photographs):
    predictor = detector(kind)
    client, upload = serve(predictor), gradio_client.handle_file(photographs[0])
    (found,) = predictor([photographs[0]])
    (drawn, table), shown = client.predict(upload, api_name="/detect"), found.chosen(0.3)
    assert [row[0] for row in table["data"]] == shown.names
    np.testing.assert_allclose([row[1] for row in table["data"]], shown.scores, atol=1e-3)
    np.testing.assert_allclose([row[2:] for row in table["data"]], shown.boxes, atol=0.05)
    assert {layer["label"] for layer in drawn["annotations"]} == set(shown.names)
    size = shown.draw(np.asarray(PHOTOGRAPH), threshold=0).size
    with Image.open(drawn["image"]) as picture:
        assert picture.size == size
    for layer in drawn["annotations"]:
        with Image.open(layer["image"]) as image:
            wrong = (np.asarray(image)[..., 3] > 0) != shown.covered((427, 640), size)[layer["label"]]
        assert wrong.mean() < 1e-3

    drawn, table = client.predict(upload, score=0.9, classes=["cat"], api_name="/detect")
    assert [layer["label"] for layer in drawn["annotations"]] == ["cat"]
    assert len(table["data"]) == len(found.chosen(0.9, ["cat"]))
    drawn, table = client.predict(upload, score=1.1, api_name="/detect")
    assert (drawn["annotations"], table["data"]) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "upload", "message"),
    [
        ("text.jpg", b"no image at all", "text.jpg cannot be read as an image: it is damaged, or of a kind that PIL"),
        ("nothing.jpg", b"", "nothing.jpg cannot be read as an image"),
        ("half.jpg", encoded(PHOTOGRAPH)[:5000], "half.jpg cannot be read as an image: .*truncated"),
        ("half.png", encoded(PHOTOGRAPH, "PNG")[:5000], "half.png cannot be read as an image: .*truncated"),
        ("bomb.png", png_that_claims(30_000, 30_000), "bomb.png cannot be read as an image: .*900000000 pixels"),
        ("small.png", png_that_claims(14_000, 14_000), "small.png cannot be read as an image: .*pixels"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "drawing.svg cannot be read as an image"),
        ("large.jpg", bytes(demo.LAUNCH["max_file_size"] + 1), "exceeds the maximum file size"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[:12] else "",
)
def test_what_is_no_image_gets_a_message(space, tmp_path, name, upload, message):
    client = gradio_client.Client(space, verbose=False, analytics_enabled=False)
    (tmp_path / name).write_bytes(upload)
    with pytest.raises(Exception, match=message) as error:
        client.predict(gradio_client.handle_file(str(tmp_path / name)), api_name="/classify")
    assert "gradio/" not in str(error.value)  # where the server keeps uploads


def post(address, path, body, kind="application/json"):
    request = urllib.request.Request(f"{address}gradio_api/{path}", body, {"Content-Type": kind})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def join(address, photograph) -> str:
    """The number of a raw request, now in the queue."""
    return post(address, "call/classify", json.dumps({"data": [photograph]}).encode())["event_id"]


def answer_to(address, event) -> str:
    with urllib.request.urlopen(f"{address}gradio_api/call/classify/{event}") as answer:
        return answer.read().decode()


@pytest.mark.slow
def test_files_of_the_machine_are_nobodys_business(space, photographs):
    for path in (photographs[0], "/etc/passwd", "http://localhost/image.png"):
        for more in ({}, {"meta": FILE}):
            assert "event: error" in answer_to(space, join(space, {"path": path} | more))
    for what in ({"path": photographs[0]}, {"path": None, "url": "data:image/png;base64,AAAA"}):
        assert "was not uploaded" in answer_to(space, join(space, what))
    for path in (photographs[0], "/etc/passwd", str(ROOT / "README.md")):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{space}gradio_api/file={path}")


@pytest.mark.slow
def test_fifty_at_once_are_answered_and_too_many_are_told_so(space, workdir, tmp_path):
    client = gradio_client.Client(space, verbose=False, analytics_enabled=False)
    paths = [str(tmp_path / f"{i}.png") for i in range(50)]
    for i, path in enumerate(paths):
        PHOTOGRAPH.crop((4 * i, 0, 4 * i + 200, 200)).save(path)
    jobs = [client.submit(gradio_client.handle_file(path), api_name="/classify") for path in paths]
    answers = [job.result(timeout=300) for job in jobs]
    for (top, *pictures), expected in zip(answers, Predictor.load(workdir)(paths).top(5), strict=True):
        assert [entry["label"] for entry in top["confidences"]] == [name for name, _ in expected]
        assert len(pictures) == 2

    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n%s\r\n--x--\r\n'
    (path,) = post(space, "upload", part % encoded(PHOTOGRAPH), "multipart/form-data; boundary=x")

    def try_to_join(_):
        try:
            return join(space, {"path": path, "meta": FILE})
        except urllib.error.HTTPError as error:
            return error.read().decode()

    with ThreadPoolExecutor(50) as threads:
        told = list(threads.map(try_to_join, range(200)))
    assert sum("Queue is full. Max size is 64" in answer for answer in told) > 50

    def may_join():
        told.append(try_to_join(None))
        return "Queue is full" not in told[-1]

    wait_for(may_join, 120)
    assert "event: complete" in answer_to(space, told[-1])


@pytest.mark.slow
def test_wrong_requests_are_errors(workdir, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(simam_jax.UserError, match=rf"Nothing can listen at --host=None --port={port}"):
            demo.main(["--checkpoint", str(workdir), "--port", port])
    with pytest.raises(simam_jax.UserError, match=r"Nothing can listen at --host=None --port=70000"):
        demo.main(["--checkpoint", str(workdir), "--port", "70000"])
    with pytest.raises(simam_jax.UserError, match="no such folder"):
        demo.main(["--checkpoint", str(tmp_path / "nothing")])


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
needs_browser = pytest.mark.skipif(
    not (BROWSER and shutil.which("chromedriver")), reason="no chromium with chromedriver is installed"
)


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-background-networking", "disable-component-update", f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Page:
    """The page of a demo in a browser."""

    def __init__(self, driver, address, width):
        driver.set_window_size(width, 900)
        driver.get(address)
        self.driver, self.address = driver, address
        wait_for(lambda: self.all("input[type=file]"), WAIT)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector):
        """The texts at a place, [] while they are being replaced."""
        from selenium.common.exceptions import StaleElementReferenceException

        try:
            return [element.text for element in self.all(selector)]
        except StaleElementReferenceException:
            return []

    def upload(self, path):
        self.all("input[type=file]")[0].send_keys(str(path))

    def fits(self) -> bool:
        return self.driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")

    def asked(self) -> set[str]:
        """The hosts that were asked for anything, but for the browser's own pages."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        sent += [e["params"]["url"] for e in events if e["method"] == "Network.webSocketCreated"]
        return {urlsplit(url).netloc for url in sent if not url.startswith(("chrome://", "data:", "blob:"))}

    def overlays(self) -> int:
        """How many pictures of where the network looks are shown."""
        return sum(name.split("/")[-1] == "image.webp" for name in map(self.source, self.all("img")))

    def source(self, image) -> str:
        return image.get_attribute("src") or ""

    def message(self) -> str:
        return "".join(self.texts("[data-testid='toast-body']"))

    def remove(self):
        """Removes the image, and the messages."""
        for button in self.all("[data-testid='toast-close'], button[aria-label='Remove Image']"):
            button.click()
        wait_for(lambda: self.all("input[type=file]") and not self.message(), WAIT)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_of_a_classifier_in_a_browser(space, workdir, photographs, browser, tmp_path, width):
    page = Page(browser, space, width)
    assert page.texts("h1") == ["cifar_resnet20"]
    assert len(page.all("button.gallery-item")) == 2  # the examples
    page.upload(photographs[0])
    wait_for(lambda: page.overlays() == 2, WAIT)
    (expected,) = Predictor.load(workdir)(photographs[0]).top(5)
    shown = [text.split("\n")[0] for text in page.texts("[data-testid$='-confidence-set']")]
    assert shown == [name for name, _ in expected]
    assert page.fits()

    page.remove()
    (tmp_path / "text.jpg").write_text("no image at all")
    page.upload(tmp_path / "text.jpg")
    wait_for(lambda: "text.jpg cannot be read as an image: it is damaged" in page.message(), WAIT)
    page.remove()
    (tmp_path / "large.jpg").write_bytes(bytes(demo.LAUNCH["max_file_size"] + 1))
    page.upload(tmp_path / "large.jpg")
    wait_for(lambda: "exceed the maximum allowed size of 20.0 Mb" in page.message(), WAIT)

    page = Page(browser, space, width)
    page.all("button.gallery-item")[1].click()  # an example, the flower
    wait_for(lambda: page.overlays() == 2, WAIT)
    (expected,) = Predictor.load(workdir)(photographs[1]).top(5)
    wait_for(lambda: page.texts("[data-testid$='-confidence-set']")[0].split("\n")[0] == expected[0][0], WAIT)
    assert page.asked() == {urlsplit(space).netloc}


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_of_a_detector_in_a_browser(serve, photographs, browser, width):
    predictor = detector("mask")
    page = Page(browser, serve(predictor).src, width)
    page.upload(photographs[0])
    wait_for(lambda: page.all("button.legend-item"), WAIT)
    (found,) = predictor([photographs[0]])
    assert page.texts("button.legend-item") == list(dict.fromkeys(found.chosen(0.3).names)) == ["cat", "bird"]
    assert page.fits()

    def click(name):
        (button,) = [button for button in page.all("button.legend-item") if button.text == name]
        browser.execute_script("arguments[0].click()", button)

    click("bird")
    wait_for(lambda: page.texts("button.legend-item") == ["bird"], WAIT)
    click("bird")
    wait_for(lambda: page.texts("button.legend-item") == ["cat", "bird"], WAIT)
    slider = page.all("input[type=range]")[0]
    browser.execute_script(
        "arguments[0].value = 1; arguments[0].dispatchEvent(new Event('input', {bubbles: true}));", slider
    )
    wait_for(lambda: not page.all("button.legend-item"), WAIT)
    assert page.asked() == {urlsplit(page.address).netloc}
