"""Configs that would be read for ever, or fill the memory, are refused before they do; by one reader wherever YAML comes from.

No time is asserted: what is not bounded does not end within a test's.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config import yaml_file
from megatron_specialm.config.load import MAX_CONFIGS, load_pipeline
from megatron_specialm.config.site import Site, load_site, template_of
from megatron_specialm.config.yaml_file import MAX_BYTES, MAX_LEVELS, MAX_VALUES, read_yaml, read_yaml_file
from megatron_specialm.slurm.sbatch import render
from tests.conftest import ROOT

SMOKE = ROOT / "configs" / "pipelines" / "smoke.yaml"


def _doubling(line: str, first: str, *, times: int = 10, levels: int = 12) -> str:
    """Lines of which each names the one before so many times: 10 to the power of 12 values."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{level}: &a{level} {line % ', '.join([f'*a{level - 1}'] * times)}" for level in range(1, levels)]
    return "\n".join(lines) + "\n"


HOSTILE = {
    "lists of aliases": (_doubling("[%s]", "[x]"), "50,000 values"),
    "maps of aliases": (
        "a0: &a0 {x: 1}\n"
        + "".join(f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(10))}}}\n" for n in range(1, 12)),
        "50,000 values",
    ),
    "merges of merges": (_doubling("{<<: [%s]}", "{x: 1}"), "50,000 values"),
    "two merges at a time": (_doubling("{<<: [%s]}", "{x: 1}", times=2, levels=40), "50,000 values"),
    "a list inside itself": ("a: &a [*a]\n", "an anchor contains itself"),
    "a map inside itself": ("a: &a {b: {c: [*a]}}\n", "an anchor contains itself"),
    "a merge of itself": ("a: &a {<<: *a}\n", "an anchor contains itself"),
    "a merge of a list of itself": ("a: &a {<<: [*a, *a]}\n", "an anchor contains itself"),
    "open brackets": ("a: " + "[" * 100_000, "too deep"),
    "brackets": ("a: " + "[" * 1000 + "]" * 1000, "too deep"),
    "maps": ("a: " + "{b: " * 1000 + "1" + "}" * 1000, "too deep"),
    "indented": ("".join(" " * n + "k:\n" for n in range(1000)), "too deep"),
    "a list of a list": ("- " * 1000, "too deep"),
    "many values": ("a: [" + "1," * (MAX_VALUES + 1) + "]", "50,000 values"),
    "many keys": ("".join(f"k{n}: 1\n" for n in range(MAX_VALUES)), "50,000 values"),
    "many mistakes": ("".join(f"k{n}: 1\n" for n in range(MAX_VALUES // 3)), "more mistakes"),
    "a long key": ("k" * (MAX_BYTES // 2) + ": 1", "not valid YAML|unknown key"),
    "a long number": ("seed: " + "9" * (MAX_BYTES // 2), "64 bits"),
    "a long alias": ("a: *" + "x" * (MAX_BYTES // 2), "undefined alias"),
    "a long text": ("name: " + "x" * (MAX_BYTES // 2), "name: "),
    "too many bytes": ("#" * (MAX_BYTES + 1), "more than 4,1[0-9,]* bytes"),
    "a program": ("a: !!python/object/apply:os.system [touch HERE]\n", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_is_refused_in_few_words(name: str, tmp_path: Path) -> None:
    content, says = HOSTILE[name]
    (tmp_path / "config.yaml").write_text(content)
    for load in (load_pipeline, load_site):
        with pytest.raises(ConfigError, match=says) as found:
            load(tmp_path / "config.yaml")
        assert str(found.value).startswith(str(tmp_path / "config.yaml")) and len(str(found.value)) < 10_000


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as line:
        line.bind(str(path))


def _large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)  # without a block on the disk


NO_CONFIGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "zero": (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    "random": (lambda path: path.symlink_to("/dev/urandom"), "no regular file"),
    "null": (lambda path: path.symlink_to("/dev/null"), "no regular file"),
    "pipe": (_fifo, "no regular file"),
    "socket": (_socket, "cannot be read"),
    "folder": (Path.mkdir, "no regular file"),
    "10 GiB": (_large, "more than 4,1[0-9,]* bytes"),
    "loop": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels"),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe"), "not UTF-8"),
    "nothing": (lambda path: None, "no such|No such"),
}


@pytest.mark.parametrize("name", NO_CONFIGS)
def test_what_is_no_config_is_neither_waited_for_nor_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a config, as what one extends, as a preset, as a profile, and as a profile's template."""
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    make, says = NO_CONFIGS[name]
    make(Path("x.yaml"))
    Path("config.yaml").write_text("extends: x.yaml\n")
    for load in (load_pipeline, load_site):
        with pytest.raises(ConfigError, match=says):
            load(Path("config.yaml"))
    with pytest.raises(ConfigError, match=says):
        load_pipeline(Path("x.yaml"))
    with pytest.raises(ConfigError, match=f"{says}|no such site profile"):
        load_site(Path("x.yaml"))
    site = Site(template="x.yaml")
    with pytest.raises(ConfigError, match=r"x\.yaml.*correct `template`"):
        render(template_of(site, Path("site.yaml")), site, directives=[], folder=Path(), code=Path(), command=[])
    if name != "nothing":
        Path("models").mkdir()
        Path("other.yaml").write_text(f"extends: {SMOKE}\n")
        Path("x.yaml").rename("models/own.yaml") if name != "loop" else Path("models/own.yaml").symlink_to("own.yaml")
        with pytest.raises(ConfigError, match=says):
            load_pipeline(Path("other.yaml"), ["stages.slm.model=own"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("name={a0: &a0 [x], " + ", ".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)) + "}",
         "50,000 values"),
        ("name=&x [*x]", "an anchor contains itself"),
        ("name=" + "[" * 60_000, "too deep"),
        (".".join(["a"] * 20_000) + "=1", f"more than {MAX_LEVELS} dots"),
        ("a" * 100_000 + "=1", "unknown key"),
        ("a" * 100_000, "write KEY=VALUE"),
        ("seed=" + "9" * 100_000, "64 bits"),
    ],
    ids=range(7),
)  # fmt: skip
def test_overrides_are_read_as_configs_are(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as found:
        load_pipeline(SMOKE, [override])
    assert len(str(found.value)) < 3000


def test_configs_that_extend_each_other_are_few_and_share_their_room(tmp_path: Path) -> None:
    for number in range(MAX_CONFIGS + 1):
        (tmp_path / f"p{number}.yaml").write_text(f"extends: p{number + 1}.yaml\n")
    (tmp_path / f"p{MAX_CONFIGS + 1}.yaml").write_text(f"extends: {SMOKE}\n")
    with pytest.raises(ConfigError, match=r"p0\.yaml: extends a chain of more than 19 configs"):
        load_pipeline(tmp_path / "p0.yaml")
    assert load_pipeline(tmp_path / "p5.yaml").name == "smoke"
    (tmp_path / "a.yaml").write_text("extends: b.yaml\nx: [" + "1," * (MAX_VALUES // 2) + "]")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nx: [" + "1," * (MAX_VALUES // 2) + "]")
    with pytest.raises(ConfigError, match=r"b\.yaml: .*50,000 values"):
        load_pipeline(tmp_path / "a.yaml")


def test_what_configs_really_have_is_read() -> None:
    for config in sorted((ROOT / "configs").rglob("*.yaml")):
        read_yaml_file(config)
    files = "".join(f"  - data/part-{number:05d}.jsonl\n" for number in range(20_000))
    assert len(read_yaml(f"train:\n{files}", where="x")["train"]) == 20_000
    merged = read_yaml("a: &a {x: 1, y: [2]}\nb: {<<: *a, x: 3}\nc: {<<: [*a, {z: 4}]}\nd: *a\n", where="x")
    assert merged["b"] == {"x": 3, "y": [2]} and merged["c"] == {"x": 1, "y": [2], "z": 4}
    merged["d"]["y"].append(5)
    assert merged["a"]["y"] == merged["b"]["y"] == [2], "each has its own"
    assert yaml_file.shorten("x" * 300).endswith("(302 characters)")
