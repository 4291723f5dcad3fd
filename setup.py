"""Packaging of megatron_specialm; the metadata stands in pyproject.toml."""

from setuptools import find_packages, setup

# Configs, models, the site profile and the job's template stand in folders at the top, where people read them; a wheel carries
# them inside the package, where `shipped_folder` of config/load.py finds them.
SHIPPED = {
    "megatron_specialm.shipped.configs": ["models/*.yaml", "pipelines/*.yaml"],
    "megatron_specialm.shipped.slurm": ["README.md", "site.yaml", "stage.sbatch", "stage.sbatch.template"],
}
setup(
    packages=[*find_packages(include=["megatron_specialm", "megatron_specialm.*"]), *SHIPPED],
    package_dir={package: package.rpartition(".")[2] for package in SHIPPED},
    package_data=SHIPPED,
)
