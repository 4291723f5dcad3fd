"""The command lines that start ranks, to the word: a list, so that no word is split or expanded on the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_specialm.config.site import Container, Launcher
from megatron_specialm.slurm.allocation import Allocation, node_command, rank_command
from megatron_specialm.slurm.sbatch import JobSize

ALLOCATION = Allocation("7_0", 0, 0, ("node1", "node2"), "10.0.0.1", cpus_per_task=4, gpus_per_node=8)
COMMAND = ["/my env/python", "-m", "megatron_specialm", "work", '/my run/it\'s "$HOME";.json']
SHAPE = JobSize(16, 8)
FOLDER = Path("/my project")
STEP = ["srun", "--kill-on-bad-exit=1", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=4"]
ON_NODES = ["srun", "--kill-on-bad-exit=1", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=32"]
NUMBERED = ["bash", "-c", 'PET_NODE_RANK=$SLURM_NODEID exec "$@"', "torchrun"]
AGENT = [
    "-m",
    "torch.distributed.run",
    "--nnodes=2",
    "--nproc-per-node=8",
    "--master-addr=10.0.0.1",
    "--master-port=2900",
]
PYXIS = Container(runtime="pyxis", image="/my images/a.sqsh", mounts=["/a b:/c", "/data:/data"])
APPTAINER = Container(runtime="apptainer", image="/my images/a.sif", mounts=["/a b:/c", "/data:/data"])
IN_PYXIS = [
    "--container-image=/my images/a.sqsh",
    "--container-mounts=/a b:/c,/data:/data",
    "--container-workdir=/my project",
]
IN_APPTAINER = ["apptainer", "exec", "--nv", "--bind", "/a b:/c", "--bind", "/data:/data", "--pwd", "/my project"]


def _line(launcher: Launcher, container: Container | None = None, size: JobSize = SHAPE) -> list[str]:
    return rank_command(
        COMMAND, launcher=launcher, size=size, allocation=ALLOCATION, port=2900, container=container, folder=FOLDER
    )


def test_srun_and_mpi_start_every_rank() -> None:
    assert _line("srun") == [*STEP, "--mpi=none", "--label", *COMMAND]
    assert _line("mpi") == [*STEP, "--mpi=pmix", "--label", *COMMAND]


def test_torchrun_starts_the_ranks_of_its_node() -> None:
    agent = [COMMAND[0], *AGENT, "--no-python"]
    assert _line("torchrun") == [*ON_NODES, "--mpi=none", "--label", *NUMBERED, *agent, *COMMAND]


@pytest.mark.parametrize("launcher", ["srun", "mpi"])
def test_ranks_in_a_container(launcher: Launcher) -> None:
    start = [*STEP, "--mpi=none" if launcher == "srun" else "--mpi=pmix", "--label"]
    assert _line(launcher, PYXIS) == [*start, *IN_PYXIS, *COMMAND]
    assert _line(launcher, APPTAINER) == [*start, *IN_APPTAINER, APPTAINER.image, *COMMAND]


def test_torchrun_in_a_container() -> None:
    start, agent = [*ON_NODES, "--mpi=none", "--label"], [COMMAND[0], *AGENT, "--no-python"]
    assert _line("torchrun", PYXIS) == [*start, *IN_PYXIS, *NUMBERED, *agent, *COMMAND]
    assert _line("torchrun", APPTAINER) == [*start, *NUMBERED, *IN_APPTAINER, APPTAINER.image, *agent, *COMMAND]


def test_pyxis_takes_no_empty_list_of_mounts() -> None:
    line = _line("srun", Container(runtime="pyxis", image="a"))
    assert not [word for word in line if word.startswith("--container-mounts")]


@pytest.mark.parametrize(
    ("container", "words"), [(None, []), (PYXIS, IN_PYXIS), (APPTAINER, [*IN_APPTAINER, APPTAINER.image])]
)
def test_once_on_each_node_where_its_ranks_would_be(container: Container | None, words: list[str]) -> None:
    line = node_command(["python3", "look"], size=SHAPE, allocation=ALLOCATION, container=container, folder=FOLDER)
    assert line == [*ON_NODES, "--mpi=none", "--label", *words, "python3", "look"]


def test_torchruns_wrapper_tells_the_nodes_number_and_passes_every_word_on() -> None:
    program = "import os, sys; print(os.environ['PET_NODE_RANK'], sys.argv[1:])"
    line = _line("torchrun")
    start = line.index("bash")
    outcome = subprocess.run(
        [*line[start : start + len(NUMBERED)], sys.executable, "-c", program, *COMMAND],
        env={**os.environ, "SLURM_NODEID": "1"}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert outcome.stdout == f"1 {COMMAND}\n"
