from __future__ import annotations

import contextlib
import hashlib
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mlviews
from mlviews import WeightsError, load_generator, zoo
from mlviews.weights import download

FASHION = zoo.FOLDER / "fashion.safetensors"
SHA256 = hashlib.sha256(FASHION.read_bytes()).hexdigest()


def answer(handler: http.server.BaseHTTPRequestHandler, body: bytes, announced: int | None = None) -> None:
    """Send a body, and what is said to be its length."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body) if announced is None else announced))
    handler.end_headers()
    handler.wfile.write(body)


def chunks(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Send a body in chunks, of which the last one is missing."""
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    half = FASHION.read_bytes()[:5000]
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(half), half))
    handler.close_connection = True


def drip(handler: http.server.BaseHTTPRequestHandler, body: bytes = b"") -> None:
    """Send a byte now and then."""
    handler.wfile.write(body)
    with contextlib.suppress(OSError):
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.05)


BAD: dict[str, Callable[[Any], None]] = {
    "cut": lambda handler: answer(handler, FASHION.read_bytes()[:9999], FASHION.stat().st_size),
    "cut-and-said-whole": lambda handler: answer(handler, FASHION.read_bytes()[:9999]),
    "chunks": chunks,
    "page": lambda handler: answer(handler, b"<html>Sign in</html>"),
    "empty": lambda handler: answer(handler, b""),
    "json": lambda handler: answer(handler, b'{"error": "gone"}'),
    "silent": lambda handler: time.sleep(2),
    "header": drip,
    "body": lambda handler: drip(handler, b"HTTP/1.0 200 OK\r\nContent-Length: 9999\r\n\r\n"),
}
"""What a server does when it is first asked for a file."""


class Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 (shared on purpose)

    def do_GET(self) -> None:
        """Serve a file; under a folder of ``BAD``, first something else."""
        folder = self.path.split("/")[1]
        is_first = self.path not in self.asked
        self.asked.append(self.path)
        if folder == "named":
            self.path = "/fashion.safetensors"
        if folder in BAD and is_first:
            BAD[folder](self)
        elif folder in BAD:
            answer(self, FASHION.read_bytes())
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An HTTP server of the bundled weights, and an empty cache."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    Handler.asked = []
    handler = partial(Handler, directory=str(zoo.FOLDER))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_a_url_is_downloaded_once_and_checked(server: str) -> None:
    url = f"{server}/fashion.safetensors#sha256={SHA256}"
    first, second = load_generator("fashion", weights=url), load_generator("fashion", weights=url)
    z = first.sample_latents(range(2))
    assert first(z).equal(load_generator("fashion")(z))
    assert second(z).equal(first(z))
    assert Handler.asked == ["/fashion.safetensors"]


def test_another_checksum_is_refused_and_nothing_is_kept(server: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"SHA-256 {SHA256}, not 0123456789abcdef"):
        load_generator("fashion", weights=f"{server}/fashion.safetensors#sha256=0123456789abcdef")
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_a_checksum_in_the_name_counts(server: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="404"):
        download.fetch(f"{server}/resnet-0123abcd.pth")
    with pytest.raises(WeightsError, match="not 0123abcd"):
        download.fetch(f"{server}/named/fashion-0123abcd.pth")
    assert download.fetch(f"{server}/named/fashion-{SHA256[:12]}.pth").read_bytes() == FASHION.read_bytes()
    assert len(list((tmp_path / "hub").rglob("*.pth"))) == 1


def test_a_date_in_the_name_is_no_checksum(server: str) -> None:
    for name in ("net-20240101.pth", "ffhq-deadbeef.v2.pkl"):
        assert download.fetch(f"{server}/named/{name}").read_bytes() == FASHION.read_bytes()


def test_a_wrong_checksum_does_not_cost_a_good_copy(server: str) -> None:
    file = download.fetch(f"{server}/fashion.safetensors")
    with pytest.raises(WeightsError, match=r"not 00000000: correct the checksum"):
        download.fetch(f"{server}/fashion.safetensors#sha256=00000000")
    assert file.is_file()


@pytest.mark.parametrize("checksum", ["", f"#sha256={SHA256}"])
@pytest.mark.parametrize("kind", BAD)
def test_what_a_server_does_wrong_is_one_line_and_nothing_is_kept(
    kind: str, checksum: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server}/{kind}/fashion.safetensors{checksum}"
    begin = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(download, "TIMEOUT", 0.3)
        with pytest.raises((FileNotFoundError, WeightsError)) as caught:
            load_generator("fashion", weights=url)
    assert time.monotonic() - begin < 2
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert [file.suffix for file in (tmp_path / "hub").rglob("*") if file.is_file()] in ([], [".lock"])
    assert load_generator("fashion", weights=url).image_shape == (1, 32, 32)
    assert len(Handler.asked) == 2


def test_a_copy_that_cannot_be_read_is_fetched_again(server: str) -> None:
    url = f"{server}/fashion.safetensors"
    file = download.fetch(url)
    record = file.with_name(file.name + ".sha256")
    for content in (b"<html>Sign in</html>", b"", FASHION.read_bytes()[:9999]):  # as an older version kept it
        file.write_bytes(content)
        record.write_text(hashlib.sha256(content).hexdigest())
        assert download.fetch(url).read_bytes() == FASHION.read_bytes()


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\0", b"0123", "é".encode() * 64])
def test_a_damaged_record_is_made_again(damage: bytes, server: str) -> None:
    url = f"{server}/fashion.safetensors"
    file = download.fetch(url)
    record = file.with_name(file.name + ".sha256")
    record.write_bytes(damage)
    assert download.fetch(f"{url}#sha256={SHA256}") == file
    assert len(Handler.asked) == 1  # the copy is right
    record.write_bytes(damage)
    file.write_bytes(b"something else")
    assert download.fetch(url).read_bytes() == FASHION.read_bytes()
    assert record.read_text().strip() == SHA256


def test_several_processes_fetch_one_url(server: str, tmp_path: Path) -> None:
    script = (
        "import sys, torch; from mlviews.weights import download; "
        "torch.hub.set_dir(sys.argv[1]); print(download.fetch(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "hub"), f"{server}/fashion.safetensors"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate(timeout=100)[0].strip() for process in processes}
    assert len(printed) == 1
    assert Path(printed.pop()).read_bytes() == FASHION.read_bytes()
    assert len(Handler.asked) == 1


def test_a_cache_that_cannot_be_written(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError, match=r"cannot be written \(.*weights=FILE"):
        download.fetch(f"{server}/fashion.safetensors")


def test_a_copy_that_changed_in_the_cache_is_noticed_and_replaced(server: str) -> None:
    url = f"{server}/fashion.safetensors"
    file = download.fetch(url)
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(WeightsError, match=r"the download was damaged.*try again"):
        download.fetch(url)
    assert download.fetch(url).read_bytes() == FASHION.read_bytes()
    assert len(Handler.asked) == 2


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/net.pkl", "https://no-such-host.invalid/net.pkl", "{server}/none.pkl"]
)
def test_what_cannot_be_downloaded_says_what_to_do(url: str, server: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded.*pass its path: weights=FILE"):
        load_generator("fashion", weights=url.format(server=server))
    assert not list((tmp_path / "hub").rglob("*.pkl"))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("https://example.org/", "must end in a file name"),
        ("https://example.org/net.pkl#md5=0123abcd", "write URL#sha256=HEX"),
        ("https://example.org/net.pkl#sha256=xyz", "write URL#sha256=HEX"),
        ("hf://example", "write hf://owner/name/file"),
        ("hf://a b/c/d.pkl", "write hf://owner/name/file"),
    ],
)
def test_malformed_references(reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_generator("fashion", weights=reference)


def hub(
    monkeypatch: pytest.MonkeyPatch, files: list[str], local: Path | Exception
) -> list[tuple[object, ...]]:
    """A stand-in for huggingface_hub that has these files."""
    asked: list[tuple[object, ...]] = []

    def hf_hub_download(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        if isinstance(local, Exception):
            raise local
        return str(local)

    stand_in = SimpleNamespace(
        list_repo_files=lambda repository, revision: files, hf_hub_download=hf_hub_download
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return asked


def test_hugging_face_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blob = tmp_path / SHA256
    blob.write_bytes(FASHION.read_bytes())
    asked = hub(monkeypatch, ["README.md", "model.safetensors"], blob)
    for reference in (
        "someone/fashion",
        "hf://someone/fashion",
        "hf://someone/fashion/model.safetensors",
        "someone/fashion@v2",
    ):
        assert load_generator("fashion", weights=reference).image_shape == (1, 32, 32)
    assert asked == [
        ("someone/fashion", "model.safetensors", revision) for revision in (None, None, None, "v2")
    ]
    blob.write_bytes(b"something else")
    with pytest.raises(WeightsError, match="does not have its SHA-256"):
        load_generator("fashion", weights="someone/fashion")


@pytest.mark.parametrize("files", [[], ["a.pkl", "b.pt"]])
def test_a_repository_without_one_weights_file(monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    hub(monkeypatch, files, FASHION)
    with pytest.raises(
        FileNotFoundError,
        match=rf"someone/fashion has {len(files)} weights files.*write hf://someone/fashion/FILE",
    ):
        load_generator("fashion", weights="someone/fashion")


def test_hugging_face_without_a_network_or_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, [], OSError("Name or service not known"))
    with pytest.raises(FileNotFoundError, match=r"someone/fashion cannot be downloaded.*weights=FILE"):
        load_generator("fashion", weights="hf://someone/fashion/model.pkl")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mlviews\[hub\]'"):
        load_generator("fashion", weights="hf://someone/fashion")
    with pytest.raises(
        FileNotFoundError, match=r"No weights file ckpt/best.pth.tar; if it is.*pip install 'mlviews\[hub\]'"
    ):
        load_generator("fashion", weights="ckpt/best.pth.tar")


def test_local_paths_are_not_taken_for_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/walker", "weights/net.pkl", "./a/b", "../a", "net.pkl", "/a/b"):
        assert not download.is_remote(path)
        with pytest.raises(FileNotFoundError, match="No weights file"):
            mlviews.load_generator("fashion", weights=path)
