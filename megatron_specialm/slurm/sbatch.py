"""The script of a job, from the site's template: plain sbatch that an administrator can read.

Every value that reaches the shell is quoted. Values in `#SBATCH` lines are single words, which `config/site.py` checks, or
numbers or names of ours. None is a path: sbatch is called in the submission's folder, and the log's name is relative.
"""

import shlex
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.site import Resources, Site
from megatron_specialm.config.yaml_file import read_text


@dataclass(frozen=True)
class JobSize:
    """The ranks of one task, and the ranks per node."""

    ranks: int
    ranks_per_node: int

    @property
    def nodes(self) -> int:
        """The number of nodes, or of parts of nodes."""
        return self.ranks // self.ranks_per_node

    def describe(self) -> str:
        """Short: `1 process`, or `16 processes on 2 nodes`."""
        if self.ranks == 1:
            return "1 process"
        return f"{self.ranks} processes on {self.nodes} node{'s' if self.nodes > 1 else ''}"


def job_size(ranks: int, resources: Resources, *, stage: str) -> JobSize:
    """Ranks spread evenly over as few nodes as possible.

    Raises:
        ConfigError: they cannot be spread evenly.
    """
    per_node = min(ranks, resources.processes_per_node)
    if ranks % per_node:
        raise ConfigError(
            f"stages.{stage}.parallel: {ranks} processes do not spread evenly over nodes of {per_node} "
            "(processes_per_node of the site profile): change the layout, or set processes_per_node for this stage"
        )
    return JobSize(ranks, per_node)


def directives(
    site: Site, resources: Resources, *, name: str, job: str, elements: int, size: JobSize, after: Sequence[str],
    comment: str, exclude: Sequence[str],
) -> list[str]:  # fmt: skip
    """The options of sbatch, in order.

    Args:
        name: in the queue.
        job: the stem of the log's name.
        after: ids of jobs, or elements of arrays, that must have succeeded.
        comment: identifies the job where its id is not known.
        exclude: nodes that failed a preflight, in addition to those of the site profile.
    """
    options = {
        "job-name": name,
        "comment": comment,
        "array": f"0-{elements - 1}%{resources.concurrency}",
        "output": f"{job}.%a.log",
        "open-mode": "append",
        "nodes": size.nodes,
        "ntasks": size.ranks,
        "ntasks-per-node": size.ranks_per_node,
        "cpus-per-task": resources.cpus_per_process,
        "gpus-per-node": size.ranks_per_node * resources.gpus_per_process or None,
        "mem": resources.memory,
        "time": resources.time,
        "account": resources.account,
        "partition": resources.partition,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "reservation": resources.reservation,
        "exclude": ",".join(dict.fromkeys((*site.exclude, *exclude))) or None,
        # The warning goes to the batch step only: the supervisor passes it on to the ranks, under any launcher.
        "signal": f"B:USR1@{site.limits.warning_seconds}",
        "dependency": f"afterok:{':'.join(after)}" if after else None,
        "kill-on-invalid-dep": "yes" if after else None,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [*given, "--requeue", *resources.options]


def render(
    template: Path, site: Site, *, directives: Sequence[str], folder: Path, code: Path, command: Sequence[str | Path]
) -> str:
    """The script.

    Args:
        folder: the working directory of the job.
        code: the value of PYTHONPATH.
        command: the program and its arguments; each is quoted here.

    Raises:
        ConfigError: the template is missing, or has a `$` that is neither one of ours nor written `$$`.
    """
    try:
        text = read_text(template)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{template}: cannot be read: {error.strerror}: correct `template` in the site profile"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{error}: correct `template` in the site profile") from None
    try:
        return string.Template(text).substitute(
            directives="\n".join(f"#SBATCH {option}" for option in directives),
            folder=shlex.quote(str(folder)),
            modules="\n".join(f"module load {shlex.quote(name)}" for name in site.modules),
            environment="\n".join(f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()),
            code=shlex.quote(str(code)),
            command=shlex.join(map(str, command)),
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{template}: {error}: write $$ for a dollar sign of the shell") from None
