"""Optional packages, imported when they are needed."""

import importlib
from types import ModuleType


def import_package(name: str) -> ModuleType:
    """An installed package. A folder of its name beside the configuration, as `wandb/` or `datasets/` often is, is none:
    where the package is missing, Python would import the folder as an empty package without a word.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    module = importlib.import_module(name)
    if getattr(module, "__file__", None) is None:
        raise ModuleNotFoundError(
            f"No module named {name!r}, only the folder {next(iter(module.__path__), '?')}", name=name
        )
    return module
