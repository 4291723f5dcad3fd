"""Jobs that are cancelled, queued again, killed and lost at random moments end as a run that nobody disturbs. `tools/chaos.py
--slurm` does it for longer."""

from pathlib import Path

import pytest

from tests.cluster.testbed import Cluster

ROOT = Path(__file__).parents[2]
SIZES = {"steps": 200, "every": 5, "until": "slm"}

pytestmark = pytest.mark.timeout(400)


def test_disturbed_jobs_end_with_the_same_bits(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from disturbed.jobs import disturbed_jobs
    from disturbed.local import straight_run

    straight_run(tmp_path / "straight", **SIZES)
    jobs = disturbed_jobs(cluster, tmp_path / "jobs", tmp_path / "straight", seed=0, at_most=4, **SIZES)
    assert not jobs.faults, "\n".join([*jobs.faults, f"happened: {dict(jobs.happened)}"])
    assert jobs.happened
