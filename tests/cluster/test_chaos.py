"""Jobs that are cancelled, queued again, killed and lost at random moments end as a run that nobody disturbs. `tools/chaos.py
--slurm` does it for longer."""

from pathlib import Path

import pytest

from tests.cluster.testbed import Cluster
from tools.disturbed.jobs import disturbed_jobs
from tools.disturbed.local import straight_run

SIZES = {"steps": 200, "every": 5, "until": "slm"}

pytestmark = pytest.mark.timeout(1200)


def test_disturbed_jobs_end_with_the_same_bits(cluster: Cluster, tmp_path: Path) -> None:
    straight_run(tmp_path / "straight", **SIZES)
    jobs = disturbed_jobs(cluster, tmp_path / "jobs", tmp_path / "straight", seed=0, at_most=4, **SIZES)
    assert not jobs.faults, "\n".join([*jobs.faults, f"happened: {dict(jobs.happened)}"])
    assert jobs.happened
