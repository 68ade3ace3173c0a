"""SimCLR, SimSiam and BYOL from an unmodified checkout of solo-learn, on views: ``python benchmarks/solo_learn.py CHECKOUT --data DIR``.

Each method trains with the ready configuration ``fashion`` on a CPU; then solo-learn's own main_knn.py classifies real Fashion-MNIST
images by its checkpoint, and by the same network untrained. main_knn.py moves all it does to a GPU, so ``Tensor.cuda`` does nothing here.
Methods that are there are kept: a second call goes on. Prints a table, writes ``benchmarks/results/solo-learn.json``.
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
from record import RESULTS, write
from rich.console import Console
from rich.table import Table
from torchvision.transforms.functional import to_pil_image

from mlviews.evaluation.data import load_fashion_mnist
from mlviews.runs.records import environment

METHODS = {"simclr": "train_nce_loss_step", "simsiam": "train_neg_cos_sim_step", "byol": "train_neg_cos_sim_step"}  # what each minimises
LAUNCHER = [sys.executable, "-m", "mlviews.integrations.solo_learn"]
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
torch.save({**checkpoint, "state_dict": METHODS[cfg.method](cfg).state_dict()}, sys.argv[2] + "/untrained.ckpt")
"""


def image_folder(data: Path, split: str, count: int, out: Path) -> Path:
    """Real images as files, one folder a class."""
    if not out.exists():
        images, labels = load_fashion_mnist(data, split, 32)
        part = out.with_suffix(".part")
        for index, (image, label) in enumerate(zip(images[:count], labels[:count].tolist(), strict=True)):
            (part / str(label)).mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(part / str(label) / f"{index:05d}.png")
        part.rename(out)
    return out


def knn(checkout: Path, folder: Path, train: Path, test: Path, out: Path) -> float:
    """Top-1 in percent of main_knn.py: k = 20, cosine, temperature 0.07, on the backbone's features."""
    arguments = (
        f"--image-size 28 {checkout}/main_knn.py --dataset custom --train_data_path {train} --val_data_path {test} --batch_size 256 "
        f"--num_workers 0 --pretrained_checkpoint_dir {folder} --k 20 --temperature 0.07 --feature_type backbone --distance_function cosine"
    )
    done = subprocess.run([sys.executable, "-c", KNN, *shlex.split(arguments)], cwd=out, capture_output=True, text=True, check=False)
    found = re.search(r"acc@1=([\d.]+)", done.stdout)
    if found is None:
        raise RuntimeError(f"main_knn.py failed:\n{done.stdout}\n{done.stderr}")
    return float(found[1])


def run(method: str, checkout: Path, train: Path, test: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """Train one method, and classify by it."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    begin = time.perf_counter()
    configuration = ["--config-path", "pkg://mlviews.integrations.solo_learn.configs.fashion", "--config-name", method]
    fixed = ["checkpoint.dir=models", "auto_resume.enabled=false", "++log_every_n_steps=5", *options]
    done = subprocess.run(
        [*LAUNCHER, str(checkout / "main_pretrain.py"), *configuration, *fixed], cwd=out, capture_output=True, text=True, check=False
    )
    (out / "log.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"main_pretrain.py failed:\n{done.stderr}")
    seconds = time.perf_counter() - begin

    with next(out.glob("lightning_logs/*/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    logged = [float(value) for row in rows for key, value in row.items() if value and key.startswith(("train", "val"))]
    losses = [[int(row["step"]), round(float(row[METHODS[method]]), 4)] for row in rows if row[METHODS[method]]]
    checkpoint = next(out.glob("models/*/*/*.ckpt"))
    scores = {"trained": knn(checkout, checkpoint.parent, train, test, out)}
    untrained = out / "untrained"
    untrained.mkdir()
    shutil.copy(checkpoint.parent / "args.json", untrained)
    subprocess.run([sys.executable, "-c", UNTRAINED, str(checkout), str(untrained), str(checkpoint)], check=True, capture_output=True)
    scores["untrained"] = knn(checkout, untrained, train, test, out)
    return {
        "batch_size": json.loads((checkpoint.parent / "args.json").read_text())["optimizer"]["batch_size"],
        "loss": losses,
        "not_finite": sum(not math.isfinite(value) for value in logged),
        "logged": len(logged),
        "knn": scores,
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
    train = image_folder(data, "train", 400 if quick else 10_000, out / f"train{'-quick' * quick}")
    test = image_folder(data, "test", 400 if quick else 10_000, out / f"test{'-quick' * quick}")
    options = ["++data.mlvgm.num_samples=1280", "max_epochs=1"] if quick else []
    table = Table(title="kNN of main_knn.py, % of real test images")
    for column in ("method", "loss, first", "last", "not finite", "untrained", "trained", "seconds"):
        table.add_column(column)
    runs: dict[str, Any] = {}
    for method in METHODS:
        kept = out / f"{method}{'-quick' * quick}.json"
        if quick or not kept.exists():
            made = run(method, checkout, train, test, out / method, options)
            kept.write_text(json.dumps(made))
        runs[method] = json.loads(kept.read_text())
        one = runs[method]
        ends = [f"{one['loss'][i][1]:.3f}" for i in (0, -1)]
        scores = [f"{one['knn'][name]:.1f}" for name in ("untrained", "trained")]
        table.add_row(method, *ends, f"{one['not_finite']} of {one['logged']}", *scores, str(one["seconds"]))
    Console().print(table)
    if quick:
        return
    commit = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    record = {
        "command": "python benchmarks/solo_learn.py CHECKOUT --data DIR",
        "solo_learn": f"vturrisi/solo-learn {commit.stdout.strip()}",
        "labelled_images": 10_000,
        "test_images": 10_000,
        "runs": runs,
        **environment(),
    }
    Console().print(write(record, RESULTS / "solo-learn.json"))


if __name__ == "__main__":
    typer.run(main)
