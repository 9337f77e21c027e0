"""Give damaged and hostile files to everything that reads files or messages from outside.

    python -m benchmarks.fuzz [--minutes 3] [--seed 0] [--readers policy networks ...] [--out FILE]

Readers: `policy` (Hugging Face folder and adapter), `networks` (classifier folder, Lightning and
old PyTorch files), `starts` (RLinf's `.npy` start frames and keyframes), `lerobot` (import of a
dataset), `episodes` (recording), `bridge` (messages between trainer and simulator). Two processes
share them.

Each input is a copy of valid files with one or two changes (`benchmarks.fuzz_inputs`). The only
good ends are success and an `EvacJaxError`. Everything else is a crash: another exception, a dead
process, more than 20 s, or 1 GB more memory than before. Python's audit events show whether a
reader started a program or wrote outside of its folder. Code hidden in a pickle would make a file,
which is looked for as well.

Every crash is printed with its reader and number. `--readers policy --only 17` repeats input 17 of
`policy` and prints its outcome in full. The last line is

    inputs= errors= crashes= executed= peak_mb=

inputs tried, those that ended in an `EvacJaxError`, crashes, inputs after which something had been
executed or written outside, and the largest growth of a process's memory during one input (MB).
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIME_LIMIT_S, MEMORY_LIMIT_MB = 20, 1024
STARTS_A_PROGRAM = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork")
READERS = ("policy", "networks", "starts", "lerobot", "episodes", "bridge")


class _TimeUpError(BaseException):
    """An input took too long; no handler of the reader's may take it for its own error."""


def _read_policy(folder: Path, out: Path) -> None:
    from evac_jax.config.schema import PolicyConfig
    from evac_jax.policy_import import check_policy, import_policy

    config = PolicyConfig(
        checkpoint=str(folder / "base"),
        lora_adapter=str(folder / "adapter"),
        unnorm_key="tiny",
        max_prompt_length=24,
        value_head="none",
    )
    check_policy(config)
    import_policy(config, seed=0, chunk=2, num_images=1)


def _read_networks(folder: Path, out: Path) -> None:
    from evac_jax.errors import EvacJaxError
    from evac_jax.evac import model_folders, weight_files

    # All three, whatever the others say: each is a reader of its own.
    found: list[EvacJaxError] = []
    for read, path in (
        (model_folders.load_model, folder / "reward"),
        (weight_files.read_weights, folder / "lightning.ckpt"),
        (weight_files.read_weights, folder / "old.pt"),
    ):
        try:
            read(path)
        except EvacJaxError as error:
            found.append(error)
    if found:
        raise found[0]


def _read_starts(folder: Path, out: Path) -> None:
    import numpy as np

    from evac_jax.bridge.types import KEYFRAMES
    from evac_jax.sim.initial_states import NpyKeyframes, NpyStarts

    starts = NpyStarts(str(folder))
    starts.load(np.arange(starts.num_starts))
    keyframes = NpyKeyframes(str(folder))
    keyframes.load(KEYFRAMES + np.arange(keyframes.count))


def _read_lerobot(folder: Path, out: Path) -> None:
    from evac_jax.tools.episodes import import_lerobot

    camera = out.parent / "camera.json"
    if not camera.exists():
        matrices = {"intrinsic": [[[16, 0, 8], [0, 16, 8], [0, 0, 1]]], "size": [16, 16]}
        matrices["c2w"] = [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]
        camera.write_text(json.dumps(matrices))
    import_lerobot.main(
        ["--source", str(folder), "--out", str(out / "recording"), "--camera", str(camera),
         "--images", "image", "--success", "next.success", "--gripper", "closes"]
    )  # fmt: skip


def _read_episodes(folder: Path, out: Path) -> None:
    import numpy as np

    from evac_jax.files import recordings

    data = recordings.load(folder)
    data.success_once()
    data.rows(np.arange(data.num_episodes), data.length)
    recordings.verify(folder)


def _read_bridge(folder: Path, out: Path) -> None:
    from evac_jax.bridge import protocol

    for path in sorted(folder.glob("*.bin")):
        if path.is_file() and not path.is_symlink():
            protocol.decode(path.read_bytes())


def _reader(name: str) -> tuple[Callable[[Path], None], Callable[[Path, Path], None]]:
    """Return what makes the valid files, and what reads them."""
    from benchmarks import fuzz_inputs

    return getattr(fuzz_inputs, f"make_{_MADE.get(name, name)}"), globals()[f"_read_{name}"]


_MADE = {"bridge": "messages"}


class _Watch:
    """Notes what must not happen while a reader reads; an audit hook cannot be taken away again."""

    def __init__(self, allowed: Path):
        self.allowed, self.armed, self.seen = str(allowed), False, []
        sys.addaudithook(self._event)

    def _event(self, event: str, args: tuple) -> None:
        if not self.armed:
            return
        if event in STARTS_A_PROGRAM:
            self.seen.append(f"{event} {args[0]!r}")
        elif event == "open" and isinstance(args[0], str) and isinstance(args[2], int):
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            path = os.path.realpath(args[0])
            if writes and not path.startswith((self.allowed, "/dev/", "/proc/")):
                self.seen.append(f"write {path}")

    @contextlib.contextmanager
    def armed_for_input(self) -> Iterator[list[str]]:
        self.seen, self.armed = [], True
        try:
            yield self.seen
        finally:
            self.armed = False


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def _outcome(read: Callable[[], None]) -> tuple[str, str]:
    """Return ("ok" | "error" | "crash", what was said)."""
    from evac_jax.errors import EvacJaxError

    def time_up(_signal, _frame):
        raise _TimeUpError(f"more than {TIME_LIMIT_S} s")

    signal.signal(signal.SIGALRM, time_up)
    signal.alarm(TIME_LIMIT_S)
    try:
        read()
    except EvacJaxError as error:
        return "error", f"{type(error).__name__}: {error}"
    except SystemExit as error:  # of a command's parser
        return ("error" if error.code == 2 else "crash"), f"SystemExit: {error.code}"
    except (Exception, _TimeUpError):
        return "crash", traceback.format_exc()
    finally:
        signal.alarm(0)
    return "ok", ""


def _try_one(reader: str, seed: int, number: int, valid: Path, work: Path, watch: _Watch) -> dict:
    from benchmarks import fuzz_inputs

    read = _reader(reader)[1]
    folder, out, canary = work / "input", work / "out", work / "canary"
    for path in (folder, out, canary):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(valid, folder)
    out.mkdir()
    os.environ[fuzz_inputs.CANARY] = str(canary)
    rng = random.Random(f"{reader} {seed} {number}")
    change = fuzz_inputs.damage(rng, folder)
    with contextlib.suppress(OSError):  # where the system cannot forget the peak: it only grows
        Path("/proc/self/clear_refs").write_text("5")
    before = _status_mb("VmRSS")
    with watch.armed_for_input() as seen:
        kind, text = _outcome(lambda: read(folder, out))
    growth = _status_mb("VmHWM") - before
    if growth > MEMORY_LIMIT_MB:
        kind, text = "crash", f"{growth:.0f} MB; {text}"
    executed = [*seen, *(["the canary was made"] if canary.exists() else [])]
    return {
        "number": number, "change": change, "kind": kind, "text": text,
        "executed": executed, "growth_mb": growth,
    }  # fmt: skip


def _work(args: argparse.Namespace) -> None:
    """Try inputs first, first + 1 .. until the time is up; one JSON line before and after each."""
    hard = 16 * 2**30  # so that an absurd allocation fails at once; most of it is never touched
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    work = Path(args.work)
    valid = work / "valid"
    make, read = _reader(args.readers[0])
    shutil.rmtree(valid, ignore_errors=True)
    make(valid)
    warm = work / "out"
    shutil.rmtree(warm, ignore_errors=True)
    warm.mkdir()
    read(valid, warm)  # imports and first uses are not an input's doing; valid files must be read
    watch, end = _Watch(work), time.monotonic() + args.seconds
    number = args.first
    while time.monotonic() < end and (args.only is None or number == args.only):
        print(json.dumps({"begins": number}), flush=True)
        print(
            json.dumps(_try_one(args.readers[0], args.seed, number, valid, work, watch)), flush=True
        )
        number += 1


class _Child:
    """The process that tries one reader's inputs; begun again behind an input that killed it."""

    def __init__(self, reader: str, seed: int, seconds: float, work: Path):
        self.reader, self.seed, self.work = reader, seed, work / reader
        self.work.mkdir()
        self.end, self.results, self._begun = time.monotonic() + seconds, [], 0

    def run(self) -> list[dict[str, Any]]:
        while (left := self.end - time.monotonic()) > 1:
            command = [sys.executable, "-m", "benchmarks.fuzz", "--readers", self.reader,
                       "--seed", str(self.seed), "--work", str(self.work),
                       "--seconds", str(left), "--first", str(self._begun)]  # fmt: skip
            log = self.work / "stderr.log"
            with log.open("w") as stderr:
                child = subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
                )
                open_input = self._listen(child)
            if child.returncode == 0:
                break
            tail = log.read_text(errors="replace")[-2000:]
            if open_input is None:
                raise SystemExit(f"{self.reader}: valid files could not be read:\n{tail}")
            self.results.append({
                "number": open_input, "change": "see --only", "kind": "crash", "executed": [],
                "text": f"the process ended with {child.returncode}\n{tail}", "growth_mb": 0.0,
            })  # fmt: skip
        return [{"reader": self.reader, **result} for result in self.results]

    def _listen(self, child: subprocess.Popen) -> int | None:
        """Keep the results; return the input that the process died of, if it did."""
        open_input = None
        for line in child.stdout:
            if not line.startswith("{"):
                continue
            told = json.loads(line)
            if "begins" in told:
                open_input, self._begun = told["begins"], told["begins"] + 1
            else:
                self.results.append(told)
                open_input = None
        child.wait()
        return open_input


def _pairs(readers: list[str], seconds: float, seed: int, work: Path) -> list[dict[str, Any]]:
    """Try the readers, two at a time, each for its share of the time."""
    from concurrent.futures import ThreadPoolExecutor

    share = seconds * min(2, len(readers)) / len(readers)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(lambda r=r: _Child(r, seed, share, work).run()) for r in readers]
        return [result for run in runs for result in run.result()]


def main() -> None:
    """Command line."""
    from evac_jax.tools.command_line import KINDS  # not in the process that is limited

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--minutes", type=KINDS["positive"], default=3.0, help="for all readers together"
    )
    parser.add_argument("--seed", type=KINDS["natural"], default=0)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument(
        "--only", type=KINDS["natural"], help="repeat this input of one reader, told in full"
    )
    parser.add_argument("--out", type=Path, help="every input and its outcome, as JSON lines")
    for name, kind in (("work", str), ("seconds", float), ("first", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        _work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.only is not None:
            args.work, args.seconds, args.first = folder, 1.0, args.only
            _work(args)
            return
        results = _pairs(args.readers, 60 * args.minutes, args.seed, Path(folder))
    if args.out:
        args.out.write_text("".join(json.dumps(result) + "\n" for result in results))
    _print(results, args.readers)


def _print(results: list[dict[str, Any]], readers: list[str]) -> None:
    for result in results:
        if result["kind"] == "crash" or result["executed"]:
            print(f"{result['reader']} --only {result['number']} ({result['change']}):")
            print("   ", "\n    ".join([*result["executed"], *result["text"].splitlines()[-4:]]))
    print(f"{'reader':10} {'inputs':>7} {'read':>6} {'errors':>7} {'crashes':>8} {'peak MB':>8}")
    for name in readers:
        mine = [result for result in results if result["reader"] == name]
        ok, errors, crashes = (sum(r["kind"] == k for r in mine) for k in ("ok", "error", "crash"))
        peak = max((r["growth_mb"] for r in mine), default=0.0)
        print(f"{name:10} {len(mine):7} {ok:6} {errors:7} {crashes:8} {peak:8.0f}")
    print(
        f"inputs={len(results)} errors={sum(r['kind'] == 'error' for r in results)} "
        f"crashes={sum(r['kind'] == 'crash' for r in results)} "
        f"executed={sum(bool(r['executed']) for r in results)} "
        f"peak_mb={max((r['growth_mb'] for r in results), default=0.0):.0f}"
    )


if __name__ == "__main__":
    main()
