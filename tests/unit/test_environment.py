import pytest

from megatron_specialm.base.environment import ALONE, discover_world, first_slurm_host
from megatron_specialm.base.errors import MachineError


def test_nothing_set_is_alone() -> None:
    assert discover_world({}) == ALONE
    assert discover_world({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}) == ALONE, "inside sbatch, not under srun"


def test_torchrun() -> None:
    world = discover_world({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"})
    assert (world.rank, world.world_size, world.local_rank, world.init_method) == (3, 4, 1, "env://")


def test_srun() -> None:
    world = discover_world(
        {
            "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1",
            "SLURM_STEP_NODELIST": "gpu[003-004],x1", "SLURM_JOB_ID": "123456",
        }
    )  # fmt: skip
    assert (world.rank, world.world_size, world.local_rank) == (5, 8, 1)
    assert world.init_method == f"tcp://gpu003:{20_000 + 123456 % 20_000}"


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-007,9],cpu1", "gpu003"), ("a-b[1,2]", "a-b1")]
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_slurm_host(nodes) == first


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK 2 is not below"),
    ],
)
def test_contradictions(variables: dict[str, str], says: str) -> None:
    with pytest.raises(MachineError, match=says):
        discover_world(variables)


SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n1",
    "SLURM_JOB_ID": "7",
}  # fmt: skip
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_srun_of_a_cluster_whose_default_is_pmix_needs_no_mpi4py() -> None:
    assert discover_world({**SLURM, "PMIX_RANK": "1"}).launcher == "srun"


def test_the_supervisors_word_on_the_launcher_decides() -> None:
    both = {**SLURM, **TORCHRUN}
    assert discover_world(both).launcher == "torchrun"
    chosen = discover_world({**both, "SPECIALM_LAUNCHER": "srun"})
    assert (chosen.launcher, chosen.rank, chosen.init_method) == ("srun", 1, "tcp://10.0.0.1:29500")
    assert discover_world({**both, "SPECIALM_LAUNCHER": "torchrun"}).world_size == 4


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"SPECIALM_LAUNCHER": "slurm"}, "must be one of torchrun, srun, mpi, none"),
        ({"SPECIALM_LAUNCHER": "srun"}, "SLURM_NTASKS=None"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "not a node list"),
    ],
)
def test_a_launcher_that_left_nothing(variables: dict[str, str], says: str) -> None:
    with pytest.raises(MachineError, match=says):
        discover_world(variables)


STEP = {**SLURM, "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}


@pytest.mark.parametrize(
    "variables",
    [
        {**STEP, "SLURM_STEP_ID": str(0xFFFFFFFA)},  # the interactive step
        {**STEP, "SLURM_STEP_ID": str(0xFFFFFFFA), "PMIX_RANK": "0"},  # on a cluster whose default is PMIx
        {**STEP, "SLURM_STEP_ID": str(0xFFFFFFFB), "SLURM_STEP_NUM_TASKS": "4"},  # batch
        {**STEP, "SLURM_STEP_ID": str(0xFFFFFFFC)},  # extern
        {**STEP, "SLURM_STEP_ID": "0"},  # srun --pty bash
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a shell that is in no step
        {"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},
        {**TORCHRUN, "SPECIALM_LAUNCHER": "none"},
    ],
)
def test_where_there_is_one_task_it_is_alone(variables: dict[str, str]) -> None:
    assert discover_world(variables) == ALONE


def test_one_rank_of_torchrun_needs_no_rendezvous_address() -> None:
    assert discover_world({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1


def test_ranks_are_counted_by_the_step_not_by_the_job() -> None:
    world = discover_world({**SLURM, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"})
    assert (world.rank, world.world_size, world.launcher) == (1, 2, "srun")


def test_one_rank_of_a_supervised_job_has_its_launcher() -> None:
    world = discover_world({**STEP, "SPECIALM_LAUNCHER": "srun"})
    assert (world.rank, world.world_size, world.launcher) == (0, 1, "srun")
