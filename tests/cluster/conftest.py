"""A Slurm cluster for the tests of this folder: they are skipped where none can be had, unless it is required."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.testbed import Cluster, running_cluster

PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "setpriv")
PACKAGES = ("slurm-wlm", "munge", "iproute2", "openmpi-bin", "libpmix-dev")  # the last for `srun --mpi=pmix`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder, and start the cluster for none of the others."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    """Four nodes of four cores each, for the whole test run."""
    _install()
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    reason = "not root" if os.getuid() != 0 else f"{', '.join(missing)} not installed" if missing else ""
    if reason:
        _refuse(f"no Slurm cluster here: {reason}")
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with all nodes idle before the test and after it."""
    yield session_cluster
    session_cluster.reset()


def _install() -> None:
    """Install Slurm with apt where we may. What fails shows as a program that is missing."""
    wanted = [p for p in PROGRAMS if shutil.which(p) is None]
    if not wanted or os.getuid() != 0 or shutil.which("apt-get") is None:
        return
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        subprocess.run(
            ["apt-get", *command], env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True
        )


def _refuse(reason: str) -> None:
    if os.environ.get("SPECIALM_REQUIRE_CLUSTER") == "1":
        pytest.fail(f"{reason}, and SPECIALM_REQUIRE_CLUSTER=1")
    pytest.skip(reason)
