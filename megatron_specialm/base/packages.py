"""Optional packages: their supported versions, and their import on demand."""

import importlib
import importlib.metadata
from types import ModuleType

from packaging.specifiers import SpecifierSet
from packaging.version import Version

TRANSFORMER_ENGINE_LEAST = "2.9"
TRANSFORMER_ENGINE = f">={TRANSFORMER_ENGINE_LEAST},<2.12"  # the range that megatron-core 0.16 supports
INSTALL_TRANSFORMER_ENGINE = f"pip install --no-build-isolation 'transformer-engine[pytorch]{TRANSFORMER_ENGINE}'"

DEEPSPEED = ">=0.19.6"  # earlier ones route wrongly with top_k above 2, and fail where capacity exceeds the tokens
INSTALL_DEEPSPEED = f"pip install 'deepspeed{DEEPSPEED}'"


def import_package(name: str) -> ModuleType:
    """Import an installed package. A folder with its name in the working directory, such as `wandb/` or `datasets/`, does not
    count: without the package, Python would import it as an empty namespace package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    module = importlib.import_module(name)
    if getattr(module, "__file__", None) is None:
        raise ModuleNotFoundError(
            f"No module named {name!r}, only the folder {next(iter(module.__path__), '?')}", name=name
        )
    return module


def installed_version(package: str) -> str | None:
    """The version in a package's metadata, found without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):  # ValueError: the name is empty
        return None


def satisfies(version: str, requirement: str) -> bool:
    """Whether a version is in a range such as ">=2.9,<2.12". A vendor's build (2.9.0a0+git) counts as the release that it
    precedes."""
    return Version(Version(version).base_version) in SpecifierSet(requirement)
