"""Packaging of megatron_specialm; the metadata stands in pyproject.toml."""

from setuptools import find_packages, setup

# The model presets live in the top-level folder `configs/`, where people read them; a wheel carries them inside the package.
setup(
    packages=[*find_packages(include=["megatron_specialm", "megatron_specialm.*"]), "megatron_specialm.configs"],
    package_dir={"megatron_specialm.configs": "configs"},
    package_data={"megatron_specialm.configs": ["models/*.yaml", "pipelines/*.yaml", "sites/*.yaml"]},
)
