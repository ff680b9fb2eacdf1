"""The page of `hf-sugar app`, started from the command line, in a real browser and over plain HTTP."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from PIL import Image

from hf_sugar import SugarEmbedder, SugarForConditionalGeneration, SugarProcessor, world
from hf_sugar.cli.app import AppArguments
from hf_sugar.cli.main import main
from hf_sugar.retrieval import SugarIndex


pytestmark = pytest.mark.extras
gradio = pytest.importorskip("gradio", reason="the page needs gradio")
gradio_client = pytest.importorskip("gradio_client")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"


@contextmanager
def serve(model, index, log, *settings):
    """Port of a running `hf-sugar app`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_sugar.cli.main", "app", "--model_name_or_path", str(model)]
    command += ["--index", str(index), "--port", str(port), *settings]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ})
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                raise AssertionError(log.read_text())
            yield port
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """A folder with a model that knows the world, an index of facts, and their pictures as files."""
    place = tmp_path_factory.mktemp("app")
    model = SugarForConditionalGeneration.from_backbone(world.checkpoint("llava"), retrieval_dim=32).float()
    processor = SugarProcessor.from_pretrained(world.checkpoint("llava"))
    model.config.random_projector = False
    model.save_pretrained(place / "model")
    processor.save_pretrained(place / "model")
    rows = []
    for n, row in enumerate(world.load_world("facts", "test", 6, seed=2)):
        row["images"][0].save(place / f"{n}.png")
        rows.append({**row, "messages": row["messages"][:2], "images": row["images"][:1], "id": f"<b>{n}</b>"})
    SugarIndex.build(rows, SugarEmbedder(model.eval(), processor), directory=place / "index")
    return place, rows


@pytest.fixture(scope="module")
def port(facts):
    place, _ = facts
    with serve(place / "model", place / "index", place / "log", "--max_file_size", "20kb", "--k", "3") as port:
        yield port


@pytest.fixture
def page(port):
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        page = browser.new_page()
        hosts, page.errors = set(), []
        page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "//" in request.url else ""))
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#search")
        yield page
        assert hosts - {""} == {f"127.0.0.1:{port}"}
        assert page.errors == []
        browser.close()


def write(page, text):
    page.fill("#text textarea", text)


def choose(page, path):
    page.set_input_files("input[type=file]", str(path))


def cards(page, wanted):
    page.wait_for_function(f"document.querySelectorAll('#cards .card').length == {wanted}")
    return page.eval_on_selector_all("#cards .card", "cards => cards.map(card => card.innerText)")


def heat_map(page, but=None):
    page.wait_for_function(
        "before => { const i = document.querySelector('#alignment img'); return i && i.src != before && i.naturalWidth }",
        arg=but,
    )
    return page.get_attribute("#alignment img", "src")


def test_search_by_text_picture_and_both(page, facts):
    place, rows = facts
    write(page, "What color is the back of the picture?")
    page.click("#search")
    by_text = cards(page, 3)
    first = heat_map(page)
    choose(page, place / "4.png")
    page.wait_for_selector("[data-testid=image] img, .image-frame img")
    page.click("#search")
    page.wait_for_function("document.querySelector('#cards .score').innerText == '1.0000'")
    # the picture and the question are one query: the very document, named by what its id says and not by markup
    assert "1. <b>4</b>" in cards(page, 3)[0] != by_text[0]
    second = heat_map(page, but=first)
    page.click("#rank input")
    page.get_by_role("option").nth(1).click()
    heat_map(page, but=second)
    write(page, "")
    page.click("#search")
    page.wait_for_function("document.querySelector('#cards .score').innerText != '1.0000'")
    page.eval_on_selector("input[type=number]", "e => { e.value = 2; e.dispatchEvent(new Event('input')) }")
    page.click("#search")
    cards(page, 2)


def test_what_is_refused_is_said(page, facts, tmp_path):
    page.click("#search")
    page.wait_for_selector("text=There is no query yet")
    (tmp_path / "note.png").write_text("no picture at all")
    choose(page, tmp_path / "note.png")
    page.wait_for_selector("[data-testid=image] img, .image-frame img", state="attached")
    page.click("#search")
    page.wait_for_function("document.querySelector('.toast-body:last-of-type')?.innerText.match(/image|picture/i)")
    assert page.query_selector("#cards .card") is None
    page.reload()
    page.wait_for_selector("#search")
    (tmp_path / "large.png").write_bytes(os.urandom(40_000))
    choose(page, tmp_path / "large.png")
    page.wait_for_selector("text=/maximum.*size|too large/i")
    page.errors.clear()  # the refusals


def request(url, data=None, headers=None):
    """Status and body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_no_file_but_the_page_is_served(port, facts):
    place, _ = facts
    base = f"http://127.0.0.1:{port}/gradio_api"
    for path in (
        "/etc/passwd",
        f"{place}/0.png",
        f"{place}/index/index.json",
        "../../../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
    ):
        status, body = request(f"{base}/file={path}")
        assert status in (400, 403, 404) and b"root:" not in body, (path, status)

    boundary = "x" * 20
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="../../../{{}}"\r\n\r\n'
    body = head.format("up.png").encode() + (place / "0.png").read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    status, answer = request(f"{base}/upload", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
    assert status == 200
    [stored] = json.loads(answer)
    assert re.search(r"/gradio/[0-9a-f]+/[^/]*up\.png$", stored) and ".." not in stored

    # a path of the server in the place of an upload
    for path in ("/etc/passwd", str(place / "0.png")):
        data = json.dumps({"data": ["text", {"path": path, "meta": {"_type": "gradio.FileData"}}, 1]}).encode()
        status, answer = request(f"{base}/call/search", data, {"Content-Type": "application/json"})
        if status == 200:
            status, answer = request(f"{base}/call/search/{json.loads(answer)['event_id']}")
        assert b"event: error" in answer or status >= 400
        assert b"card" not in answer


def test_loopback_unless_told_otherwise(port):
    assert AppArguments().host == "127.0.0.1"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_over_http(port, facts):
    """What the buttons call, without a browser."""
    place, rows = facts
    client = gradio_client.Client(f"http://127.0.0.1:{port}/", verbose=False)
    picture, question = gradio_client.handle_file(str(place / "4.png")), "What color is the back of the picture?"
    cards, rank = client.predict(question, picture, 3, api_name="/search")
    assert cards.count('class="card"') == 3 and "1. &lt;b&gt;4&lt;/b&gt;" in cards and ">1.0000<" in cards
    job = client.submit(question, picture, 1, api_name="/ask")
    answer = job.result(60)[0]
    assert rows[4]["messages"][1]["content"][0]["text"] in answer and job.outputs()[0][1].count('class="card"') == 1
    with Image.open(client.predict(question, picture, 0, api_name="/align")) as heat_map:
        assert heat_map.width > 100


def test_without_gradio_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match="with its extra `app`"):
        main(["app", "--model_name_or_path", "model"])
