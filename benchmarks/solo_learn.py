"""SimCLR, SimSiam and BYOL from an unmodified checkout of solo-learn, on views.

``python benchmarks/solo_learn.py CHECKOUT --data DIR``

Each method trains with the ready configuration ``fashion`` on a CPU; then solo-learn's own main_knn.py
classifies real Fashion-MNIST images by its checkpoint, and by the same network untrained. main_knn.py moves
all it does to a GPU, so ``Tensor.cuda`` does nothing here. The result of each method stays in the working
folder: a second call goes on from there. Prints a table, writes ``benchmarks/results/solo-learn.json``.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from documents.integrations import solo_learn
from record import RESULTS, publish
from torchvision.transforms.functional import to_pil_image

from mlviews.evaluation.data import load_fashion_mnist
from mlviews.runs.files import whole
from mlviews.runs.records import environment

METHODS = {  # what each minimises
    "simclr": "train_nce_loss_step",
    "simsiam": "train_neg_cos_sim_step",
    "byol": "train_neg_cos_sim_step",
}
IMAGES = 10_000  # of each split
KNN = """
import runpy, sys, torch
torch.Tensor.cuda = lambda self, *_, **__: self
sys.argv[0] = "mlviews"
runpy.run_module("mlviews.integrations.solo_learn", run_name="__main__", alter_sys=True)
"""
UNTRAINED = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from lightning.pytorch import seed_everything
from omegaconf import OmegaConf
from solo.methods import METHODS
cfg = OmegaConf.create(json.load(open(sys.argv[2] + "/args.json")))
seed_everything(cfg.seed)
checkpoint = torch.load(sys.argv[3])
tensors = METHODS[cfg.method](cfg).state_dict()
torch.save({**checkpoint, "state_dict": tensors}, sys.argv[2] + "/untrained.ckpt")
"""


def image_folder(data: Path, split: str, count: int, out: Path) -> Path:
    """Write real images as files, one folder a class, unless they are there; return their folder."""
    if out.exists():
        return out
    images, labels = load_fashion_mnist(data, split, 32)
    part = out.with_suffix(".part")
    for index, (image, label) in enumerate(zip(images[:count], labels[:count].tolist(), strict=True)):
        path = part / str(label) / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)
    return part.rename(out)


def run_python(arguments: list[str], folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in a folder.

    Raises:
        RuntimeError: if it fails; says what ``script`` printed.
    """
    process = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise RuntimeError(f"{script} failed:\n{process.stdout}\n{process.stderr}")
    return process


def knn(checkout: Path, checkpoint: Path, train: Path, test: Path, folder: Path) -> float:
    """Return main_knn.py's top-1 in percent: k = 20, cosine, temperature 0.07, on the backbone's features."""
    options = (
        f"--image-size 28 {checkout}/main_knn.py --dataset custom --train_data_path {train} "
        f"--val_data_path {test} --batch_size 256 --num_workers 0 --pretrained_checkpoint_dir {checkpoint} "
        f"--k 20 --temperature 0.07 --feature_type backbone --distance_function cosine"
    )
    output = run_python(["-c", KNN, *shlex.split(options)], folder, "main_knn.py").stdout
    accuracy = re.search(r"acc@1=([\d.]+)", output)
    if accuracy is None:
        raise RuntimeError(f"main_knn.py printed no accuracy:\n{output}")
    return float(accuracy[1])


def pretrain(method: str, checkout: Path, folder: Path, options: list[str]) -> float:
    """Train one method by main_pretrain.py; return seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    configs = "pkg://mlviews.integrations.solo_learn.configs.fashion"
    configuration = ["--config-path", configs, "--config-name", method]
    fixed = ["checkpoint.dir=models", "auto_resume.enabled=false", "++log_every_n_steps=5"]
    script = ["-m", "mlviews.integrations.solo_learn", str(checkout / "main_pretrain.py")]
    begin = time.perf_counter()
    process = run_python([*script, *configuration, *fixed, *options], folder, "main_pretrain.py")
    seconds = time.perf_counter() - begin
    (folder / "log.txt").write_text(process.stdout + process.stderr)
    return seconds


def measure(
    method: str, checkout: Path, train: Path, test: Path, folder: Path, options: list[str]
) -> dict[str, Any]:
    """Train one method, and classify by its network and by the same network untrained."""
    seconds = pretrain(method, checkout, folder, options)
    with next(folder.glob("lightning_logs/*/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    logged = [
        float(value)
        for row in rows
        for key, value in row.items()
        if value and key.startswith(("train", "val"))
    ]
    loss = METHODS[method]
    checkpoint = next(folder.glob("models/*/*/*.ckpt"))
    settings = checkpoint.parent / "args.json"
    untrained = folder / "untrained"
    untrained.mkdir()
    shutil.copy(settings, untrained)
    run_python(
        ["-c", UNTRAINED, str(checkout), str(untrained), str(checkpoint)], folder, "The untrained network"
    )
    return {
        "batch_size": json.loads(settings.read_text())["optimizer"]["batch_size"],
        "loss": [[int(row["step"]), round(float(row[loss]), 4)] for row in rows if row[loss]],
        "not_finite": sum(not math.isfinite(value) for value in logged),
        "logged": len(logged),
        "knn": {
            "trained": knn(checkout, checkpoint.parent, train, test, folder),
            "untrained": knn(checkout, untrained, train, test, folder),
        },
        "seconds": round(seconds, 1),
    }


def main(
    checkout: Annotated[Path, typer.Argument(help="A checkout of solo-learn's main branch.")],
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four idx files.")],
    out: Annotated[Path, typer.Option(help="Working folder.")] = Path("runs/solo-learn"),
    quick: Annotated[bool, typer.Option(help="A few steps and images, nothing recorded.")] = False,
) -> None:
    """Train the three methods on views and classify real images by them."""
    out.mkdir(parents=True, exist_ok=True)
    out, checkout = out.resolve(), checkout.resolve()
    suffix, images = ("-quick", 400) if quick else ("", IMAGES)
    train = image_folder(data, "train", images, out / f"train{suffix}")
    test = image_folder(data, "test", images, out / f"test{suffix}")
    options = ["++data.mlvgm.num_samples=1280", "max_epochs=1"] if quick else []
    runs: dict[str, Any] = {}
    for method in METHODS:
        path = out / f"{method}{suffix}.json"
        if quick or not path.exists():
            run = measure(method, checkout, train, test, out / method, options)
            with whole(path) as part:
                part.write_text(json.dumps(run))
        runs[method] = json.loads(path.read_text())
    git = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    record = {
        "command": "python benchmarks/solo_learn.py CHECKOUT --data DIR",
        "solo_learn": f"vturrisi/solo-learn {commit}",
        "labelled_images": images,
        "test_images": images,
        "runs": runs,
        **environment(),
    }
    if quick:
        print(solo_learn(record))
    else:
        publish(record, RESULTS / "solo-learn.json", solo_learn(record))


if __name__ == "__main__":
    typer.run(main)
