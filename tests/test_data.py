from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from mlviews.evaluation.data import CLASSES, bundled_slice, load_fashion_mnist, read_idx


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = header + bytes(values.to(torch.uint8).flatten().tolist())
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_idx_files_are_read_and_padded(tmp_path: Path) -> None:
    images = torch.randint(256, (3, 28, 28))
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", torch.tensor([3, 1, 9]))
    padded, labels = load_fashion_mnist(tmp_path, "train")
    assert padded.shape == (3, 1, 32, 32)
    assert torch.equal(padded[:, 0, 2:30, 2:30], images.to(torch.uint8))
    assert padded.sum() == images.sum()
    assert labels.tolist() == [3, 1, 9]
    assert torch.equal(load_fashion_mnist(tmp_path, "train", 28).images[:, 0], images.to(torch.uint8))


def test_the_bundled_slice_is_balanced_and_its_halves_differ() -> None:
    fit, test = bundled_slice()
    for part in (fit, test):
        assert part.images.shape == (2500, 1, 28, 28)
        assert part.images.dtype == torch.uint8
        assert torch.bincount(part.labels).tolist() == [250] * len(CLASSES)
    rows = {image.numpy().tobytes() for image in fit.images}
    assert not any(image.numpy().tobytes() in rows for image in test.images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole idx file"),
        (struct.pack(">HBB3I", 0, 8, 3, *[1 << 31] * 3), "values are more than"),
        (struct.pack(">HBB200I", 0, 8, 200, *[1] * 200), "no idx header"),
        (struct.pack(">HBBI", 0, 8, 1, 9) + bytes(5), "5 of 9"),
        (struct.pack(">HBBI", 0, 13, 1, 1) + bytes(8), "no idx header"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_file_is_refused_at_its_header(
    content: bytes, message: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"labels{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_no_more_is_decompressed_than_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, 3) + b"abc" + bytes(1 << 24)))
    assert read_idx(path).tolist() == list(b"abc")


def test_images_and_labels_must_fit_each_other(tmp_path: Path) -> None:
    write_idx(tmp_path / "t10k-images-idx3-ubyte", torch.zeros(3, 28, 28))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", torch.zeros(2))
    with pytest.raises(ValueError, match=r"their labels \(2,\)"):
        load_fashion_mnist(tmp_path, "test")
