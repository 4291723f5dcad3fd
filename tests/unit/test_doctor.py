"""`specialm doctor` on this machine, on machines that are broken on purpose, and on fake ones."""

import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.packages import TRANSFORMER_ENGINE, TRANSFORMER_ENGINE_LEAST, satisfies
from megatron_specialm.doctor import accelerator, compute, machine
from megatron_specialm.doctor.finding import Finding, can_train, guarded
from megatron_specialm.doctor.packages import PACKAGES, describe, package_finding
from megatron_specialm.doctor.process import Outcome, Process, start_command, start_module, wait_all
from megatron_specialm.doctor.report import render

ROOT = Path(__file__).parents[2]
GIB = 2**30


def _doctor(*options: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run the command, with a folder of fake packages ahead of the real ones."""
    search = os.pathsep.join(str(folder) for folder in (path, ROOT) if folder)
    return subprocess.run(
        [sys.executable, "-m", "megatron_specialm", "doctor", *options],
        capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": search, **environment},
    )  # fmt: skip


def _findings(outcome: subprocess.CompletedProcess) -> dict[str, dict[str, Any]]:
    assert "Traceback" not in outcome.stderr, outcome.stderr
    return {finding["name"]: finding for finding in json.loads(outcome.stdout)["findings"]}


def _package(folder: Path, name: str, code: str) -> Path:
    package = folder.joinpath(*name.split("."))
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    return folder


def _light_deepspeed(folder: Path) -> Path:
    """An empty DeepSpeed, for reports on something else: the import of the real one takes five seconds of a core."""
    return _package(folder, "deepspeed", "")


def _light(folder: Path) -> Path:
    """With the few names of Megatron-Core that the report asks for: its import takes six seconds of a core more than torch."""
    _light_deepspeed(folder)
    _package(folder, "megatron", "")
    _package(folder, "megatron.core", "")
    _package(folder, "megatron.core.optimizer", "class Adam: ...")
    return _package(folder, "megatron.core.models.gpt.gpt_layer_specs", "HAVE_TE = HAVE_APEX = False")


def _program(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder


def _answer(value: Any) -> Outcome:
    return Outcome(json.dumps(value))


# The command


@pytest.mark.slow
def test_it_computes_and_this_machine_can_train() -> None:
    outcome = _doctor("--json")
    findings = _findings(outcome)
    assert outcome.returncode == 0, outcome.stdout
    assert json.loads(outcome.stdout)["can_train"] is True
    for name in ("python", "torch", "megatron-core", "product cpu", "all-reduce"):
        assert findings[name]["state"] == "ok" and findings[name]["needed"], findings[name]
    assert "GFLOP/s" in findings["product cpu"]["detail"]
    assert "the sum is right" in findings["all-reduce"]["detail"]


def test_a_quick_look_computes_nothing(tmp_path: Path) -> None:
    outcome = _doctor("--quick", path=_light(tmp_path))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "product" not in outcome.stdout and "all-reduce" not in outcome.stdout
    assert outcome.stdout.splitlines()[-1].strip() == "This machine can train."


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess:
    """A report on a Transformer Engine that breaks, but not Megatron-Core."""
    code = "raise ModuleNotFoundError('No module named nvidia', name='nvidia')"
    folder = _light_deepspeed(tmp_path_factory.mktemp("survived"))
    return _doctor("--quick", "--json", path=_package(folder, "transformer_engine", code))


def test_a_report_fits_a_terminal(survived: subprocess.CompletedProcess) -> None:
    narrow = io.StringIO()
    findings = _findings(survived).values()
    Console(file=narrow, width=80).print(render([Finding(**finding) for finding in findings]))
    lines = narrow.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 60


def test_a_package_that_megatron_core_survives(survived: subprocess.CompletedProcess) -> None:
    findings = _findings(survived)
    finding = findings["transformer-engine"]
    assert (finding["state"], finding["detail"]) == ("broken", "ModuleNotFoundError: No module named nvidia")
    assert "pip install" in finding["remedy"]
    assert (findings["fused layers"]["version"], findings["megatron-core"]["state"]) == ("none", "ok")
    assert survived.returncode == 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libfoo.so.3:\\nno such file')", "ImportError: libfoo.so.3: no such file"),
        ("import os; os.abort()", "killed by SIGABRT"),
    ],
)
def test_a_package_that_breaks_megatron_core(tmp_path: Path, code: str, reason: str) -> None:
    """Megatron-Core imports Transformer Engine: with this one nothing can be trained, and the report says why."""
    path = _package(_light_deepspeed(tmp_path), "transformer_engine", code)
    outcome = _doctor("--quick", "--json", path=path)
    findings = _findings(outcome)
    for name in ("transformer-engine", "megatron-core"):
        assert (findings[name]["state"], findings[name]["detail"]) == ("broken", reason)
    assert findings["megatron-core"]["remedy"].startswith("repair or uninstall transformer-engine, ")
    assert outcome.returncode == 1


def test_the_config_of_a_machine_that_cannot_train(tmp_path: Path) -> None:
    path = _package(_light_deepspeed(tmp_path), "megatron", "raise OSError('disk [red] error')")
    outcome = _doctor("--quick", path=path, COLUMNS="80")
    assert outcome.returncode == 1 and "Traceback" not in outcome.stderr, outcome.stderr
    assert "OSError: disk [red] error" in outcome.stdout
    assert "Training needs what is not ok here: megatron-core." in outcome.stdout


def test_without_torch(tmp_path: Path) -> None:
    outcome = _doctor("--json", path=_package(tmp_path, "torch", "raise OSError('libcudart.so.13: not found')"))
    findings = _findings(outcome)
    assert outcome.returncode == 1
    assert findings["torch"]["detail"] == "OSError: libcudart.so.13: not found"
    assert findings["megatron-core"]["state"] == findings["fused layers"]["state"] == "broken"
    assert findings["NCCL"]["detail"] == "unknown without torch"
    assert "all-reduce" not in findings


def test_commands_that_never_end(tmp_path: Path) -> None:
    """The script's own child holds its output open; neither may outlive the command."""
    folder = _program(tmp_path, "sinfo", f"sleep 1000 & echo $! >> {tmp_path}/pids; wait")
    _program(folder, "nvidia-smi", "exec sleep 1000")
    search = f"{folder}{os.pathsep}{os.environ['PATH']}"
    outcome = _doctor("--quick", "--json", path=_light(tmp_path / "light"), PATH=search)
    findings = _findings(outcome)
    for name in ("slurm", "CUDA driver"):
        assert (findings[name]["state"], findings[name]["detail"]) == ("broken", "no answer within 5 s")
    assert outcome.returncode == 0
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert pids and not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_help_knows_it() -> None:
    assert "--quick" in _doctor("--help", COLUMNS="80").stdout


# Processes


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt:"),
        ("import os; os._exit(0)", "its process ended without an answer"),
        ("import os; os._exit(7)", "ended with status 7 and said nothing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "killed by SIGILL"),
    ],
)
def test_an_import_that_does_not_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    monkeypatch.syspath_prepend(_package(tmp_path, "flash_attn", code))
    with start_module("packages", "flash-attn", environment=os.environ) as process:
        outcome = process.wait()
    finding = guarded("flash-attn", lambda: package_finding(PACKAGES["flash-attn"], outcome))
    assert (finding.state, finding.detail) == ("broken", reason)


def test_an_import_that_talks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os\n__version__ = '3.0'\nprint('x' * 500_000)\nos.system('echo and a child of it')"
    monkeypatch.syspath_prepend(_package(tmp_path, "flash_attn", code))
    with start_module("packages", "flash-attn", environment=os.environ) as process:
        assert process.wait().answer() == {"version": "3.0"}


def test_a_module_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(_package(tmp_path, "flash_attn", "import time; time.sleep(1000)"))
    with start_module("packages", "flash-attn", environment=os.environ, seconds=1.5) as process:
        assert process.wait().error == "no answer within 1.5 s"


def test_a_command_that_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "srun").write_bytes(b"\x7fELF damaged")
    (tmp_path / "srun").chmod(0o755)
    process = start_command("srun", environment={"PATH": str(tmp_path)})
    assert process is not None
    with process, pytest.raises(MachineError, match="srun cannot be started: Exec format error"):
        process.wait().text()
    assert start_command("sinfo", environment={"PATH": str(tmp_path)}) is None


def test_one_failure_ends_the_others() -> None:
    """A rank that dies leaves the others waiting for it: its reason is told, at once."""
    commands = ([sys.executable, "-c", "import time; time.sleep(1000)"], ["/bin/sh", "-c", "echo no >&2; exit 3"])
    waiting, failing = (Process(command, environment=os.environ, seconds=60) for command in commands)
    with waiting, failing:
        assert [outcome.error for outcome in wait_all([waiting, failing])] == ["no"]


def test_all_reduce_without_its_peer(tmp_path: Path) -> None:
    """The second of two ranks never comes."""
    arguments = ("all-reduce", "cpu", "0", "2", str(tmp_path / "meeting"))
    with start_module("compute", *arguments, environment=os.environ, seconds=8) as process:
        assert [outcome.error for outcome in wait_all([process])] == ["no answer within 8 s"]


# Packages


def _importer(modules: dict[str, Any]) -> Any:
    def load(name: str) -> Any:
        if name not in modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return modules[name]

    return load


def test_the_parts_of_a_package() -> None:
    apex = PACKAGES["apex"]
    other_project = SimpleNamespace(__version__="0.9.10")
    assert describe(apex, _importer({})) is None
    with pytest.raises(ModuleNotFoundError, match=r"apex\.normalization"):
        describe(apex, _importer({"apex": other_project}))
    whole = {"apex": SimpleNamespace(__version__="0.1"), "apex.normalization": None, "apex.optimizers": None}
    assert describe(apex, _importer(whole)) == {"version": "0.1"}


def test_a_namespace_alone_is_no_megatron_core() -> None:
    assert describe(PACKAGES["megatron-core"], _importer({"megatron": SimpleNamespace()})) is None


@pytest.mark.parametrize(
    ("version", "state"), [("0.16.1", "ok"), ("0.16.2rc3+nv24", "ok"), ("0.17.0", "broken"), ("0.15.9", "broken")]
)
def test_versions_that_fit(version: str, state: str) -> None:
    assert package_finding(PACKAGES["megatron-core"], _answer({"version": version})).state == state


def test_what_is_not_installed_says_how_to_get_it() -> None:
    for package in PACKAGES.values():
        finding = package_finding(package, _answer(None))
        assert finding.state == "missing" and finding.remedy


def test_requirements_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    ours = {line.replace("[pytorch]", "") for lines in lists for line in lines}
    for package in PACKAGES.values():
        if package.requirement:
            text = package.requirement
            assert {f"{package.name}{text}"} & ours, f"{package.name}{text} is not what pyproject.toml asks for"
            assert text in package.remedy


def test_one_range_of_transformer_engine_stands_everywhere() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["gpu"] == [f"transformer-engine[pytorch]{TRANSFORMER_ENGINE}"]
    assert f"transformer-engine[pytorch]{TRANSFORMER_ENGINE}" in (ROOT / "docs/doctor.md").read_text()
    assert satisfies(TRANSFORMER_ENGINE_LEAST, TRANSFORMER_ENGINE) and satisfies("2.9.0a0+git", TRANSFORMER_ENGINE)


# Accelerators, none of which this needs


def test_gpus() -> None:
    driver = Finding("CUDA driver", "ok", "580.65.06")
    gpu = {"name": "NVIDIA H100 80GB HBM3", "architecture": "sm_90", "free": 79 * GIB, "total": 80 * GIB}
    first, second = accelerator.gpu_findings({"gpus": [gpu, gpu], "warning": ""}, driver, {})
    assert (first.name, second.name, first.version) == ("GPU 0", "GPU 1", "sm_90")
    assert first.detail == "NVIDIA H100 80GB HBM3, 79.0 of 80.0 GiB free"


@pytest.mark.parametrize(
    ("driver", "environment", "state", "detail"),
    [
        ("missing", {}, "missing", "runs use the CPU"),
        ("ok", {"CUDA_VISIBLE_DEVICES": ""}, "missing", "hidden by CUDA_VISIBLE_DEVICES=''"),
        ("ok", {}, "broken", "the driver is there, torch sees no GPU: too old"),
    ],
)
def test_no_gpu(driver: Any, environment: dict[str, str], state: str, detail: str) -> None:
    seen = {"gpus": [], "warning": "too\nold"}
    (finding,) = accelerator.gpu_findings(seen, Finding("CUDA driver", driver), environment)
    assert (finding.state, finding.detail) == (state, detail) and finding.remedy


@pytest.mark.parametrize(
    ("have_te", "have_apex", "gpus", "state", "version"),
    [
        (True, True, 1, "ok", "transformer-engine"),
        (False, True, 1, "ok", "apex"),
        (True, False, 0, "missing", "none"),
        (False, False, 1, "missing", "none"),
    ],
)
def test_fused_layers(have_te: bool, have_apex: bool, gpus: int, state: str, version: str) -> None:
    facts = {"have_te": have_te, "have_apex": have_apex, "adam": "apex"}
    finding = accelerator.fused_finding(facts, gpus)
    assert (finding.state, finding.version) == (state, version)
    assert finding.detail.endswith("Adam from apex" if gpus else "Adam from torch")


def test_a_product_beside_the_peak() -> None:
    answer = _answer({"flops_per_second": 742e12, "right": True})
    finding = accelerator.product_finding("product GPU 0", answer, "NVIDIA H100 80GB HBM3")
    assert finding.detail == "742 TFLOP/s in bf16, 75% of the dense peak of 989"
    assert "not in our table" in accelerator.product_finding("product GPU 0", answer, "NVIDIA RTX 9999").detail


def test_wrong_sums_and_products() -> None:
    with pytest.raises(MachineError, match="product is wrong"):
        accelerator.product_finding("product cpu", _answer({"flops_per_second": 1e9, "right": False}), "cpu")
    good, bad = ({"right": right, "bytes_per_second": 1e9} for right in (True, False))
    with pytest.raises(MachineError, match="gloo: the sum is wrong"):
        accelerator.all_reduce_finding("gloo", [_answer(good), _answer(bad)])
    slow = {"right": True, "bytes_per_second": 5e8}
    finding = accelerator.all_reduce_finding("nccl", [_answer(good), _answer(slow)])
    assert finding.detail == "2 processes, the sum is right, 0.5 GB/s"


def test_the_product_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "CPU_SECONDS", 1e-3)
    assert compute.product(torch.device("cpu"))["right"]
    monkeypatch.setitem(compute.TOLERANCE, torch.float32, 0.0)
    assert not compute.product(torch.device("cpu"))["right"]


def test_a_sum_that_was_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("init_process_group", "all_reduce", "destroy_process_group"):
        monkeypatch.setattr(compute.dist, name, lambda *_, **__: None)
    answers = [
        compute.all_reduce(torch.device("cpu"), rank=0, ranks=ranks, rendezvous="nowhere")["right"] for ranks in (1, 2)
    ]
    assert answers == [True, False]


# The machine


@pytest.mark.parametrize(("version", "state"), [((3, 11, 7), "ok"), ((3, 12, 0), "ok"), ((3, 13, 1), "broken")])
def test_python(version: tuple[int, ...], state: str) -> None:
    assert machine.python_finding(version).state == state


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/", {"memory.max": "2147483648"}, "2.0 GiB"),
        ("0::/job/step", {"job/memory.max": "1073741824", "job/step/memory.max": "max"}, "1.0 GiB"),
        ("4:cpu,memory:/docker/abc", {"memory/memory.limit_in_bytes": "3221225472"}, "3.0 GiB"),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("0::/", {"memory.max": "max"}, None),
        ("3:cpuset:/", {}, None),
    ],
)
def test_memory_limits(tmp_path: Path, membership: str, files: dict[str, str], limit: str | None) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"{membership}\n")
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    finding = machine.memory_finding(tmp_path)
    assert finding.version == "16.0 GiB" and finding.detail.startswith("8.0 GiB available")
    assert ("limits us" in finding.detail) == (limit is not None)
    assert limit is None or finding.detail.endswith(f"limits us to {limit}")


@pytest.mark.parametrize(
    "text",
    [
        "| NVIDIA-SMI 580.65.06    Driver Version: 580.65.06      CUDA Version: 13.0     |",
        "| NVIDIA-SMI 595.10   KMD Version: 580.65.06   CUDA UMD Version: 13.0 |",
    ],
)
def test_driver(text: str) -> None:
    finding = machine.driver_finding(Outcome(text))
    assert (finding.state, finding.version, finding.detail) == ("ok", "580.65.06", "for CUDA up to 13.0")


def test_a_driver_that_does_not_answer() -> None:
    failed = Outcome("", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    finding = guarded("CUDA driver", lambda: machine.driver_finding(failed), remedy="install it")
    assert (finding.state, finding.detail, finding.remedy) == ("broken", failed.error, "install it")


def test_mpi_launchers() -> None:
    assert machine.mpirun_finding(Outcome("mpirun (Open MPI) 4.1.4\n\nReport bugs")).version == "4.1.4"
    assert machine.mpirun_finding(Outcome("HYDRA build details:\n    Version:    4.0.2\n")).version == "4.0.2"
    assert machine.mpirun_finding(None).state == "missing"


def test_slurm() -> None:
    version, nodes = Outcome("slurm-wlm 22.05.8\n"), Outcome("debug 2\nlong 8\n")
    finding = machine.slurm_finding(version, version, nodes)
    assert (finding.state, finding.version) == ("ok", "22.05.8")
    assert finding.detail == "a controller answers: 2 partition(s), 10 node(s) in them"
    assert machine.slurm_finding(None, None, None).state == "missing"
    assert "srun is not" in machine.slurm_finding(version, None, nodes).detail
    assert "another version: 23.11" in machine.slurm_finding(version, Outcome("slurm 23.11"), nodes).detail
    silent = machine.slurm_finding(version, version, Outcome("", "no answer within 5 s"))
    assert (silent.state, silent.detail) == ("broken", "no controller answers: no answer within 5 s")


def test_what_training_needs() -> None:
    fine, missing = Finding("a", "ok", needed=True), Finding("b", "missing")
    assert can_train([fine, missing])
    assert not can_train([fine, Finding("c", "broken", needed=True)])


def test_a_probe_that_raises() -> None:
    def probe() -> Finding:
        raise RuntimeError("two\nlines")

    assert guarded("a", probe, needed=True) == Finding("a", "broken", detail="RuntimeError: two lines", needed=True)
