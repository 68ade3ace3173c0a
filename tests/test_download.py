from __future__ import annotations

import hashlib
import http.server
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mlviews
from mlviews import WeightsError, load_generator, zoo
from mlviews.weights import download

FASHION = zoo.FOLDER / "fashion.safetensors"
SHA256 = hashlib.sha256(FASHION.read_bytes()).hexdigest()


class Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 (shared on purpose)

    def do_GET(self) -> None:
        self.asked.append(self.path)
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


def test_a_checksum_in_the_name_counts(tmp_path: Path, server: str) -> None:
    with pytest.raises(FileNotFoundError, match="404"):
        download.fetch(f"{server}/resnet-0123abcd.pth")
    file = download.fetch(f"{server}/fashion.safetensors")
    renamed = file.with_name("fashion-0123abcd.safetensors")
    file.rename(renamed)
    with pytest.raises(WeightsError, match="not 0123abcd"):
        download._verify(renamed, "0123abcd", "x")


def test_a_date_in_the_name_is_no_checksum(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, file: Path(file).write_bytes(b"weights")
    )
    for name in ("net-20240101.pth", "ffhq-deadbeef.v2.pkl"):
        assert download.fetch(f"https://example.org/{name}").read_bytes() == b"weights"


def test_a_wrong_checksum_does_not_cost_a_good_copy(server: str) -> None:
    file = download.fetch(f"{server}/fashion.safetensors")
    with pytest.raises(WeightsError, match=r"not 00000000: correct the checksum"):
        download.fetch(f"{server}/fashion.safetensors#sha256=00000000")
    assert file.is_file()


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
