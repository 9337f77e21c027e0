"""Runs commands that depend on each other, several at a time, and skips those that are done.

A stage is one public command. Its stamp is the hash of its command line and of its inputs' stamps.
So if a number changes, that stage and all that depend on it run again, and no others. In a command
line, `{work}` stands for the output folder, so stamps and cards do not depend on its path.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from absl import logging

from evac_jax.devices.malloc import KEEP_FREED_MEMORY
from evac_jax.errors import ConfigError, DataError, EvacJaxError, nearest
from evac_jax.files import cards
from evac_jax.tools.resume import check_folder

WORK = "{work}"
ROOT = Path(__file__).resolve().parents[3]
POLL_S = 0.1
TAIL_LINES = 30  # last lines of a failed stage's output that the error shows


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: unique; also the name of its log and its stamp.
        command: arguments of the Python interpreter; `{work}` stands for the output folder.
        inputs: names of the stages whose outputs it reads.
        output: file or folder that it makes, relative to `{work}`. If it is missing, the stage is
            not done.
        cores: number of cores that the stage gets.
        resumes: the command continues from what a stopped run left under `output`; if False, that
            is removed first.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    output: str = ""
    cores: int = 1
    resumes: bool = False

    @property
    def shown(self) -> str:
        """The command as a user would type it."""
        return " ".join(["python", *self.command])


def check(stages: Sequence[Stage]) -> None:
    """Check that a table can be run.

    Raises:
        ConfigError: a name occurs twice, or no earlier stage makes an input.
    """
    seen: set[str] = set()
    for stage in stages:
        if stage.name in seen:
            raise ConfigError(f"stage {stage.name!r} comes twice")
        if missing := [name for name in stage.inputs if name not in seen]:
            raise ConfigError(f"stage {stage.name!r} needs {missing}, made by no earlier stage")
        seen.add(stage.name)


def stamps(stages: Sequence[Stage]) -> dict[str, str]:
    """Return {stage: hash of its command line and of its inputs' stamps}."""
    check(stages)
    result: dict[str, str] = {}
    for stage in stages:
        facts = [stage.command, stage.output, [result[name] for name in stage.inputs]]
        result[stage.name] = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return result


def needed_for(stages: Sequence[Stage], names: Collection[str]) -> set[str]:
    """Return the named stages and all that make their inputs.

    Raises:
        ConfigError: there is no such stage.
    """
    known = {stage.name: stage for stage in stages}
    result: set[str] = set()
    rest = list(names)
    while rest:
        name = rest.pop()
        if name not in known:
            raise ConfigError(f"no stage {name!r}; there are {list(known)}{nearest(name, known)}")
        if name not in result:
            result.add(name)
            rest += known[name].inputs
    return result


class Workshop:
    """A folder with the outputs of stages, their stamps and their logs.

    Args:
        work: the folder; created if needed. Only one process at a time may use it.
        cores: number of cores that the stages share; at most those that this process may use.
            None = all, up to 2.

    Raises:
        DataError: another process, or a stage that one left behind, still uses the folder; or it
            holds other files.
    """

    def __init__(self, work: str | Path, cores: int | None = None):
        self.work = Path(work).absolute()
        check_folder(self.work, "stamps")  # outputs of stages are removed before they run anew
        self._stamps, self._logs = self.work / "stamps", self.work / "logs"
        for folder in (self._stamps, self._logs):
            folder.mkdir(parents=True, exist_ok=True)
        usable = sorted(os.sched_getaffinity(0))
        self._cores = usable[: min(cores or 2, len(usable))]
        # The stages inherit the lock, so it is held until the last of them has ended.
        self._lock = (self.work / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{self.work}: another process is at work in there; wait for it, or end it"
            ) from None

    def record(self, name: str) -> dict:
        """Return a stage's record: stamp, seconds, done, command; {} if it has not started."""
        path = self._stamps / f"{name}.json"
        return cards.read_json(path) if path.is_file() else {}

    def is_done(self, stage: Stage, stamp: str) -> bool:
        """Whether the stage's output exists and was made by exactly this command."""
        record = self.record(stage.name)
        exists = not stage.output or (self.work / stage.output).exists()
        return exists and record.get("done", False) and record["stamp"] == stamp

    def clock(self) -> float:
        """Wall-clock seconds of all runs in this folder together."""
        path = self.work / "clock.json"
        return cards.read_json(path)["seconds"] if path.is_file() else 0.0

    def _set_clock(self, seconds: float) -> None:
        cards.write_json(self.work / "clock.json", {"seconds": seconds})

    def run(self, stages: Sequence[Stage], only: Collection[str] = ()) -> None:
        """Run the stages that are not done, in the table's order as inputs and cores allow.

        Args:
            only: names of those to run; () = all.

        Raises:
            ConfigError: there is no such stage, or what it needs is neither done nor among them.
            EvacJaxError: a stage failed; the others are stopped. Another call continues from there.
        """
        marks = stamps(stages)
        waiting = [stage for stage in stages if not self.is_done(stage, marks[stage.name])]
        logging.info("%d of %d stages are done already", len(stages) - len(waiting), len(stages))
        ready = {stage.name for stage in stages} - {stage.name for stage in waiting}
        if only:
            if missing := sorted(needed_for(stages, only) - ready - set(only)):
                raise ConfigError(
                    f"{', '.join(sorted(only))}: not done yet, or by another command, is what "
                    f"they need: {', '.join(missing)}; run these first, or use --until"
                )
            waiting = [stage for stage in waiting if stage.name in only]
        running: list[_Running] = []
        earlier, began = self.clock(), time.perf_counter()
        try:
            while waiting or running:
                for stage in list(waiting):
                    free = [c for c in self._cores if all(c not in r.cores for r in running)]
                    needed = min(stage.cores, len(self._cores))
                    if set(stage.inputs) <= ready and needed <= len(free):
                        waiting.remove(stage)
                        running.append(self._start(stage, marks[stage.name], free[:needed]))
                for part in [part for part in running if part.process.poll() is not None]:
                    running.remove(part)
                    self._finish(part)
                    ready.add(part.stage.name)
                    self._set_clock(earlier + time.perf_counter() - began)
                time.sleep(POLL_S if running else 0)
        finally:
            for part in running:
                part.process.terminate()
            for part in running:
                with contextlib.suppress(EvacJaxError):
                    self._finish(part)
            self._set_clock(earlier + time.perf_counter() - began)

    def _start(self, stage: Stage, stamp: str, cores: list[int]) -> "_Running":
        record, output = self.record(stage.name), self.work / stage.output
        same = record.get("stamp") == stamp
        if stage.output and not (same and stage.resumes):
            # A stopped run may have left files beside it, with names such as <output>.partial.
            for path in (output, *output.parent.glob(f"{output.name}.*")):
                _remove(path)
        output.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "stamp": stamp,
            "done": False,
            "seconds": record["seconds"] if same and stage.resumes else 0.0,
            "command": stage.shown,
        }
        cards.write_json(self._stamps / f"{stage.name}.json", record)
        command = [part.replace(WORK, str(self.work)) for part in stage.command]
        logging.info("%s: begins on %d core(s)", stage.name, len(cores))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {
            "OMP_NUM_THREADS": "1",
            **KEEP_FREED_MEMORY,
            **os.environ,
            "PYTHONPATH": path,
        }
        with (self._logs / f"{stage.name}.log").open("ab") as log, _on(cores):
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(self._lock.fileno(),),
            )
        return _Running(stage, record, process, cores, time.perf_counter())

    def _finish(self, part: "_Running") -> None:
        """Record how a stage ended."""
        status = part.process.wait()
        stage, log = part.stage, self._logs / f"{part.stage.name}.log"
        made = not stage.output or (self.work / stage.output).exists()
        record = part.record | {
            "done": status == 0 and made,
            "seconds": part.record["seconds"] + time.perf_counter() - part.began,
        }
        cards.write_json(self._stamps / f"{stage.name}.json", record)
        if record["done"]:
            logging.info("%s: done after %.0f s", stage.name, record["seconds"])
            return
        what = f"exit status {status}" if status else f"it made no {stage.output}"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise EvacJaxError(
            f"stage {stage.name!r} failed: {what}\n{stage.shown}\n--- end of {log} ---\n{tail}"
        )


@dataclasses.dataclass(frozen=True)
class _Running:
    stage: Stage
    record: dict
    process: subprocess.Popen
    cores: list[int]
    began: float


@contextlib.contextmanager
def _on(cores: list[int]) -> Iterator[None]:
    """Let the process started in the block inherit these cores; thread pools count them."""
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_cores)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
