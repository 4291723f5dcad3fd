from pathlib import Path

import pytest
import torch

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import write_json
from megatron_specialm.base.integrity import list_files
from megatron_specialm.checkpoint.opening import newest_checkpoint, open_checkpoint, read_checkpoint
from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.checkpoint.steps import declare_final, find_final, prune_checkpoints, saved_steps, step_folder


def _save(folder: Path, step: int) -> None:
    save_checkpoint(
        folder,
        step=step,
        weights={"w": torch.full((4,), float(step))},
        optimizer_state={"exp_avg/w": torch.zeros(4)},
        state={"progress": {"step": step}},
    )


def test_resume_takes_the_newest_that_verifies_and_says_what_it_passed_over(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    path = step_folder(tmp_path, 3) / "model-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (step_folder(tmp_path, 2) / "optimizer-00000.safetensors").unlink()
    (tmp_path / ".step_0000004.0123abcd.tmp").mkdir()  # what a kill in the middle of a save leaves
    found, passed_over = newest_checkpoint(tmp_path)
    assert found is not None and open_checkpoint(found).state["progress"]["step"] == 1
    assert ["step_0000003" in passed_over[0], "changed" in passed_over[0]] == [True, True]
    assert ["step_0000002" in passed_over[1], "missing" in passed_over[1]] == [True, True]


def test_nothing_saved_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") == (None, [])


def test_retention_keeps_the_newest_and_those_named(tmp_path: Path) -> None:
    for step in range(1, 7):
        _save(tmp_path, step)
    prune_checkpoints(tmp_path, step=6, keep=2, beside=(1, None, 3))
    assert saved_steps(tmp_path) == [1, 3, 5, 6]


def test_retention_counts_no_step_behind_the_one_just_saved(tmp_path: Path) -> None:
    """Such steps were passed over, as damaged: each new step would be removed at once."""
    for step in (1, 2, 3, 4, 8, 9):
        _save(tmp_path, step)
    prune_checkpoints(tmp_path, step=4, keep=2, beside=(1,))
    assert saved_steps(tmp_path) == [1, 3, 4, 8, 9]


def test_a_damaged_step_is_no_outcome(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    (step_folder(tmp_path, 5) / "model-00000.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"0 bytes.*run the same command again"):
        declare_final(tmp_path, step=5)
    write_json(tmp_path / "result.json", {"step": 6, "folder": "step_0000006"})
    with pytest.raises(ArtifactError, match=r"remove .*/done.json and run again, which goes on from the checkpoints"):
        find_final(tmp_path)


def test_an_artifact_is_not_finished_with_a_file_that_its_manifest_lists_and_that_is_not_there(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    (step_folder(tmp_path, 5) / "optimizer-00000.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"optimizer-00000\.safetensors: No such file.*run the same command again"):
        list_files(tmp_path)


def test_the_outcome_is_named(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    declare_final(tmp_path, step=5)
    assert read_checkpoint(find_final(tmp_path)).weights["w"].tolist() == [5.0] * 4


def test_no_outcome_before_the_end(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        find_final(tmp_path)
