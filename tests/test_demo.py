"""`python -m simam_jax.demo`: the real server over HTTP and, where a browser is installed, its page clicked through."""

import base64
import http.client
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import jax
import numpy as np
import pytest
from PIL import Image
from processes import ROOT, wait_for
from sklearn.datasets import load_sample_images
from trained import preprocessing, variables_of

import simam_jax
from simam_jax import demo
from simam_jax.classification.predictions import SHOWN
from simam_jax.inference import Predictor
from simam_jax.ops.images import normalize

PHOTOGRAPH = Image.fromarray(load_sample_images().images[0])


def encoded(image, kind="JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(url) -> Image.Image:
    kind, data = url.split(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def png_that_claims(width, height) -> bytes:
    parts = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture(scope="module")
def predictor(workdir):
    return Predictor.load(workdir)


@pytest.fixture(scope="module")
def address(workdir):
    """Host and port of a demo in a process of its own, which Ctrl-C ends in good order when all is done."""
    process = subprocess.Popen(
        [sys.executable, "-m", "simam_jax.demo", "--checkpoint", str(workdir), "--port", "0"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith("cifar_resnet20 is at http://127.0.0.1:"), line + process.stderr.read()
    yield urlsplit(line.split()[3]).netloc
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=30)
    assert process.returncode == 0
    assert complaints == ""


def ask(address, body, method="POST", path="/look", **options):
    """Status and content of the answer."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request(method, path, body, **options)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if answer.headers["Content-Type"] == "application/json" else content


@pytest.mark.slow
def test_an_image_gets_its_top_five_and_where_the_attention_is(address, predictor):
    status, seen = ask(address, encoded(PHOTOGRAPH, "PNG"))
    assert status == 200
    (expected,) = predictor(PHOTOGRAPH).top(5)
    assert [entry["class"] for entry in seen["top"]] == [name for name, _ in expected]
    np.testing.assert_allclose([entry["probability"] for entry in seen["top"]], [p for _, p in expected], rtol=1e-4)

    pixels = predictor.preprocessing(PHOTOGRAPH)
    images = normalize(pixels[None], predictor.preprocessing.mean, predictor.preprocessing.std)
    apply = jax.jit(predictor.model.apply, static_argnames="mutable")
    _, state = apply(predictor.variables, images, mutable="intermediates")
    heat = np.asarray(state["intermediates"]["layer3_2"]["attention"]["weights"][0]).mean(-1)[0]
    assert seen["layer"] == "layer3_2"
    np.testing.assert_allclose(seen["range"], [heat.min(), heat.max()], rtol=1e-4)
    assert seen["range"][0] < seen["range"][1]
    shown, attention = decoded(seen["image"]), decoded(seen["attention"])
    assert shown.size == attention.size == (SHOWN, SHOWN)
    back = np.asarray(shown.resize((16, 16), Image.Resampling.BOX)).astype(int)
    assert np.abs(back - pixels).mean() < 8


@pytest.mark.slow
def test_photographs_are_seen_as_everywhere_else(address):
    stored = PHOTOGRAPH.resize((64, 64))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise, which neither training nor prediction do
    _, expected = ask(address, encoded(stored, "PNG"))
    _, seen = ask(address, encoded(stored, "PNG", exif=turned))
    assert seen == expected


def test_networks_without_simam_show_no_attention():
    model = simam_jax.create_model("cifar_resnet20", num_classes=3, attention="none")
    predictor = Predictor(model, variables_of(model), preprocessing(8))
    seen = demo.look(predictor, encoded(PHOTOGRAPH))
    assert seen["attention"] is None
    assert len(seen["top"]) == 3
    assert b"no attention, 3 classes, 8 &times; 8" in demo.page("name", predictor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("upload", "message"),
    [
        (b"no image at all", "damaged, or of a kind that PIL does not know"),
        (b"", "The file is empty"),
        (encoded(PHOTOGRAPH)[:5000], "truncated"),
        (encoded(PHOTOGRAPH, "PNG")[:5000], "truncated"),
        (png_that_claims(40_000, 40_000), "pixels"),
        (png_that_claims(14_000, 14_000), "pixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "damaged, or of a kind that PIL does not know"),
    ],
    ids=["text", "nothing", "half a JPEG", "half a PNG", "a bomb", "a smaller bomb", "an SVG"],
)
def test_bad_uploads_get_a_message(address, upload, message):
    status, answer = ask(address, upload)
    assert status == 400
    assert message in answer["error"]


@pytest.mark.slow
def test_large_uploads_are_refused_and_those_without_a_length(address):
    status, answer = ask(address, bytes(demo.MAX_BYTES + 1))
    assert (status, answer["error"]) == (413, "The file is larger than 20 MB: make the image smaller first.")
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.putrequest("POST", "/look")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 411
    assert "how long it is" in json.loads(answer.read())["error"]
    connection.close()


@pytest.mark.slow
def test_the_page_needs_nothing_else_and_other_paths_are_not_there(address):
    status, page = ask(address, None, "GET", "/")
    assert status == 200
    assert b"<h1>cifar_resnet20</h1>" in page
    assert b"SimAM, 7 classes, 16 &times; 16 pixels" in page
    assert b"http" not in page
    assert b"{{" not in page
    for method, path in (("GET", "/etc/passwd"), ("GET", "/look"), ("POST", "/")):
        status, answer = ask(address, b"", method, path)
        assert status == 404
        assert answer["error"]


@pytest.mark.slow
def test_clients_at_the_same_time_and_clients_that_leave(address):
    upload = encoded(PHOTOGRAPH)
    leaving = http.client.HTTPConnection(address)
    leaving.request("POST", "/look", upload[:-1], headers={"Content-Length": str(len(upload))})
    leaving.close()
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: ask(address, upload), range(8)))
    assert [status for status, _ in answers] == [200] * 8
    assert all(seen == answers[0][1] for _, seen in answers)


@pytest.mark.slow
def test_wrong_requests_are_errors(address, workdir):
    port = address.split(":")[1]
    with pytest.raises(simam_jax.UserError, match=rf"127\.0\.0\.1:{port}: .*in use.* Name another --port"):
        demo.main(["--checkpoint", str(workdir), "--port", port])
    with pytest.raises(simam_jax.UserError, match=r"Nothing can listen at 127\.0\.0\.1:70000"):
        demo.main(["--checkpoint", str(workdir), "--port", "70000"])
    with pytest.raises(simam_jax.UserError, match="no such folder"):
        demo.main(["--checkpoint", str(workdir / "nothing"), "--port", "0"])


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


@pytest.mark.slow
@pytest.mark.skipif(not (BROWSER and shutil.which("chromedriver")), reason="no chromium with chromedriver is installed")
def test_the_page_in_a_browser(address, predictor, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-background-networking", "disable-component-update", f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})

    def element(name):
        return driver.find_element(By.ID, name)

    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(f"http://{address}")
        drop = """const carried = new DataTransfer();
            carried.items.add(new File([arguments[1]], arguments[0]));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: carried, bubbles: true, cancelable: true}));"""

        driver.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
        assert driver.switch_to.active_element == element("file")  # the keyboard reaches it
        assert not element("result").is_displayed()

        PHOTOGRAPH.save(tmp_path / "temple.jpg")
        element("file").send_keys(str(tmp_path / "temple.jpg"))
        wait_for(lambda: element("result").is_displayed(), 60)
        shown = [row.text.splitlines() for row in driver.find_elements(By.CSS_SELECTOR, "#top li")]
        (expected,) = predictor(tmp_path / "temple.jpg").top(5)
        assert shown == [[name, f"{100 * probability:.1f} %"] for name, probability in expected]
        assert element("layer").text == "layer3_2"
        for picture in ("image", "attention"):
            loaded = "return arguments[0].complete && arguments[0].naturalWidth"
            assert driver.execute_script(loaded, element(picture)) == SHOWN
        assert not driver.get_log("browser")

        driver.execute_script(drop, "notes.jpg", "no image")
        wait_for(lambda: "notes.jpg: This is no image" in element("alert").text, 60)
        assert not element("result").is_displayed()
        driver.execute_script(drop, "huge.jpg", "x" * (demo.MAX_BYTES + 1))
        wait_for(lambda: "huge.jpg: The file is larger than 20 MB" in element("alert").text, 60)
        element("file").send_keys(str(tmp_path / "temple.jpg"))  # and back again
        wait_for(lambda: element("result").is_displayed(), 60)
        assert element("alert").text == ""
    finally:
        driver.quit()
