"""Run a config on this machine, disturb it at random, and run it again until it ends by itself."""

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_specialm.config.load import load_pipeline
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.plan import make_plan, select_tasks

from .compare import different_artifacts, different_results, leftovers
from .config import write_config
from .processes import Launch, kill

GRACE_SECONDS = 10.0  # within which all processes of an ended command must be gone
STOPPED_SECONDS = (0.5, 4.0)
LONGEST_SECONDS = 25.0  # from a start to the next disturbance: long enough for some tasks to end
PATIENCE_SECONDS = 600.0  # for an undisturbed run
POLL_SECONDS = 0.1
OTHER_SETTINGS = "stages.slm.optimizer.learning_rate=1.0e-3"  # all models except one depend on it
HELD, INTERRUPTED, FAILED = 3, 130, 1  # exit codes: the folder is locked, ended by a signal, a task has failed


@dataclass
class Disturbed:
    """A run folder in progress, its disturbances, and the faults found."""

    folder: Path
    random: random.Random
    until: str | None = None  # the stage with whose inputs the run ends; None: the whole config
    happened: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    ending: list[tuple[Launch, float]] = field(default_factory=list)  # with the deadline for its processes to end
    launches: int = 0

    def start(self, *overrides: str) -> Launch:
        """Run the config."""
        self.launches += 1
        output = self.folder / f"output-{self.launches:03d}"
        return Launch(self.folder, "run", "config.yaml", *_part(self.until), *overrides, output=output)

    def fault(self, launch: Launch, what: str) -> None:
        """Record a fault."""
        behind = ", ".join(launch.disturbed_by) or "nothing"
        self.faults.append(f"{launch.output.name}, behind {behind}: {what}")

    def ended(self, launch: Launch) -> None:
        """Check how a command has ended. `watch` checks its workers, which may end during the next command."""
        expected = {code for kind in launch.disturbed_by for code in DISTURBANCES[kind].codes} | {0}
        if launch.code == HELD and "another command" in launch.printed:
            expected.add(HELD)  # by workers of the previous command, until they have ended
        if launch.code not in expected:
            self.fault(launch, f"exit code {launch.code}: {launch.printed[-600:]}")
        if "Traceback" in launch.printed:
            self.fault(launch, f"a traceback: {launch.printed[launch.printed.index('Traceback') :][:2000]}")
        self.ending.append((launch, time.monotonic() + GRACE_SECONDS))

    def watch(self) -> None:
        """Check whether processes have outlived their command for too long."""
        for launch, deadline in list(self.ending):
            if not (alive := launch.alive()):
                self.ending.remove((launch, deadline))
            elif time.monotonic() > deadline:
                what = "; ".join(f"{process.pid} ({_words(process)})" for process in alive)
                self.fault(launch, f"alive {GRACE_SECONDS:.0f} s after its command has ended: {what}")
                launch.end()
                self.ending.remove((launch, deadline))

    def wait(self, launch: Launch, seconds: float, until: Callable[[], object] = lambda: None) -> None:
        """Wait so long, or until a command has ended or `until` returns something true."""
        deadline = time.monotonic() + seconds
        while launch.code is None and time.monotonic() < deadline and not until():
            self.watch()
            time.sleep(POLL_SECONDS)

    def end(self) -> None:
        """Wait until all commands have ended."""
        while self.ending:
            self.watch()
            time.sleep(POLL_SECONDS)


def _part(until: str | None) -> list[str]:
    return ["--until", until] if until else []


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:120]
    return "gone"


# --- disturbances: each returns the command that continues, or has ended ----------------------------------------------


def _signal_launcher(number: signal.Signals) -> Callable[[Disturbed, Launch], Launch]:
    def disturb(run: Disturbed, launch: Launch) -> Launch:
        launch.process.send_signal(number)
        run.wait(launch, PATIENCE_SECONDS)
        return launch

    return disturb


def _signal_group(number: signal.Signals) -> Callable[[Disturbed, Launch], Launch]:
    """Once there is a fork server: Python itself prints a traceback of Ctrl-C while it starts."""

    def disturb(run: Disturbed, launch: Launch) -> Launch:
        run.wait(launch, LONGEST_SECONDS, launch.fork_server)
        run.wait(launch, run.random.uniform(0, 4))
        launch.signal_all(number)
        run.wait(launch, PATIENCE_SECONDS)
        return launch

    return disturb


def _kill_all(_: Disturbed, launch: Launch) -> Launch:
    """Kill all processes, as a power loss does."""
    launch.end()
    return launch


def _kill_worker(run: Disturbed, launch: Launch) -> Launch:
    if workers := _workers(run, launch):
        kill([run.random.choice(workers)])
    return launch


def _kill_fork_server(run: Disturbed, launch: Launch) -> Launch:
    if _workers(run, launch) and (server := launch.fork_server()):
        kill([server])
    return launch


def _stop_worker(run: Disturbed, launch: Launch) -> Launch:
    if workers := _workers(run, launch):
        _stop(run, run.random.choice(workers))
    return launch


def _stop_launcher(run: Disturbed, launch: Launch) -> Launch:
    _stop(run, psutil.Process(launch.process.pid))
    return launch


def _stop(run: Disturbed, process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.suspend()
        time.sleep(run.random.uniform(*STOPPED_SECONDS))
        process.resume()


def _workers(run: Disturbed, launch: Launch) -> list[psutil.Process]:
    """The command's workers, once it has some."""
    run.wait(launch, LONGEST_SECONDS, launch.workers)
    return launch.workers()


def _second(run: Disturbed, launch: Launch) -> Launch:
    """Start the same command concurrently: one of the two is refused."""
    return _beside(run, launch, run.start())


def _rival(run: Disturbed, launch: Launch) -> Launch:
    """Start a command with other settings while one runs: it is refused, and changes nothing."""
    _workers(run, launch)
    return _beside(run, launch, run.start(OTHER_SETTINGS))


def _beside(run: Disturbed, launch: Launch, second: Launch) -> Launch:
    second.disturbed_by = list(launch.disturbed_by)
    run.wait(second, PATIENCE_SECONDS, lambda: launch.code is not None)
    if second.code is None:  # the first was refused, or has ended
        run.ended(launch)
        return second
    if launch.code is None and second.code != HELD:
        run.fault(second, f"it was not refused beside another: exit code {second.code}")
    run.ended(second)
    return launch


@dataclass(frozen=True)
class Disturbance:
    """A disturbance of a command, and the exit codes that may follow besides success."""

    do: Callable[[Disturbed, Launch], Launch]
    codes: tuple[int, ...] = ()


DISTURBANCES = {
    "kill -9 of the launcher": Disturbance(_signal_launcher(signal.SIGKILL), (-signal.SIGKILL,)),
    "kill -9 of everything": Disturbance(_kill_all, (-signal.SIGKILL,)),
    "kill -9 of a worker": Disturbance(_kill_worker, (FAILED,)),
    "kill -9 of the fork server": Disturbance(_kill_fork_server, (FAILED,)),
    # A signal before the run begins ends the process with the signal's default action.
    "SIGHUP to the launcher": Disturbance(_signal_launcher(signal.SIGHUP), (INTERRUPTED, -signal.SIGHUP)),
    "SIGTERM to the launcher": Disturbance(_signal_launcher(signal.SIGTERM), (INTERRUPTED, -signal.SIGTERM)),
    "Ctrl-C": Disturbance(_signal_group(signal.SIGINT), (INTERRUPTED, -signal.SIGINT)),
    "a closed terminal": Disturbance(_signal_group(signal.SIGHUP), (INTERRUPTED, -signal.SIGHUP)),
    "SIGTERM to the group": Disturbance(_signal_group(signal.SIGTERM), (INTERRUPTED, -signal.SIGTERM)),
    "a stopped worker": Disturbance(_stop_worker),
    "a stopped launcher": Disturbance(_stop_launcher),
    "a second launcher": Disturbance(_second),
    "a second launcher with other settings": Disturbance(_rival),
}


def disturb(run: Disturbed, *, at_most: int, longest: float = LONGEST_SECONDS) -> None:
    """Run the config in a run's folder until it ends by itself, with at most so many disturbances."""
    while True:
        launch = run.start()
        while launch.code is None and run.happened.total() < at_most:
            # Half of them during the start, which is short.
            run.wait(launch, run.random.uniform(0, run.random.choice((4.0, longest))))
            if launch.code is None:
                kind = run.random.choice(list(DISTURBANCES))
                run.happened[kind] += 1
                launch.disturbed_by.append(kind)
                launch = DISTURBANCES[kind].do(run, launch)
        run.wait(launch, PATIENCE_SECONDS)
        if launch.code is None:
            run.fault(launch, f"still at work behind {PATIENCE_SECONDS:.0f} s")
            launch.end()
        run.ended(launch)
        other = OTHER_SETTINGS in launch.arguments  # it ran after the command that it was started beside
        if (launch.code == 0 and not other) or run.faults:
            run.end()
            return
        if run.random.random() < 0.5:  # otherwise the next command meets leftover processes of this one
            run.end()


def straight_run(folder: Path, *, steps: int, every: int, until: str | None = None) -> None:
    """Run the config, or the inputs of a stage, undisturbed in a new working directory.

    Raises:
        RuntimeError: it fails.
    """
    write_config(folder, steps=steps, every=every)
    launch = Launch(folder, "run", "config.yaml", *_part(until), output=folder / "output")
    if launch.process.wait(PATIENCE_SECONDS) != 0:
        raise RuntimeError(launch.printed)


def disturbed_run(
    folder: Path,
    straight: Path,
    *,
    seed: int,
    at_most: int,
    steps: int,
    every: int,
    until: str | None = None,
    longest: float = LONGEST_SECONDS,
) -> Disturbed:
    """Run the config, or the inputs of a stage, in a new working directory, with at most so many disturbances and at most
    `longest` seconds between them. Compare the result with the undisturbed run."""
    write_config(folder, steps=steps, every=every)
    run = Disturbed(folder, random.Random(seed), until)
    disturb(run, at_most=at_most, longest=longest)
    if not run.faults:
        run.faults += compare(straight, folder, until=until)
    return run


def not_done(folder: Path, *, until: str | None = None) -> list[str]:
    """The unfinished tasks of a run, or of a stage's inputs, by the plan."""
    with contextlib.chdir(folder):
        plan = make_plan(load_pipeline(Path("config.yaml")), Path("run"))
    wanted = select_tasks(plan, only=None, until=until)
    return [f"{name} is {planned.state}" for name, planned in wanted.items() if planned.state != "done"]


def compare(straight: Path, folder: Path, *, until: str | None = None) -> list[str]:
    """How a finished run differs from the undisturbed one: tasks, bits, tables, leftovers."""
    pipeline = load_pipeline(folder / "config.yaml")
    names = [name for name in build_graph(pipeline) if (straight / "run" / name.stage / name.key).exists()]
    one, other = straight / "run", folder / "run"
    return not_done(folder, until=until) or [
        *different_artifacts(one, other, names), *different_results(one, other), *leftovers(other),
    ]  # fmt: skip
