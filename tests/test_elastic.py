"""Two nodes of which a process is killed, and the examples for clusters."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml
from elastic import FRESH_STORE, JOBS, run
from torch.distributed.run import get_args_parser

from mlviews.cli import app
from mlviews.integrations.plain_torch import train

CLUSTER = Path(__file__).parents[1] / "integrations" / "cluster"
# Of kubeflow/training-operator, pkg/apis/kubeflow.org/v1: pytorch_types.go and common_types.go.
SPEC = {"runPolicy": dict, "elasticPolicy": dict, "pytorchReplicaSpecs": dict, "nprocPerNode": str}
ELASTIC = {
    "minReplicas": int, "maxReplicas": int, "maxRestarts": int, "metrics": list, "nProcPerNode": int,
    "rdzvBackend": str, "rdzvConf": list, "rdzvHost": str, "rdzvId": str, "rdzvPort": int, "standalone": bool,
}  # fmt: skip
REPLICA = {"replicas": int, "template": dict, "restartPolicy": str}


def test_a_process_that_is_killed_comes_back(tmp_path: Path) -> None:
    """``kill -9`` in the middle of an epoch: every step of the training is taken once."""
    folder = tmp_path / "run"
    run(JOBS["training (plain torch, DDP)"], folder, "process", patience=240)
    state = torch.load(folder / "net.pt")["state"]
    assert state["source"] == {"seed": 0, "epoch": 1, "position": 0}
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {24}
    logs = [(folder / f"node{number}.log").read_text() for number in (0, 1)]
    assert any("exitcode: -9" in log for log in logs)
    assert sum("epoch 0: loss" in log for log in logs) == 1


def parsed(words: list[str]) -> Any:
    """What torchrun takes the words for; its program must take its own."""
    options = get_args_parser().parse_args(words)
    assert options.module
    if options.training_script == "mlviews.integrations.plain_torch.train":
        train.parser.parse_args(options.training_script_args)
    else:
        assert options.training_script == "mlviews.cli"
        assert options.training_script_args[0] in {
            command.callback.__name__ for command in app.registered_commands
        }
    return options


def test_the_sbatch_file(tmp_path: Path) -> None:
    script = CLUSTER / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    for name, body in (("scontrol", "echo node7; echo node8"), ("srun", 'printf "%q " "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "JOB_ID": "42",
        "JOB_NODELIST": "node[7-8]",
        "NNODES": "2",
        "GPUS_ON_NODE": "8",
        "SUBMIT_DIR": "/home/me dir",
    }
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    for program in ([], ["-m", "mlviews.cli", "export", "--out", "/shared/a b"]):
        done = subprocess.run(
            ["bash", str(script), *program], env=environment, capture_output=True, text=True, check=True
        )
        words = shlex.split(done.stdout)
        options = parsed(words[words.index("torchrun") + 1 :])
        assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("1:2", "8", 5)
        assert (options.rdzv_backend, options.rdzv_id, options.rdzv_endpoint) == ("c10d", "42", "node7:29500")
        path = "/shared/a b" if program else "/home/me dir/runs/plain_torch.pt"
        assert options.training_script_args[-1] == path


def test_the_pytorchjob() -> None:
    job = yaml.safe_load((CLUSTER / "pytorchjob.yaml").read_text())
    assert job.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    assert replicas.keys() <= {"Master", "Worker"}
    worker = replicas["Worker"]
    for part, schema in ((spec, SPEC), (spec["elasticPolicy"], ELASTIC), (worker, REPLICA)):
        assert {key: type(value) for key, value in part.items()} == {key: schema[key] for key in part}
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert container["command"][0] == "torchrun"
    assert {variable["name"]: variable["value"] for variable in container["env"]} == FRESH_STORE
    parsed(container["command"][1:])
    assert int(spec["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]


def test_the_pages_commands() -> None:
    first, other = re.findall(r"```sh\n(.*?)```", (CLUSTER / "README.md").read_text(), re.DOTALL)
    words = shlex.split(first.replace("\\\n", " "), comments=True)
    words = words[words.index("torchrun") + 1 :]
    parsed(words)
    torchrun = words[: words.index("-m")]
    for line in other.strip().splitlines():
        parsed([*torchrun, *shlex.split(line)])
