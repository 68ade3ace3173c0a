"""Jobs on two nodes, of which a process or a whole node is killed: does the result change?

``python benchmarks/elastic.py``

Two torchrun agents on this machine play the nodes, under an elastic rendezvous (``--nnodes 1:2``), each with
a process on a CPU. Every job runs undisturbed, then with ``kill -9`` for the second node's process, then for
the second node as a whole, which is started again. Exits with 1 if a result differs from the first.
Prints a table, writes ``benchmarks/results/elastic.json``. A second call takes up the runs that have ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import psutil
import torch
import typer
from documents.integrations import elastic
from record import RESULTS, command, publish

import mlviews
from mlviews.integrations.files import verify
from mlviews.integrations.plain_torch import train
from mlviews.runs.processes import rank_of_run
from mlviews.runs.records import environment

SWEEP = {"pairs": 4, "train_pairs": 2, "width": 8, "steps": 20, "evaluations": 2, "checkpoint_every": 5}
WALKER = {
    "pairs": 4,
    "width": 8,
    "warmup": 40,
    "steps": 10,
    "patience": 5,
    "checkpoint_every": 5,
    "levels": [1],
}
# Else processes that are started again may read addresses of the start before (pytorch/pytorch#135712).
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
KILLS = ("", "process", "node")


class Job(NamedTuple):
    """What runs on the nodes."""

    words: Callable[[Path], list[str]]  # for torchrun, that write to a folder
    begun: Callable[[Path], bool]  # whether there is something to lose
    result: Callable[[Path], Any]  # what has to be the same


# -- nodes ---------------------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
    return port


def node(number: int, port: int, words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a node: torchrun with a process, whose output goes to the end of a file.

    Node 0 holds the rendezvous, which must not be killed.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-id=elastic", f"--rdzv-endpoint=localhost:{port}"]
    rendezvous.append(f"--rdzv-conf=is_host={int(number == 0)}")
    variables = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **FRESH_STORE}
    with log.open("ab") as file:
        return subprocess.Popen(
            [*torchrun, *rendezvous, "--max-restarts=3", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=variables,
        )


def kill(agent: subprocess.Popen[bytes], whole: bool) -> None:
    """Kill a node's process; with ``whole`` its agent first."""
    processes = psutil.Process(agent.pid).children(recursive=True)
    if whole:
        agent.kill()
        agent.wait()
    for process in processes:
        process.send_signal(signal.SIGKILL)


def run(job: Job, folder: Path, victim: str, patience: float = 600) -> float:
    """Run a job on two nodes; return the seconds it took.

    Args:
        job: the job.
        folder: where it writes to; a new one.
        victim: what is killed once the job has begun: the second node's "process", that "node", or nothing.
        patience: seconds after which the job is given up.

    Raises:
        RuntimeError: if a node fails, or it takes longer.
    """
    folder.mkdir(parents=True)
    port, words, logs = free_port(), job.words(folder), [folder / "node0.log", folder / "node1.log"]
    begin = time.monotonic()
    agents = [node(number, port, words, log) for number, log in enumerate(logs)]
    try:
        while any(agent.poll() is None for agent in agents):
            if time.monotonic() - begin > patience:
                raise RuntimeError(f"No end after {patience:.0f} s; see {logs[0]} and {logs[1]}.")
            if victim and job.begun(folder):
                kill(agents[1], victim == "node")
                if victim == "node":
                    agents[1] = node(1, port, words, logs[1])
                victim = ""
            time.sleep(0.02)
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill(agent, whole=True)
    codes = [agent.returncode for agent in agents]
    if any(codes) or victim:
        raise RuntimeError(f"The nodes ended with {codes}; see {logs[0]} and {logs[1]}.")
    return time.monotonic() - begin


def recorded(job: Job, folder: Path, victim: str) -> float:
    """Return the seconds of an earlier call, if it ran the job to its end; run it anew if not."""
    path = folder / "seconds.json"
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)
        seconds = run(job, folder, victim)
        path.write_text(json.dumps(seconds))
    return float(json.loads(path.read_text()))


# -- jobs ----------------------------------------------------------------------------------------------------


def training_words(folder: Path) -> list[str]:
    """Return the plain torch example's words: 24 steps, and a checkpoint at every fifth."""
    sizes = "--num-samples 768 --batch-size 16 --epochs 1 --save-every 5"
    return [str(train.__file__), *sizes.split(), "--out", str(folder / "net.pt")]


def training_result(folder: Path) -> Any:
    """Return the weights, the optimizer's state and the source's, as texts of all bytes."""
    state = torch.load(folder / "net.pt")["state"]
    moments = state["optimizer"]["state"]
    tensors = [*state["net"].values(), *(value for part in moments.values() for value in part.values())]
    return [state["source"], *(tensor.numpy().tobytes().hex() for tensor in tensors)]


def export_words(folder: Path) -> list[str]:
    """Return the words of an export of 512 samples in shards of 32."""
    sizes = "--num-samples 512 --shard-size 32 --batch-size 32 --format webdataset"
    return ["-m", "mlviews.cli", "export", *sizes.split(), "--out", str(folder / "export")]


def export_result(folder: Path) -> Any:
    """Return the manifest, which has the checksums of all files; they are compared first."""
    verify(folder / "export")
    return json.loads((folder / "export" / "manifest.json").read_text())


def measure(folder: Path) -> None:
    """Measure the levels of ``fashion`` by both methods, at a size of seconds."""
    generator = mlviews.load_generator("fashion")
    rows = []
    for method, options in (("walker", WALKER), ("sweep", SWEEP)):
        report = mlviews.measure_impact(
            generator, method, 0.7, folder, monte_carlo=500, progress=False, **options
        )
        rows += report.rows()
    if rank_of_run() == 0:
        (folder / "rows.json").write_text(json.dumps(rows))


def measurement_result(folder: Path) -> Any:
    """Return the report's rows, without the seconds."""
    rows = json.loads((folder / "rows.json").read_text())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


JOBS = {
    "training (plain torch, DDP)": Job(
        training_words, lambda folder: (folder / "net.pt").exists(), training_result
    ),
    "`mlviews export`": Job(
        export_words, lambda folder: any(folder.glob("export/checksums/*.sha256")), export_result
    ),
    "`measure_impact`, both methods": Job(
        lambda folder: [str(Path(__file__).resolve()), "--measurement", str(folder)],
        lambda folder: (folder / "walker-1" / "checkpoint.pt").exists(),
        measurement_result,
    ),
}


def main(
    work: Annotated[Path, typer.Option(help="Folder for the jobs.")] = Path("runs/elastic"),
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS / "elastic.json",
    measurement: Annotated[
        Path | None, typer.Option(help="What the nodes call: measure into this folder.", hidden=True)
    ] = None,
) -> None:
    """Run every job undisturbed and with kills, and compare."""
    if measurement is not None:
        measure(measurement)
        return
    rows = []
    for number, (name, job) in enumerate(JOBS.items()):
        folders = {victim: work.resolve() / f"{number}-{victim or 'undisturbed'}" for victim in KILLS}
        for victim, folder in folders.items():
            seconds = recorded(job, folder, victim)
            same = job.result(folder) == job.result(folders[""])
            rows.append({"job": name, "killed": victim, "seconds": round(seconds, 1), "same": same})
            print(rows[-1], flush=True)
    record = {"command": command("elastic.py"), "rows": rows, "seed": 0, **environment()}
    publish(record, out, elastic(record), generators=["fashion"])
    if not all(row["same"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
