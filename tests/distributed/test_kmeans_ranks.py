"""k-means over real MPI ranks: the same centroids to the last bit on one, two and three, and an error on all of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_specialm.clustering import kmeans
from megatron_specialm.clustering.vectors import describe_vectors, join_vectors

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
import faiss
import numpy as np
from megatron_specialm.clustering import kmeans
from megatron_specialm.clustering.kmeans import MpiRanks
from megatron_specialm.clustering.vectors import Vectors

faiss.omp_set_num_threads(1)
kmeans.BLOCK, ranks, folder = 512, MpiRanks(), Path(sys.argv[1])
result = kmeans.fit(Vectors(folder), k=16, iterations=5, seed=3, sample=6_000, ranks=ranks)
np.savez(f"{sys.argv[2]}-{ranks.rank}.npz", c=result.centroids, sizes=result.sizes, inertia=result.inertia)
"""

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 unit vectors in three files; every other one is the same, so that clusters run empty."""
    pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")
    folder = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(0)
    # So far apart in size that sums in float64 would round, and differ by who adds first.
    values = (rng.normal(size=(10_000, 32)) * 2.0 ** rng.integers(-45, 1, (10_000, 32))).astype(np.float32)
    values[::2] = values[0]
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    parts = [folder / f"generic.{number:05d}" for number in range(3)]
    for part, rows in zip(parts, np.array_split(values, 3), strict=True):
        part.mkdir()
        np.save(part / "train.npy", rows)
        describe_vectors(part)
    (folder / "generic").mkdir()
    join_vectors(parts, folder=folder / "generic")
    return folder / "generic"


def _fit(vectors: Path, output: Path, *, ranks: int) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }  # fmt: skip
    command = ["mpirun", "--oversubscribe", "-n", str(ranks), sys.executable, "-c", PROGRAM, str(vectors), str(output)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_same_centroids_on_any_number_of_ranks(vectors: Path, tmp_path: Path) -> None:
    results = []
    for ranks in (1, 2, 3):
        outcome = _fit(vectors, tmp_path / str(ranks), ranks=ranks)
        assert outcome.returncode == 0, outcome.stderr
        results += [np.load(tmp_path / f"{ranks}-{rank}.npz") for rank in range(ranks)]
    for result in results[1:]:
        for name in ("c", "sizes", "inertia"):
            np.testing.assert_array_equal(result[name], results[0][name], err_msg=name)
    assert results[0]["sizes"].sum() == 6_000 and results[0]["sizes"].max() >= 2_900
    assert len(np.unique(results[0]["c"], axis=0)) == 16


def test_a_vector_that_is_not_finite_ends_every_rank(vectors: Path, tmp_path: Path) -> None:
    """The bad vectors are one rank's: the others must not wait for it for ever."""
    (tmp_path / "bad").mkdir()
    values = np.ones((2_000, 4), np.float32)
    values[3] = np.nan
    np.save(tmp_path / "bad" / "train.npy", values)
    describe_vectors(tmp_path / "bad")
    outcome = _fit(tmp_path / "bad", tmp_path / "out", ranks=2)
    assert outcome.returncode != 0
    assert outcome.stderr.count("1 of 2000 vectors are not finite") >= 1
    assert not list(tmp_path.glob("out*"))


def test_ranks_with_no_block_of_their_own_take_part(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")
    values = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
    (tmp_path / "few").mkdir()
    np.save(tmp_path / "few" / "train.npy", values)
    describe_vectors(tmp_path / "few")
    outcome = _fit(tmp_path / "few", tmp_path / "out", ranks=3)
    assert outcome.returncode == 0, outcome.stderr
    alone = kmeans.fit(values, k=16, iterations=5, seed=3, sample=6_000)
    np.testing.assert_allclose(np.load(tmp_path / "out-2.npz")["c"], alone.centroids, atol=1e-5)
