"""mlviews' own weights files are read as carefully as other people's."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mlviews import WeightsError, load_generator
from mlviews.generators.film import FilmConfig, FilmGenerator
from mlviews.generators.nvae import NVAEConfig
from mlviews.perturb import Walker
from mlviews.weights import files

Tensors = dict[str, Tensor]
SMALL = FilmConfig(dims=(2, 3), channels=(8, 4), groups=2)


@pytest.fixture(scope="module")
def state() -> Tensors:
    return {name: value.clone().contiguous() for name, value in FilmGenerator(SMALL).state_dict().items()}


def written(path: Path, tensors: Tensors, config: Any = None, **changes: Any) -> Path:
    """Write a film file with changed settings."""
    settings = json.dumps(dataclasses.asdict(SMALL) | changes) if config is None else config
    safetensors.torch.save_file(tensors, path, {"format": "mlviews.film", "config": settings})
    return path


def refusal(path: Path, name: str = "fashion") -> str:
    """Return the one line that a file is refused with, in no time."""
    begin = time.process_time()
    with pytest.raises(WeightsError) as caught:
        load_generator(name, weights=path)
    assert time.process_time() - begin < 3
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_precision_are_read_as_float32(
    dtype: torch.dtype, state: Tensors, tmp_path: Path
) -> None:
    path = written(tmp_path / "w.safetensors", {name: value.to(dtype) for name, value in state.items()})
    g = load_generator("fashion", weights=path)
    assert {parameter.dtype for parameter in g.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_what_is_no_float_is_refused(dtype: torch.dtype, state: Tensors, tmp_path: Path) -> None:
    for name in ("blocks.0.linear.weight", "rgb.bias"):
        path = written(tmp_path / "w.safetensors", state | {name: state[name].to(dtype)})
        assert f"{name} holds {dtype}, expected floating-point numbers" in refusal(path)


@pytest.mark.parametrize("value", [1e300, -1e39, float("inf"), float("nan")])
def test_what_float32_cannot_hold_is_refused(value: float, state: Tensors, tmp_path: Path) -> None:
    wide = {name: tensor.double() for name, tensor in state.items()}
    wide["rgb.bias"][0] = value
    assert "rgb.bias holds a NaN or an infinity" in refusal(written(tmp_path / "w.safetensors", wide))
    walker = {name: tensor.double() for name, tensor in Walker(3).state_dict().items()}
    walker["net.2.bias"][1] = value
    safetensors.torch.save_file(walker, tmp_path / "v.safetensors", {"format": Walker.FORMAT})
    with pytest.raises(WeightsError, match=r"net\.2\.bias holds a NaN or an infinity"):
        Walker.load(tmp_path / "v.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        *({"upsample": "sideways"}, {"upsample": ["nearest"]}, {"deep_first": 0}, {"deep_first": None}),
        *({"groups": True}, {"groups": 2.0}, {"groups": "2"}, {"groups": 3}, {"image_channels": 0}, {"x": 1}),
        *({"dims": 2}, {"dims": [2, 3, 4]}, {"dims": [True, 3]}, {"dims": {"0": 2}}),
        *({"dims": [], "channels": []}, {"channels": [8, -4]}, {"channels": [8, 1 << 70]}),
    ],
    ids=str,
)
def test_settings_that_no_layer_takes_are_refused(changes: Any, state: Tensors, tmp_path: Path) -> None:
    assert "no valid configuration" in refusal(written(tmp_path / "w.safetensors", state, **changes))


@pytest.mark.parametrize("config", ["", "[]", "3", "null", "{", "9" * 5000, "[" * 100_000, '{"groups": NaN}'])
def test_settings_that_are_no_table_are_refused(config: str, state: Tensors, tmp_path: Path) -> None:
    assert "no valid configuration" in refusal(written(tmp_path / "w.safetensors", state, config))


def bombs() -> dict[str, tuple[str, str, Any]]:
    """Return settings of a few kilobytes at most that describe enormous networks."""
    nvae = dataclasses.asdict(
        NVAEConfig(
            groups=(256,) * 4,
            latents=(1,) * 4,
            encoder=(4,) * 4,
            decoder=(4,) * 4,
            enc_cells=64,
            dec_cells=64,
        )
    )
    long_cells = nvae | {"cells": {role: ["res_bnswish"] * 8 for role in nvae["cells"]}}
    flows = nvae | {"flows": 16, "enc_cells": 1, "dec_cells": 1, "latents": [1 << 20] * 4}
    pre = nvae | {"groups": [1], "latents": [1], "encoder": [1] * 13, "decoder": [1] * 13, "image_size": 4096,
                  "pre_cells": 64, "post_cells": 64}  # fmt: skip
    film = {"dims": [1] * 10_000, "channels": [8] * 10_000}
    semafo = {"encoder": [1 << 16] * 8, "decoder": [1 << 16] * 9, "groups": 1, "features": 1 << 16}
    wide = {"dims": [1 << 26] * 2, "channels": [1 << 26] * 2}
    return {
        "film, levels": ("fashion", "mlviews.film", film),
        "film, widths": ("fashion", "mlviews.film", wide),
        "semafo, widths": ("fashion-semafo", "mlviews.semafo", semafo),
        "nvae, cells": ("fashion-nvae", "mlviews.nvae", long_cells),
        "nvae, flows": ("fashion-nvae", "mlviews.nvae", flows),
        "nvae, pre-processing": ("fashion-nvae", "mlviews.nvae", pre),
        "nvae, operations": ("fashion-nvae", "mlviews.nvae", nvae | {"cells": {"pre": ["res_elu"] * 10_000}}),
    }


@pytest.mark.parametrize("name", bombs())
def test_work_is_in_proportion_to_the_file(name: str, tmp_path: Path) -> None:
    generator, format, config = bombs()[name]
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"format": format, "config": json.dumps(config)})
    refusal(path, generator)


def raw(path: Path, header: Any, body: bytes = b"") -> Path:
    """Write a safetensors file by hand."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def test_what_a_file_says_is_printed_on_one_line_and_cut(state: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    red, one = "\x1b[2J\x1b[31mformat your disk\nnow", torch.zeros(1)
    assert "unknown ?[2J?[31mformat your disk?now" in refusal(written(path, state | {red: one}))
    many = {f"{index:03}{'x' * 5000}": torch.zeros(1) for index in range(200)}
    assert "and 197 more" in refusal(written(path, state | many))
    for format in ("x" * 5_000_000, red):
        safetensors.torch.save_file({"a": one}, path, {"format": format})
        assert "not 'mlviews.film'" in refusal(path)
    assert "unknown setting" in refusal(written(path, state, **{"x" * 2_000_000: 1}))
    assert "groups is" in refusal(written(path, state, groups=red * 1000))
    entry = {"dtype": red * 1000, "shape": [1], "data_offsets": [0, 4]}
    assert "not a whole safetensors file" in refusal(raw(path, {"a": entry}, bytes(4)))
    entry = {"dtype": "F32", "shape": [1] * 5000, "data_offsets": [0, 4]}
    metadata = {"format": "mlviews.film", "config": json.dumps(dataclasses.asdict(SMALL))}
    refusal(raw(path, {"rgb.bias": entry, "__metadata__": metadata}, bytes(4)))


def test_too_many_tensors_are_refused_before_they_are_read(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {f"{index}": empty for index in range(files.MOST_TENSORS + 1)}
    assert "more than 20,000 tensors" in refusal(raw(tmp_path / "w.safetensors", header))


def test_other_threads_may_make_modules_meanwhile(state: Tensors, tmp_path: Path) -> None:
    path = written(tmp_path / "w.safetensors", state)
    script = (
        "import sys, threading, torch; from mlviews import load_generator; errors = []\n"
        "def many():\n"
        "    try: [torch.nn.Linear(1, 1) for _ in range(3000)]\n"
        "    except Exception as error: errors.append(error)\n"
        "thread = threading.Thread(target=many); thread.start()\n"
        "while thread.is_alive(): load_generator('fashion', weights=sys.argv[1])\n"
        "sys.exit(bool(errors))"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 0


@pytest.mark.skipif(os.name != "posix", reason="files that are rewritten while they are read")
def test_a_file_that_is_rewritten_in_place_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensors = {f"t{index}": torch.zeros(1 << 18) for index in range(8)}
    safetensors.torch.save_file(tensors, path, {"format": "mlviews.film"})
    content = path.read_bytes()
    script = (
        "import sys; from mlviews.weights import read_safetensors; print('begin', flush=True)\n"
        "while True:\n"
        "    try: read_safetensors(sys.argv[1], 'mlviews.film')\n"
        "    except ValueError as error: pass"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(50):
            with path.open("wb") as file:
                time.sleep(0.002)
                file.write(content)
            time.sleep(0.01)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_pickled_walker_of_integers_is_refused(tmp_path: Path) -> None:
    state = {name.removeprefix("net."): value for name, value in Walker(3).state_dict().items()}
    torch.save(state | {"2.bias": torch.zeros(3, dtype=torch.int64)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"2\.bias holds torch\.int64"):
        Walker.load(tmp_path / "w.pth")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_file_that_is_larger_than_memory(tmp_path: Path) -> None:
    with (tmp_path / "w.safetensors").open("wb") as file:
        file.truncate(1 << 40)  # no blocks of the disk are used
    script = (
        "import resource, sys; from mlviews import load_generator\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30,) * 2)\n"
        "try: load_generator('fashion', weights=sys.argv[1])\n"
        "except ValueError as error: sys.exit('larger than the memory' not in str(error))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "w.safetensors")]
    assert subprocess.run(command, check=False).returncode == 0


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"x" * 100)

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert "w.safetensors cannot be read: Permission denied" in refusal(path)
    with pytest.raises(WeightsError, match="cannot be read: Permission denied"):
        Walker.load(path)
    with pytest.raises(WeightsError, match="cannot be read: File name too long"):
        load_generator("fashion", weights=tmp_path / ("x" * 300))
