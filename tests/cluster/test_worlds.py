"""The world of a process by Slurm's own variables: it is a rank of its step, never of the job around it."""

import sys
from pathlib import Path

import pytest

from tests.cluster.testbed import Cluster

pytestmark = pytest.mark.timeout(400)
ROOT = Path(__file__).parents[2]
PRINT = """
from megatron_specialm.base.environment import discover_world
from megatron_specialm.base.rendezvous import rendezvous
world = discover_world()
rendezvous(world)
print(world.launcher, world.rank, world.world_size, flush=True)
"""


def _python(program: str) -> str:
    return f"env PYTHONPATH={ROOT} OMP_NUM_THREADS=1 {sys.executable} -c '{program}'"


def test_the_tasks_of_a_step_are_ranks_and_a_step_of_one_task_is_alone(cluster: Cluster) -> None:
    command = _python(PRINT)
    script = f"{command}; echo; srun --ntasks=1 --nodes=1 --label {command}; echo; srun --kill-on-bad-exit=1 {command}"
    allocate = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2", "bash", "-c", script)
    shell, one, all_of_them = cluster.run(*allocate).split("\n\n")
    assert shell == "none 0 1" and one == "0: none 0 1"
    assert sorted(all_of_them.split("\n")[:4]) == [f"srun {rank} 4" for rank in range(4)]
