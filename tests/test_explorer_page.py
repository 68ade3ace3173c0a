"""The explorer's page: in a browser, and for clients that are many, gone, or up to no good."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import shutil
import socket
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlviews import MLViewSource
from mlviews.cli import main
from mlviews.explorer import serving, uploads
from mlviews.explorer.pictures import grid, png
from mlviews.explorer.session import Session
from mlviews.viz import view_images

httpx = pytest.importorskip("httpx", reason="Gradio is not installed")
page = pytest.importorskip("mlviews.explorer.page", reason="Gradio is not installed")

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SMALL = '/?state={"anchors":2,"views":3}'
WAIT = 60_000  # milliseconds: machines may be busy
NOISE = {"name": "normal", "truncation": 2.0}
PERTURB = {0: NOISE | {"std": 0.22}, 1: NOISE | {"std": 0.69}, 2: "resample", 3: "resample"}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("report")
    shutil.copy(ROOT / "benchmarks" / "results" / "fashion-sweep.json", folder / "impact.json")
    preset = folder / "preset.yaml"
    preset.write_text(json.dumps({"preset": "fashion-ml-matched", "perturb": PERTURB}))
    return Session(str(preset), report=folder)


@pytest.fixture(scope="module")
def elsewhere() -> list[Any]:
    """Addresses beyond this machine that anyone in this process has asked for."""
    return []


@pytest.fixture(scope="module")
def address(session: Session, elsewhere: list[Any]) -> Iterator[str]:
    """Where the page is served; every connection of this process is looked at."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, target: Any) -> None:
        if isinstance(target, tuple) and target[0] not in ("127.0.0.1", "::1", "localhost"):
            elsewhere.append(target)
            raise OSError("there is no network")
        connect(self, target)

    environment = {name: value for name, value in os.environ.items() if "GRADIO" in name}
    socket.socket.connect = connect_here  # type: ignore[method-assign]
    try:
        with serving.Server(page.application(session), serving.bound("127.0.0.1", 0)) as server:
            yield f"http://127.0.0.1:{server.port}"
    finally:
        socket.socket.connect = connect  # type: ignore[method-assign]
    assert {name: value for name, value in os.environ.items() if "GRADIO" in name} == environment


# -- in a browser ----------------------------------------------------------------------------------------


def pixels(source: str) -> np.ndarray[Any, Any]:
    """The pixels of a picture on the page."""
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        return np.array(image)


class Tab:
    """A tab of a browser with the page in it."""

    def __init__(self, browser: Any, address: str) -> None:
        self.address = address
        self.page = browser.new_page(viewport={"width": 1500, "height": 1300}, accept_downloads=True)
        self.page.set_default_timeout(WAIT)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, query: str = "") -> None:
        self.page.goto(self.address + query)
        self.page.wait_for_selector("#generated")

    def picture(self, name: str = "generated") -> str:
        return str(self.page.get_attribute(f"#{name}", "src"))

    def changed(self, before: str, name: str = "generated") -> str:
        """Wait until a picture is another one than before; return it."""
        script = "([name, before]) => document.getElementById(name).src != before"
        self.page.wait_for_function(script, arg=[name, before], timeout=WAIT)
        return self.picture(name)

    def drag(self, name: str, place: float) -> None:
        """Drag a slider to a place from 0 to 1, and release it."""
        box = self.page.locator(f"#{name} input[type=range]").bounding_box()
        height = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + 8, height)
        self.page.mouse.down()
        for share in (0.2, 0.9, place):
            self.page.mouse.move(box["x"] + share * box["width"], height)
        self.page.mouse.up()

    def turn_to(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_in_a_browser(browser: Any, address: str, elsewhere: list[Any], tmp_path: Path) -> None:
    tab = Tab(browser, address)
    tab.open(SMALL)
    first = tab.picture()
    assert " ms" in tab.page.inner_text("#status")
    assert "0.69 nats" in tab.page.inner_text("#level-0")

    # A level is moved: the positives change, the anchors do not.
    tab.drag("amount-0", 0.5)
    second = tab.changed(first)
    before, after = pixels(first), pixels(second)
    width = 1 + 32 + 1
    assert np.array_equal(before[:, :width], after[:, :width])
    assert not np.array_equal(before[:, width + 2 :], after[:, width + 2 :])
    tab.page.wait_for_function("() => !document.querySelector('#level-0').innerText.includes('0.69 nats')")

    # Another perturber, and more positives: those that were there stay.
    tab.page.locator("#level-3").get_by_label("fixed").click()
    third = tab.changed(second)
    tab.page.click("#more")
    more = pixels(tab.changed(third))
    assert np.array_equal(more[:, : before.shape[1]], pixels(third))
    assert more.shape[1] == before.shape[1] + 5 * 33

    # A slider moves by a key, too; and a kind of perturber brings its own.
    third = tab.picture()
    tab.page.focus("#amount-1 input[type=range]")
    tab.page.keyboard.press("ArrowRight")
    fourth = tab.changed(third)
    tab.page.locator("#level-0").get_by_label("mix").click()
    fourth = tab.changed(fourth)
    assert "rate" in tab.page.inner_text("#level-0")

    # The same is spent at every level.
    tab.drag("spend", 0.1)
    tab.changed(fourth)
    nats = float(tab.page.input_value("#spend input[type=number]"))
    for level in range(3):  # of which all can spend so little
        assert f"{nats:.2f} nats" in tab.page.inner_text(f"#level-{level}")

    check_latents_and_images(tab, tmp_path)
    check_taken_away(tab, tmp_path)

    # The address holds the state; one that nobody can read leads to the preset.
    shown = tab.picture()
    copy = Tab(browser, address)
    copy.open("/?" + urllib.parse.urlsplit(tab.page.url).query)
    assert copy.picture() == shown
    copy.open("/?state={")
    assert pixels(copy.picture()).shape == (8 * 33 + 1, 34 + 2 + 5 * 33 + 1, 3)
    assert all(url.startswith((address, "data:", "blob:")) for url in tab.requests + copy.requests)
    assert elsewhere == []


def check_latents_and_images(tab: Tab, folder: Path) -> None:
    """The other tabs show their pictures; a file that is no image is refused in words."""
    tab.turn_to("Latents")
    for name in ("traversal", "intervention", "recombination"):
        tab.page.wait_for_selector(f"#{name}", timeout=WAIT)
    before = tab.picture("recombination")
    tab.drag("split", 0.5)
    tab.changed(before, "recombination")
    tab.turn_to("Your images")
    Image.effect_noise((50, 40), 60).save(folder / "photo.png")
    (folder / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    tab.page.set_input_files("#files input[type=file]", [folder / "photo.png", folder / "drawing.svg"])
    tab.page.wait_for_selector("#images", timeout=WAIT)
    assert "drawing.svg was not read" in tab.page.inner_text("#refusals")
    assert pixels(tab.picture("images")).shape[0] == 1 + 32 + 1


def check_taken_away(tab: Tab, folder: Path) -> None:
    """The preset that is downloaded makes the very images that are on screen."""
    tab.turn_to("Take it away")
    with tab.page.expect_download() as download:
        tab.page.get_by_text("download preset.yaml").click()
    download.value.save_as(folder / "preset.yaml")
    views = view_images(MLViewSource.from_config(folder / "preset.yaml"), 2, 8).generated
    with Image.open(io.BytesIO(png(grid([views[:1], views[1:]])))) as image:
        assert np.array_equal(np.array(image), pixels(tab.picture()))
    assert tab.page.input_value("#link textarea") == tab.page.url


# -- many clients, and those that leave ------------------------------------------------------------------


class Client:
    """A browser tab without a browser: it asks for renderings as the page does."""

    def __init__(self, address: str, session: Session, number: int) -> None:
        self.api = f"{address}/gradio_api"
        self.session, self.number, self.hash = session, number, f"client{number}"

    def event(self, outputs: int) -> int:
        """The number of the page's event with so many outputs."""
        config = httpx.get(self.api.replace("gradio_api", "config"), timeout=60).json()
        return next(
            dependency["id"] for dependency in config["dependencies"] if len(dependency["outputs"]) == outputs
        )

    def values(self, **changes: Any) -> list[Any]:
        """The controls' values, for the fewest images."""
        state = dataclasses.replace(self.session.initial, anchors=1, views=2, **changes)
        return list(page.plain_values(state))

    def ask(self, event: int, values: list[Any]) -> None:
        content = {"data": values, "fn_index": event, "session_hash": self.hash}
        httpx.post(f"{self.api}/queue/join", json=content, timeout=60).raise_for_status()

    def answer(self) -> dict[str, Any]:
        """What comes back."""
        url = f"{self.api}/queue/data?session_hash={self.hash}"
        with httpx.stream("GET", url, timeout=60) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    return dict(message)
        raise AssertionError("no answer")

    def leave(self) -> None:
        """Close the connection as soon as the answer is under way."""
        url = f"{self.api}/queue/data?session_hash={self.hash}"
        with httpx.stream("GET", url, timeout=60) as stream:
            next(stream.iter_lines())


def test_twenty_clients_and_some_that_leave(address: str, session: Session) -> None:
    clients = [Client(address, session, number) for number in range(24)]
    render = clients[0].event(6 + len(session.rows))
    leaving, staying = clients[:4], clients[4:]
    for client in leaving:
        client.ask(render, client.values(seed=1_000))
        client.leave()
    with ThreadPoolExecutor(len(staying)) as threads:
        list(threads.map(lambda client: client.ask(render, client.values(seed=client.number)), staying))
        answers = list(threads.map(Client.answer, staying))
    assert all(answer["success"] for answer in answers)
    pictures = [answer["output"]["data"][1] for answer in answers]
    assert len(set(pictures)) == len(staying)  # everyone has the images that were asked for
    alone = Client(address, session, 99)
    alone.ask(render, alone.values(seed=4))
    assert alone.answer()["output"]["data"][1] == pictures[0]


def test_impossible_values_are_answered_in_a_sentence(address: str, session: Session) -> None:
    client = Client(address, session, 100)
    render = client.event(6 + len(session.rows))
    values = client.values()
    for place, value, message in ((1, 10**6, "greater than"), (9, "preset", "not in the list")):
        client.ask(render, [*values[:place], value, *values[place + 1 :]])
        answer = client.answer()
        assert not answer["success"]
        assert message in answer["output"]["error"]


def test_no_file_of_the_machine_is_read(
    address: str, session: Session, elsewhere: list[Any], tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    Image.effect_noise((8, 8), 60).save(secret)
    for path in (secret, ROOT / "pyproject.toml", "/etc/passwd"):
        for route in ("file=", "file/", "stream/x/", "../"):
            assert httpx.get(f"{address}/gradio_api/{route}{path}", timeout=60).status_code in (403, 404)
    client = Client(address, session, 101)
    upload = next(
        dependency["id"]
        for dependency in httpx.get(f"{address}/config", timeout=60).json()["dependencies"]
        if len(dependency["outputs"]) == len(dependency["inputs"]) + 1 == 3
    )
    render = client.event(6 + len(session.rows))
    values = client.values()
    for path in (str(secret), "/etc/passwd", "http://192.0.2.1/a.png", f"{address}/config"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "secret.png"}
        for event, data in ((upload, [[file], None]), (render, [file, *values[1:]])):
            client.ask(event, data)
            answer = client.answer()
            assert not answer["success"]
            assert answer["output"]["error"] == "That file was not uploaded here."
    assert secret.exists()
    assert elsewhere == []


def test_large_uploads_are_refused(address: str) -> None:
    content = bytes(uploads.MOST_BYTES + 1)
    answer = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", content)}, timeout=60)
    assert answer.status_code == 413
    assert httpx.get(address, timeout=60).status_code == 200


def test_other_names_and_other_origins(address: str) -> None:
    answer = httpx.get(address, timeout=60)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert '"analytics_enabled":false' in answer.text.replace(" ", "")
    assert httpx.get(address, headers={"host": "elsewhere.example"}, timeout=60).status_code == 400


# -- the port, and the command ---------------------------------------------------------------------------


def test_ports() -> None:
    with serving.bound("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=f"Port {port} is in use: choose another one with --port"):
            serving.bound("127.0.0.1", port)
    with pytest.raises(OSError, match=r"Cannot listen on 192\.0\.2\.1, port 0"):
        serving.bound("192.0.2.1", 0)
    assert f"ssh -L {port}:127.0.0.1:{port}" in serving.directions("127.0.0.1", port)
    assert "no password" in serving.directions("0.0.0.0", port)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    served: list[int] = []

    def run(server: serving.Server) -> None:
        with server:
            served.append(httpx.get(f"http://127.0.0.1:{server.port}", timeout=60).status_code)

    monkeypatch.setattr(serving.Server, "run", run)
    monkeypatch.setattr("sys.argv", ["mlviews", "explore", "fashion-none", "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert served == [200]
    assert "ssh -L" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["mlviews", "explore", "nothing", "--port", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "Unknown preset 'nothing'" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    monkeypatch.setattr("sys.argv", ["mlviews", "explore"])
    with pytest.raises(SystemExit):
        main()
    assert "pip install 'mlviews[explorer]'" in capsys.readouterr().err
