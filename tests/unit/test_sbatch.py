"""The scripts of jobs: as the golden file has them, and whatever a config or a profile holds, no word of it is run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.site import Site, dump_site, load_site, seconds_of
from megatron_specialm.slurm.sbatch import JobSize, directives, job_size, render

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "slurm" / "stage.sbatch.template"
GOLDEN = Path(__file__).parent / "golden"
HOSTILE = "a b;touch hit '\"`touch hit`$(touch hit)\n#SBATCH --wrap=x\ntouch hit\\"
HOSTILE_LINE = HOSTILE.replace("\n", " ")  # no value of a profile has a line break


def _script(site: Site, **changes: object) -> str:
    resources = site.resources("slm", "train")
    options = directives(
        site, resources, name="smoke.slm", job="slm", elements=3, size=job_size(16, resources, stage="slm"),
        after=["41", "42_3"], comment="specialm-0123", exclude=["node7"],
    )  # fmt: skip
    values = {
        "folder": Path("/data/my project"),
        "code": Path("/data/run/jobs/code-01"),
        "command": ["python", "-m", "x"],
    }
    return render(TEMPLATE, site, directives=options, **{**values, **changes})  # type: ignore[arg-type]


def test_the_golden_script(request: pytest.FixtureRequest) -> None:
    path = GOLDEN / "site.yaml"
    assert _script(load_site(path)) == (GOLDEN / "slm.sbatch").read_text()


def test_the_shipped_profile_loads_and_survives_being_frozen(tmp_path: Path) -> None:
    site = load_site(ROOT / "slurm" / "site.yaml")
    (tmp_path / "site.yaml").write_text(dump_site(site))
    frozen = load_site(tmp_path / "site.yaml")
    assert frozen == site
    assert frozen.resources("slm", "train") == site.resources("slm", "train")
    assert frozen.resources("slm", "train").time == "24:00:00"
    assert frozen.resources("tokens", "tokenize").time == "04:00:00"


def test_no_value_is_run_by_the_shell(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "-")
    folder.mkdir()
    program = "import json, os, sys; get = os.environ.get; values = [os.getcwd(), get('VALUE'), get('PYTHONPATH')]\n"
    program += "print(json.dumps([*values, sys.argv[1:]]))"
    site = Site(environment={"VALUE": HOSTILE_LINE})
    command = [sys.executable, "-c", program, HOSTILE, ""]
    script = tmp_path / "script"
    script.write_text(_script(site, folder=folder, code=Path(HOSTILE), command=command))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outcome = subprocess.run(
        ["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout) == [str(folder), HOSTILE_LINE, HOSTILE, [HOSTILE, ""]]
    assert not list(tmp_path.rglob("hit"))


def test_modules_are_quoted(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("module() { printf '<%s>' \"$@\"; }\n" + _script(
        Site(modules=[HOSTILE_LINE]), folder=tmp_path, command=["true"]
    ))  # fmt: skip
    outcome = subprocess.run(["bash", tmp_path / "script"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert outcome.stdout == f"<load><{HOSTILE_LINE}>" and not (tmp_path / "hit").exists()


VALUES = ("$(touch hit)", "`touch hit`", "'; touch hit; '", '"; touch hit; "', "& touch hit &", "| touch hit", "\\", "a b",
          "a\nb", "a\rb", "a\tb", "a\0b", "a\x1bb", "a\n#SBATCH --wrap=x", "a\x85b")  # fmt: skip
FIELDS = {
    "python": "{}", "modules": ["{}"], "environment": {"A": "{}"}, "exclude": ["{}"], "gpu": "{}",
    "container": {"runtime": "pyxis", "image": "{}", "python": "{}", "mounts": ["{}"]},
    "jobs": {"train": {name: "{}" for name in ("account", "partition", "qos", "constraint", "reservation", "memory", "time")}},
}  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_a_value_of_any_field_is_one_line_and_run_by_no_shell(tmp_path: Path, value: str) -> None:
    """Each alone: it is refused by name, or the script runs as if it were any word."""
    configs = [{name: _filled(part, value)} for name, part in FIELDS.items() if name != "jobs"]
    configs += [{"jobs": {"train": {name: value}}} for name in FIELDS["jobs"]["train"]]  # type: ignore[index, call-overload]
    configs.append({"jobs": {"train": {"options": [f"--comment={value}"]}}})
    for config in configs:
        (tmp_path / "site.yaml").write_text(json.dumps(config))
        try:
            site = load_site(tmp_path / "site.yaml")
        except ConfigError as error:
            assert "site.yaml: " in str(error)
            continue
        assert value.isprintable() and "jobs" not in config, config
        container = [site.container.image, site.container.python, *site.container.mounts] if site.container else []
        command = [site.python or "true", "true", *container]
        (tmp_path / "script").write_text(
            "module() { :; }\n" + _script(site, folder=tmp_path, command=["true", *command])
        )
        subprocess.run(["bash", "script"], cwd=tmp_path, check=True, timeout=60)
        assert not (tmp_path / "hit").exists(), config


def _filled(part: object, value: str) -> object:
    if isinstance(part, dict):
        return {name: _filled(inner, value) for name, inner in part.items()}
    return [value] if isinstance(part, list) else value if part == "{}" else part


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("jobs: {default: {partition: 'gpu\\n#SBATCH --wrap=x'}}", "jobs.default.partition"),
        ("jobs: {train: {account: 'a --wrap=x'}}", "jobs.train.account"),
        ("jobs: {train: {options: ['wrap']}}", "jobs.train.options.0"),
        ("jobs: {train: {time: soon}}", "jobs.train.time"),
        ("jobs: {train: {options: ['--comment=x\\ntouch hit']}}", "jobs.train.options.0"),
        ("jobs: {train: {options: ['a --wrap']}}", "jobs.train.options.0"),
        (
            "jobs: {train: {time: 24:00:00}}",
            "jobs.train.time: 24:00:00 without quotes is a number in base 60 to YAML: quote it",
        ),
        ("jobs: {train: {time: 240}}", "jobs.train.time: Input should be a valid string: quote it (got 240)"),
        (
            "jobs: {train: {partition: no}}",
            "jobs.train.partition: Input should be a valid string: quote it (got False)",
        ),
        ("modules: [12.4]", "modules.0: Input should be a valid string: quote it (got 12.4)"),
        ("environment: {A: 1}", "environment.A: Input should be a valid string: quote it (got 1)"),
        ("environment: {A: 2024-01-01}", "environment.A: 2024-01-01 without quotes is a date to YAML: quote it"),
        ("gpu: 010", "gpu: 010 without quotes is a number in base 8 to YAML: quote it"),
        ("preflight: {enabled: 1}", "preflight.enabled: Input should be a valid boolean: write true or false"),
        ("exclude: ['a b']", "exclude.0"),
        ("environment: {'A B': x}", "not a name for an environment variable"),
        ("launcher: ssh", "launcher"),
        ("jobs: {train: {gpus: 8}}", "did you mean"),
        ("container: {runtime: pyxis, image: a, mounts: ['a,b:c']}", "container.mounts.0"),
        ("jobs: {train: {time: '5'}}", "limits: warning_seconds 300 must be less than jobs.train.time 5 (300 s)"),
        ("limits: {heartbeat_seconds: 60}", "limits: silent_seconds 60 must be several times heartbeat_seconds 60"),
    ],
)
def test_what_a_profile_must_not_hold_is_named(tmp_path: Path, config: str, said: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(config)
    with pytest.raises(ConfigError) as caught:
        load_site(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_a_dollar_sign_in_a_template_is_explained(tmp_path: Path) -> None:
    (tmp_path / "template").write_text("echo $HOME $command")
    with pytest.raises(ConfigError, match=r"template: .*write \$\$"):
        render(tmp_path / "template", Site(), directives=[], folder=tmp_path, code=tmp_path, command=[])
    for path in (tmp_path / "missing", tmp_path, tmp_path / ("x" * 5000)):
        with pytest.raises(ConfigError, match=r"cannot be read: .*: correct `template`"):
            render(path, Site(), directives=[], folder=tmp_path, code=tmp_path, command=[])


def test_ranks_spread_evenly_over_nodes() -> None:
    resources = Site.model_validate({"jobs": {"default": {"processes_per_node": 4}}}).resources("slm", "train")
    assert job_size(2, resources, stage="slm") == JobSize(2, 2)
    assert job_size(8, resources, stage="slm").nodes == 2
    with pytest.raises(ConfigError, match=r"stages.slm.parallel: 6 processes .* nodes of 4"):
        job_size(6, resources, stage="slm")


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:05:30", 3930),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("1-12:30:01", 131_401),
        ("0", 0),
    ],
)
def test_durations_are_read_as_slurm_reads_them(duration: str, seconds: int) -> None:
    assert seconds_of(duration) == seconds


def test_a_time_limit_that_is_longer_than_the_warning_or_none() -> None:
    for duration in ("5:01", "0"):
        Site.model_validate({"jobs": {"train": {"time": duration}}})
