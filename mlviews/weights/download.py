"""Weights by URL or Hugging Face id: they are downloaded once, checked, and kept in torch's hub cache."""

from __future__ import annotations

import hashlib
import http.client
import queue
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import torch
from filelock import FileLock

from mlviews.errors import WeightsError, listing
from mlviews.runs.files import sha256, whole
from mlviews.weights import unpickle
from mlviews.weights.files import Refused, parse, printable

TIMEOUT = 30.0
"""Seconds that a server may take to answer, and between two parts of its answer."""

SLOWEST = 1000
"""Bytes a second that it has to send, on average over ``TIMEOUT``."""

SUFFIXES = (".safetensors", ".pkl", ".pt", ".pth", ".bin", ".th")
_OFFLINE = "Where there is no network, copy the file here by other means and pass its path: weights=FILE."


def is_remote(weights: object) -> bool:
    """Tell whether weights are to be downloaded.

    They are if this is a URL, ``hf://owner/name[/file][@revision]``, or a bare ``owner/name`` that is no
    local path.
    """
    if not isinstance(weights, str):
        return False
    if re.match(r"(https?|hf)://", weights):
        return True
    if weights.endswith(SUFFIXES) or weights.startswith("."):
        return False
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", weights):
        return False
    path = Path(weights)
    return not path.exists() and not path.parent.exists()


def fetch(reference: str) -> Path:
    """Return the local copy of remote weights, which are downloaded unless it is there.

    A download is whole or not there. Of several processes that ask for one URL, one downloads it. Without a
    checksum, the file has to be one that can be read, each time. A server that does not answer for
    ``TIMEOUT`` seconds, or sends less than ``SLOWEST`` bytes a second meanwhile, is given up.

    Args:
        reference: one of

            - ``https://.../file.pkl``, followed by ``#sha256=HEX`` where the checksum is known; a name that
              ends in ``-HEX.pth``, torch's own convention, counts as well;
            - ``hf://owner/name/file``, or ``hf://owner/name`` if that repository has a single weights file,
              each followed by ``@revision`` if a certain one is meant;
            - plain ``owner/name``, which means ``hf://owner/name``.

    Raises:
        ValueError: if the reference has another form.
        ModuleNotFoundError: for ``hf://`` without the package huggingface_hub.
        FileNotFoundError: likewise for a plain ``owner/name``, which may have been meant as a file; if the
            file cannot be downloaded; or if the repository has no weights file, or more than one.
        mlviews.WeightsError: if the download, or the copy kept from an earlier one, does not have its
            checksum.
    """
    if re.match(r"https?://", reference):
        return _from_url(reference)
    return _from_hub(reference)


# -- by URL --------------------------------------------------------------------------------------------------


def _from_url(reference: str) -> Path:
    """Return the local copy of the file at a URL."""
    url, _, fragment = reference.partition("#")
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    if not re.fullmatch(r"[\w .+-]*\w[\w .+-]*", name):
        suffixes = listing("*" + suffix for suffix in SUFFIXES)
        raise ValueError(f"Invalid weights URL {url!r}: its path must end in a file name ({suffixes}).")
    checksum = _checksum(url, name, fragment)

    file = Path(torch.hub.get_dir()) / "mlviews" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    copy = _Copy(url, file, checksum.lower())
    if not copy.is_good():
        # Of several processes that ask for one URL, one downloads it.
        lock = FileLock(file.with_name(name + ".lock"))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise FileNotFoundError(
                f"{url} cannot be downloaded: {file.parent} cannot be written ({error.strerror}). {_OFFLINE}"
            ) from error
        try:
            copy.refresh()
        finally:
            lock.release()
    return file


@dataclass(frozen=True)
class _Copy:
    """The local copy of the file at a URL.

    Its digest is kept beside it, so that a copy that changed since is noticed. Without a checksum of the
    user's, a copy is also one that can be read: a server's error page, or half a file, has a digest as well.
    """

    url: str
    file: Path
    checksum: str  # the first digits of the SHA-256 that the user gave; "" for none

    @property
    def record(self) -> Path:
        """The file with the digest."""
        return self.file.with_name(self.file.name + ".sha256")

    def digest(self) -> str:
        """Return the digest that was kept; "" if there is none, or its file is damaged."""
        try:
            text = self.record.read_bytes().strip()
        except OSError:
            return ""
        return text.decode() if re.fullmatch(b"[0-9a-f]{64}", text) else ""

    def is_good(self) -> bool:
        """Is it there, as it was downloaded, and what the user asks for?"""
        try:
            digest = sha256(self.file)
        except OSError:
            return False
        if digest != self.digest() or not digest.startswith(self.checksum):
            return False
        return bool(self.checksum) or not _problem(self.file)

    def refresh(self) -> None:
        """Make a good copy of whatever is there; the caller holds the lock.

        Raises:
            FileNotFoundError: if the file cannot be downloaded.
            WeightsError: if the copy changed since it was downloaded, or what the server gave is damaged, is
                no weights file, or does not have the checksum.
        """
        if self.is_good():  # another process was faster
            return
        noted = self.digest()
        digest = sha256(self.file) if self.file.is_file() else ""
        if digest and not noted and self.checksum and digest.startswith(self.checksum):
            self._note(digest)  # the copy is right, only its record is not
            return
        if digest and noted and digest != noted:
            self.file.unlink()
            self.record.unlink()
            raise WeightsError(_damaged(self.url, digest, noted))
        is_intact = digest != "" and digest == noted and not _problem(self.file)
        try:
            self._download(is_intact)
        except FileNotFoundError as error:
            if not is_intact:
                raise
            raise WeightsError(self._mismatch(digest)) from error

    def _download(self, is_intact: bool) -> None:
        """Put what the server has in the place of the copy.

        Args:
            is_intact: whether there is a copy as it came, which then stays for references with its checksum,
                unless the server now has what the user asks for.
        """
        with whole(self.file) as part:
            try:
                transfer(self.url, part)
            except (EOFError, http.client.IncompleteRead) as error:
                raise WeightsError(
                    f"{self.url} was cut short ({printable(error, 160)}). Nothing was kept; try again."
                ) from error
            except Exception as error:  # urllib's errors, socket's, http.client's, the disk's
                problem = f"{type(error).__name__}: {printable(error, 160)}"
                raise FileNotFoundError(f"{self.url} cannot be downloaded ({problem}). {_OFFLINE}") from error
            digest = sha256(part)
            if not digest.startswith(self.checksum):
                text = self._mismatch(digest) if is_intact else _damaged(self.url, digest, self.checksum)
                raise WeightsError(text)
            problem = "" if self.checksum else _problem(part)
            if problem:
                raise WeightsError(
                    f"{self.url} gave no weights file: it holds {problem}. Nothing was kept; "
                    "check the address, or try again."
                )
            self.record.unlink(missing_ok=True)  # a copy without a record is downloaded again
        self._note(digest)

    def _note(self, digest: str) -> None:
        """Write the digest beside the copy."""
        with whole(self.record) as part:
            part.write_text(digest + "\n")

    def _mismatch(self, digest: str) -> str:
        """Return the message for a file that is as it came, but not the one that the user asks for."""
        return f"{self.url} has SHA-256 {digest}, not {self.checksum}: correct the checksum, or the address."


def _damaged(url: str, digest: str, expected: str) -> str:
    """Return the message for a file that may have been damaged on its way, or since."""
    return (
        f"{url} has SHA-256 {digest}, not {expected}: the download was damaged, "
        "or the file is another one. It was removed; try again, or correct the checksum."
    )


def _problem(file: Path) -> str:
    """Return what is wrong with a file as one of weights, of whatever kind; "" for nothing."""
    try:
        data = file.read_bytes()
        if data[8:9] == b"{":
            parse(data)
        else:
            unpickle.read(data)
    except Refused as error:
        return printable(error, 200)
    except Exception as error:  # a damaged or hostile file can raise anything
        return f"damaged data ({type(error).__name__}: {printable(error, 160)})"
    return ""


def transfer(url: str, file: Path) -> None:
    """Write what a server has at a URL to a file.

    The server is asked in a thread, so that nothing it does or leaves undone (name look-up, headers byte by
    byte, a body that never ends) keeps the caller longer than ``TIMEOUT`` without ``SLOWEST``.

    Raises:
        TimeoutError: if the server does not answer, or is too slow.
        EOFError: if it sends less than it announced.
        Exception: of other types, from urllib and the modules that it uses.
    """
    parts: queue.Queue[bytes | int | Exception | None] = queue.Queue(maxsize=64)
    abandoned = threading.Event()
    arguments = (url, parts, abandoned)
    threading.Thread(target=_ask, args=arguments, daemon=True, name="mlviews-download").start()
    try:
        with file.open("wb") as out:
            _receive(parts, out)
    finally:
        abandoned.set()


def _receive(parts: queue.Queue[bytes | int | Exception | None], out: BinaryIO) -> None:
    """Write what :func:`_ask` puts into the queue: the announced length, the parts of the body, and None."""
    announced: int | None = None
    length = 0  # of the body so far
    begin = time.monotonic()
    since = 0  # bytes since then
    while True:
        left = begin + TIMEOUT - time.monotonic()
        try:
            part = parts.get(timeout=max(left, 0))
        except queue.Empty:
            if since < SLOWEST * TIMEOUT:
                raise TimeoutError(
                    f"the server sent {since:,} bytes in {TIMEOUT:g} seconds, after {length - since:,} before"
                ) from None
            begin, since = time.monotonic(), 0
            continue
        if isinstance(part, Exception):
            raise part
        if part is None:
            break
        if isinstance(part, int):
            announced = part
            continue
        out.write(part)
        length += len(part)
        since += len(part)
    if announced is not None and length != announced:
        raise EOFError(f"the server announced {announced:,} bytes and sent {length:,}")


def _ask(url: str, parts: queue.Queue[bytes | int | Exception | None], abandoned: threading.Event) -> None:
    """Ask the server, and put what it says into the queue, until somebody has abandoned that."""

    def put(part: bytes | int | Exception | None) -> None:
        while not abandoned.is_set():
            try:
                return parts.put(part, timeout=0.5)
            except queue.Full:
                continue

    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mlviews"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            announced = response.headers.get("Content-Length", "")
            if announced.isdecimal():
                put(int(announced))
            while not abandoned.is_set() and (part := response.read1(1 << 16)):
                put(part)
        put(None)
    except Exception as error:  # it is raised where the file is written
        put(error)


def _checksum(url: str, name: str, fragment: str) -> str:
    """Return the first digits of the SHA-256 that a URL names after ``#`` or in its file name; "" for none.

    Raises:
        ValueError: if the part after ``#`` is no checksum.
    """
    if fragment:
        key, _, digits = fragment.partition("=")
        if key != "sha256" or not re.fullmatch("[0-9a-fA-F]{8,64}", digits):
            raise ValueError(
                f"Invalid checksum {fragment!r} of {url}: write URL#sha256=HEX, with 8 to 64 digits."
            )
        return digits
    # At least one letter is asked for, so that a date is not taken for a checksum.
    match = re.search(r"-(?=[0-9a-f]*[a-f])([0-9a-f]{8,64})\.pth?$", name)
    return match[1] if match else ""


# -- by Hugging Face id --------------------------------------------------------------------------------------


def fetch_folder(reference: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """Return the local copy of a Hugging Face repository, of which only some files are downloaded.

    Without a network, the copy is what an earlier download left.

    Args:
        reference: ``owner/name``, or ``hf://owner/name``, each followed by ``@revision`` if a certain one is
            meant.
        choose: returns the names of the files to download, of those that there are.

    Raises:
        ValueError: if the reference has another form.
        ModuleNotFoundError, FileNotFoundError: as :func:`fetch`.
        mlviews.WeightsError: if a downloaded file does not have its checksum.
    """
    repository = _Repository.parse(reference)
    if repository is None or repository.file:
        raise ValueError(
            f"Invalid weights {reference!r}: this generator takes a folder, or a Hugging Face id, owner/name "
            "or hf://owner/name@revision."
        )
    hub = _hub(reference)
    try:
        files = repository.ask(hub.list_repo_files)
    except FileNotFoundError as error:
        try:
            folder = Path(repository.ask(hub.snapshot_download, local_files_only=True))
        except FileNotFoundError:
            raise error from None
        names = choose([file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()])
    else:
        names = choose(files)
        folder = Path(repository.ask(hub.snapshot_download, allow_patterns=names))
    for name in names:
        _check_blob(folder / name)
    return folder


@dataclass(frozen=True)
class _Repository:
    """A Hugging Face repository, or a file of it."""

    name: str  # owner/name
    file: str  # "" for none
    revision: str | None

    @classmethod
    def parse(cls, reference: str) -> _Repository | None:
        """Return what a reference means; None if it is none."""
        name, _, revision = reference.removeprefix("hf://").partition("@")
        owner, _, rest = name.partition("/")
        repository, _, file = rest.partition("/")
        if not re.fullmatch(r"[\w.-]+", owner) or not re.fullmatch(r"[\w.-]+", repository):
            return None
        return cls(f"{owner}/{repository}", file, revision or None)

    def ask(self, call: Callable[..., Any], *arguments: str, **options: Any) -> Any:
        """Call a function of the hub's client for this repository."""
        try:
            return call(self.name, *arguments, revision=self.revision, **options)
        except Exception as error:  # huggingface_hub's errors, its HTTP library's, the system's
            reason = printable(str(error).strip().partition("\n")[0])
            problem = f"{type(error).__name__}: {reason}"
            raise FileNotFoundError(f"{self.name} cannot be downloaded ({problem}). {_OFFLINE}") from error


def _from_hub(reference: str) -> Path:
    """Return the local copy of a weights file of a Hugging Face repository."""
    repository = _Repository.parse(reference)
    if repository is None:
        raise ValueError(f"Invalid Hugging Face id {reference!r}: write hf://owner/name/file, or owner/name.")
    hub = _hub(reference)
    file = repository.file
    if not file:
        files = [path for path in repository.ask(hub.list_repo_files) if path.endswith(SUFFIXES)]
        if len(files) != 1:
            raise FileNotFoundError(
                f"{repository.name} has {len(files)} weights files ({printable(listing(files[:5]))}): "
                f"write hf://{repository.name}/FILE."
            )
        file = files[0]
    path = Path(repository.ask(hub.hf_hub_download, file))
    _check_blob(path)
    return path


def _check_blob(path: Path) -> None:
    """Raise a WeightsError unless a file of the hub's cache has its checksum, where it is kept under that."""
    blob = path.resolve().name  # large files are kept under their SHA-256
    if re.fullmatch("[0-9a-f]{64}", blob) and sha256(path) != blob:
        raise WeightsError(
            f"{path} does not have its SHA-256, {blob}: the download was damaged; "
            "remove the file and try again."
        )


def _hub(reference: str) -> ModuleType:
    """Return the package huggingface_hub, which is imported only where it is needed.

    Raises:
        ModuleNotFoundError: if it is not installed.
        FileNotFoundError: likewise for a plain ``owner/name``, which may have been meant as a file.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        remedy = f"need the package huggingface_hub: pip install 'mlviews[hub]'. {_OFFLINE}"
        if not reference.startswith("hf://"):
            raise FileNotFoundError(
                f"No weights file {reference}; if it is a Hugging Face id, weights from there {remedy}"
            ) from None
        raise ModuleNotFoundError(f"Weights from Hugging Face ({reference}) {remedy}") from None
    return huggingface_hub
