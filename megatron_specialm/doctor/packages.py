"""The Python packages that training needs or can use. As a program: import one and print its version and facts.

usage: python -m megatron_specialm.doctor.packages NAME
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from megatron_specialm.base.packages import (
    DEEPSPEED,
    INSTALL_DEEPSPEED,
    INSTALL_TRANSFORMER_ENGINE,
    TRANSFORMER_ENGINE,
    import_package,
    installed_version,
    satisfies,
)
from megatron_specialm.doctor.finding import Finding
from megatron_specialm.doctor.process import Outcome, send_answer

Import = Callable[[str], Any]


def _torch_facts(load: Import) -> dict[str, Any]:
    torch = load("torch")
    nccl = load("torch.cuda.nccl").version() if load("torch.distributed").is_nccl_available() else ()
    cuda = torch.version.cuda
    return {
        "version": torch.__version__,
        "cuda": cuda,
        "nccl": ".".join(map(str, nccl)),
        "detail": f"built for CUDA {cuda}" if cuda else "built for the CPU alone",
    }


def _megatron_facts(load: Import) -> dict[str, Any]:
    specs = load("megatron.core.models.gpt.gpt_layer_specs")
    adam = load("megatron.core.optimizer").Adam.__module__.partition(".")[0]
    return {"have_te": specs.HAVE_TE, "have_apex": specs.HAVE_APEX, "adam": adam}


def _mpi_facts(load: Import) -> dict[str, Any]:
    load("mpi4py").rc.initialize = False  # the library's name needs no MPI_Init, which may hang
    library = load("mpi4py.MPI").Get_library_version()
    return {"detail": "for " + library.partition(",")[0].partition("\n")[0].strip("\0 ")}


@dataclass(frozen=True)
class Package:
    """A package. `also`: modules whose import shows that it works; `facts`: a function that returns more values."""

    name: str
    module: str
    remedy: str
    requirement: str = ""
    also: tuple[str, ...] = ()
    facts: Callable[[Import], dict[str, Any]] | None = None
    needed: bool = False


_TABLE = (
    Package("torch", "torch", "pip install 'torch>=2.6'", ">=2.6", facts=_torch_facts, needed=True),
    Package(
        "megatron-core",
        "megatron.core",
        "pip install 'megatron-core>=0.16.1,<0.17'",
        ">=0.16.1,<0.17",
        facts=_megatron_facts,
        needed=True,
    ),
    Package(
        "transformer-engine",
        "transformer_engine",
        f"on a GPU machine: {INSTALL_TRANSFORMER_ENGINE}",
        TRANSFORMER_ENGINE,
        also=("transformer_engine.pytorch",),
    ),
    Package(
        "apex",
        "apex",
        "on a GPU machine without Transformer Engine: build github.com/NVIDIA/apex (apex on PyPI is another project)",
        also=("apex.normalization", "apex.optimizers"),
    ),
    Package("flash-attn", "flash_attn", "on a GPU machine: pip install --no-build-isolation flash-attn"),
    Package("deepspeed", "deepspeed", INSTALL_DEEPSPEED, DEEPSPEED),
    Package("mpi4py", "mpi4py", "pip install 'mpi4py>=4.0'", ">=4.0", facts=_mpi_facts),
)
PACKAGES = {package.name: package for package in _TABLE}


def describe(package: Package, load: Import = import_package) -> dict[str, Any] | None:
    """Import a package and its modules: its version and facts; None if it is not installed.

    Raises:
        BaseException: whatever its import raises.
    """
    try:
        module = load(package.module)
    except ModuleNotFoundError as error:
        if error.name and f"{package.module}.".startswith(f"{error.name}."):
            return None
        raise
    for name in package.also:
        load(name)
    facts = package.facts(load) if package.facts else {}
    return {"version": installed_version(package.name) or str(getattr(module, "__version__", "")), **facts}


def package_finding(package: Package, outcome: Outcome) -> Finding:
    """The finding for a package, from the outcome of the process that imported it.

    Raises:
        MachineError: the process failed.
    """
    facts = outcome.answer()
    if facts is None:
        return Finding(package.name, "missing", remedy=package.remedy)
    version, detail = facts["version"], facts.get("detail", "")
    if package.requirement and not satisfies(version, package.requirement):
        return Finding(package.name, "broken", version, f"we need {package.requirement}", package.remedy)
    return Finding(package.name, "ok", version, detail)


def blame(megatron: Finding, accelerators: Iterable[Finding]) -> Finding:
    """Megatron-Core's finding, with another remedy if it is broken because a package that it imports is broken."""
    broken = [finding.name for finding in accelerators if finding.state == "broken"]
    if megatron.state != "broken" or not broken:
        return megatron
    return replace(megatron, remedy=f"repair or uninstall {' and '.join(broken)}, which megatron-core imports")


if __name__ == "__main__":
    send_answer(lambda: describe(PACKAGES[sys.argv[1]]))
