"""Verify the artifacts of a run folder.

The files of a finished task are those in its marker; those of an unfinished training are its checkpoints. Other files are
reported, too; no reader opens them.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_specialm.base.artifacts import ARTIFACTS, LABEL, MARKER, read_label, read_marker
from megatron_specialm.base.errors import ArtifactError, SpecialmError
from megatron_specialm.base.files import MANIFEST, verify_folder
from megatron_specialm.base.integrity import check_files, find_damage, present_files
from megatron_specialm.graph.earlier_layout import refuse_earlier_layout


@dataclass
class Finding:
    """What was verified, and the findings: damage, files that no manifest lists, and missing markers."""

    artifacts: int = 0
    files: int = 0
    bytes: int = 0
    unfinished: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)


def verify(root: Path, *, deep: bool) -> Finding:
    """Verify every artifact.

    Args:
        deep: read every byte; otherwise check that the files are there with their sizes.

    Raises:
        ArtifactError: there is no run folder.
    """
    refuse_earlier_layout(root)
    if not (root / ARTIFACTS).is_dir():
        raise ArtifactError(f"{root}: not a run folder (it has no {ARTIFACTS}/): name the `root` of a run")
    finding = Finding()
    marks = {path.parent for name in (LABEL, MARKER) for path in (root / ARTIFACTS).glob(f"*/*/*/{name}")}
    for folder in sorted(marks):  # also folders that lack one of the two
        try:
            _verify(folder, finding, deep=deep)
        except SpecialmError as error:
            finding.damage.append(str(error))
    return finding


def _verify(folder: Path, finding: Finding, *, deep: bool) -> None:
    finding.artifacts += 1
    digest, marker = read_label(folder)["digest"], read_marker(folder)
    if not digest.startswith(folder.name):
        raise ArtifactError(f"{folder / LABEL}: is of digest {digest}, and the folder of {folder.name}")
    if marker is None:
        finding.unfinished.append(str(folder / MARKER))
        if deep:
            for manifest in sorted(folder.rglob(MANIFEST)):
                verify_folder(manifest.parent)
        return
    if marker.digest != digest:
        raise ArtifactError(f"{folder / MARKER}: is of digest {marker.digest}, and {LABEL} of {digest}")
    finding.files += len(marker.files)
    finding.bytes += sum(seal.bytes for seal in marker.files.values())
    present = present_files(folder, without=(LABEL, MARKER))
    finding.unlisted += [str(folder / name) for name in present if name not in marker.files]
    if deep:
        check_files(folder, marker.files, again=True)
    elif damage := find_damage(folder, marker.files):
        raise ArtifactError(damage)
