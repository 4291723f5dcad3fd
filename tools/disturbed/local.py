"""A config that is run on this machine, disturbed at random, and run again until it ends by itself."""

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
from megatron_specialm.graph.plan import make_plan, select

from .compare import different_artifacts, different_results, leftovers
from .config import write_config
from .processes import Launch, kill

GRACE_SECONDS = 10.0  # within which all processes of a command must be gone behind it
STOPPED_SECONDS = (0.5, 4.0)
LONGEST_SECONDS = 25.0  # from a start to the next disturbance: long enough for some tasks to end
PATIENCE_SECONDS = 600.0  # for a run that nobody disturbs
POLL_SECONDS = 0.1
OTHER_SETTINGS = "stages.slm.optimizer.learning_rate=1.0e-3"  # all models but one rest on it
HELD, INTERRUPTED, FAILED = 3, 130, 1  # exit codes: the folder is held, ended by a signal, a task has failed


@dataclass
class Disturbed:
    """A run folder in the making, with what has happened to it and what went wrong."""

    folder: Path
    random: random.Random
    until: str | None = None  # the stage with whose inputs the run ends; None: the whole config
    happened: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    ending: list[tuple[Launch, float]] = field(default_factory=list)  # with the time by which all of it must be gone
    launches: int = 0

    def start(self, *overrides: str) -> Launch:
        """Run the config."""
        self.launches += 1
        output = self.folder / f"output-{self.launches:03d}"
        return Launch(self.folder, "run", "config.yaml", *_part(self.until), *overrides, output=output)

    def fault(self, launch: Launch, what: str) -> None:
        """Note what must not be."""
        behind = ", ".join(launch.disturbed_by) or "nothing"
        self.faults.append(f"{launch.output.name}, behind {behind}: {what}")

    def ended(self, launch: Launch) -> None:
        """Judge how a command has ended. That its workers end too is seen later: they may do so beside the next command."""
        expected = {code for kind in launch.disturbed_by for code in DISTURBANCES[kind].codes} | {0}
        if launch.code == HELD and "another command" in launch.said:
            expected.add(HELD)  # by workers of the one before, until they have ended
        if launch.code not in expected:
            self.fault(launch, f"exit code {launch.code}: {launch.said[-600:]}")
        if "Traceback" in launch.said:
            self.fault(launch, f"a traceback: {launch.said[launch.said.index('Traceback') :][:2000]}")
        self.ending.append((launch, time.monotonic() + GRACE_SECONDS))

    def watch(self) -> None:
        """Look whether anything has outlived its command for too long."""
        for launch, deadline in list(self.ending):
            if not (alive := launch.alive()):
                self.ending.remove((launch, deadline))
            elif time.monotonic() > deadline:
                what = "; ".join(f"{process.pid} ({_words(process)})" for process in alive)
                self.fault(launch, f"alive {GRACE_SECONDS:.0f} s after its command has ended: {what}")
                launch.end()
                self.ending.remove((launch, deadline))

    def wait(self, launch: Launch, seconds: float, until: Callable[[], object] = lambda: None) -> None:
        """Wait so long, or until a command has ended or a question is answered."""
        deadline = time.monotonic() + seconds
        while launch.code is None and time.monotonic() < deadline and not until():
            self.watch()
            time.sleep(POLL_SECONDS)

    def end(self) -> None:
        """See all commands gone."""
        while self.ending:
            self.watch()
            time.sleep(POLL_SECONDS)


def _part(until: str | None) -> list[str]:
    return ["--until", until] if until else []


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:120]
    return "gone"


# --- disturbances: each returns the command that goes on, or has ended ------------------------------------------------


def _signal_launcher(number: signal.Signals) -> Callable[[Disturbed, Launch], Launch]:
    def disturb(run: Disturbed, launch: Launch) -> Launch:
        launch.process.send_signal(number)
        run.wait(launch, PATIENCE_SECONDS)
        return launch

    return disturb


def _kill_all(_: Disturbed, launch: Launch) -> Launch:
    """As a power loss does."""
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
    """Its workers, once it has some."""
    run.wait(launch, LONGEST_SECONDS, launch.workers)
    return launch.workers()


def _second(run: Disturbed, launch: Launch) -> Launch:
    """The same command beside it: one of both is refused."""
    return _beside(run, launch, run.start())


def _rival(run: Disturbed, launch: Launch) -> Launch:
    """A command with other settings, beside one that is at work: it is refused, and changes nothing."""
    _workers(run, launch)
    return _beside(run, launch, run.start(OTHER_SETTINGS))


def _beside(run: Disturbed, launch: Launch, second: Launch) -> Launch:
    second.disturbed_by = list(launch.disturbed_by)
    run.wait(second, PATIENCE_SECONDS, lambda: launch.code is not None)
    if second.code is None:  # the first was refused, or has come to its end
        run.ended(launch)
        return second
    if launch.code is None and second.code != HELD:
        run.fault(second, f"it was not refused beside another: exit code {second.code}")
    run.ended(second)
    return launch


@dataclass(frozen=True)
class Disturbance:
    """What is done to a command, and the exit codes that it may end with, beside that of success."""

    do: Callable[[Disturbed, Launch], Launch]
    codes: tuple[int, ...] = ()


DISTURBANCES = {
    "kill -9 of the launcher": Disturbance(_signal_launcher(signal.SIGKILL), (-signal.SIGKILL,)),
    "kill -9 of everything": Disturbance(_kill_all, (-signal.SIGKILL,)),
    "kill -9 of a worker": Disturbance(_kill_worker, (FAILED,)),
    "kill -9 of the fork server": Disturbance(_kill_fork_server, (FAILED,)),
    # A signal that comes before the run has begun ends it as it ends any program.
    "SIGHUP to the launcher": Disturbance(_signal_launcher(signal.SIGHUP), (INTERRUPTED, -signal.SIGHUP)),
    "SIGTERM to the launcher": Disturbance(_signal_launcher(signal.SIGTERM), (INTERRUPTED, -signal.SIGTERM)),
    "a stopped worker": Disturbance(_stop_worker),
    "a stopped launcher": Disturbance(_stop_launcher),
    "a second launcher": Disturbance(_second),
    "a second launcher with other settings": Disturbance(_rival),
}


def disturb(run: Disturbed, *, at_most: int, longest: float = LONGEST_SECONDS) -> None:
    """Run the config in the folder of a run until it ends by itself, disturbing it at most so many times."""
    while True:
        launch = run.start()
        while launch.code is None and run.happened.total() < at_most:
            # Half of them while it starts, which is short.
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
        other = OTHER_SETTINGS in launch.arguments  # it has come behind the one that it was started beside, and worked
        if (launch.code == 0 and not other) or run.faults:
            run.end()
            return
        if run.random.random() < 0.5:  # else the next one meets what is left of this one
            run.end()


def straight_run(folder: Path, *, steps: int, every: int, until: str | None = None) -> None:
    """Run the config, or what a stage rests on, undisturbed in a new working directory.

    Raises:
        RuntimeError: it fails.
    """
    write_config(folder, steps=steps, every=every)
    launch = Launch(folder, "run", "config.yaml", *_part(until), output=folder / "output")
    if launch.process.wait(PATIENCE_SECONDS) != 0:
        raise RuntimeError(launch.said)


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
    """Run the config, or what a stage rests on, in a new working directory, disturbing it at most so many times, with at most
    `longest` seconds from one to the next; compare what it comes to with the undisturbed run."""
    write_config(folder, steps=steps, every=every)
    run = Disturbed(folder, random.Random(seed), until)
    disturb(run, at_most=at_most, longest=longest)
    if not run.faults:
        run.faults += compare(straight, folder, until=until)
    return run


def not_done(folder: Path, *, until: str | None = None) -> list[str]:
    """What a run lacks, or what a stage rests on, by the plan."""
    with contextlib.chdir(folder):
        plan = make_plan(load_pipeline(Path("config.yaml")), Path("run"))
    wanted = select(plan, only=None, until=until)
    return [f"{name} is {planned.state}" for name, planned in wanted.items() if planned.state != "done"]


def compare(straight: Path, folder: Path, *, until: str | None = None) -> list[str]:
    """Where a run that has ended falls short of the undisturbed one: tasks, bits, tables, and what is left over."""
    pipeline = load_pipeline(folder / "config.yaml")
    names = [name for name in build_graph(pipeline) if (straight / "run" / name.stage / name.key).exists()]
    one, other = straight / "run", folder / "run"
    return not_done(folder, until=until) or [
        *different_artifacts(one, other, names), *different_results(one, other), *leftovers(other),
    ]  # fmt: skip
