"""What a user loses when something goes wrong: a matrix of faults in a small run.

    python -m benchmarks.faults [--only NAME ..] [--work DIR] [--list]

Each case starts `launch.py` on the miniature (8 environments, 4 iterations, a checkpoint after
each) and lets one process fail at one call: it is killed, raises, is stopped or runs out of memory,
or its disk is full, read-only or gone; or the newest checkpoint is damaged. `benchmarks/fault_hook`
does that from outside. Then the command that the run printed is started; where the trainer was
killed and printed nothing, the same command with `checkpoint.restore=auto`. It must end with the
metrics and parameters of a run without a fault, bit for bit.

Results are kept in --work, so an interrupted matrix goes on where it was. What this machine cannot
do (mount a disk, or a limit that nothing runs into) is skipped and named. The last line is

    cases= survived= bit_equal= lost_iterations= worst_detect_s= orphans= skipped=

cases that ran; those that ended as they should; those whose end was equal bit for bit; iterations
that were logged and were played again, beyond the one under way, which may be logged already; the
longest time from a fault to the end of the run's process (s); processes and temporary files left
behind; cases skipped.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.fault_cases import Case, cases

ROOT = Path(__file__).parents[1]
HOOK = ROOT / "benchmarks" / "fault_hook"
ITERATIONS, TIMEOUT_S, LINGER_S = 4, 400, 5.0
SETTINGS = {
    "train.iterations": ITERATIONS,
    "env.num_envs": 8,
    "env.max_episode_steps": 16,
    "algo.group_size": 4,
    "algo.global_batch": 16,
    "algo.micro_batch": 16,
    "algo.entropy_bonus": 0.01,  # in 16 steps nobody succeeds, so rewards alone teach nothing
    "checkpoint.interval": 1,
    "checkpoint.keep": 10,
    "eval.interval": 2,
    "eval.episodes": 8,
    "eval.ground_truth_episodes": 8,
    "eval.ground_truth_envs": 8,
    "eval.twin_fraction": 0.0,
    "simulator.processes": 1,
    "simulator.timeout_s": 20.0,
    "video.save": False,
    "log.tensorboard": False,
    "log.run": "run",
}
# --- running --------------------------------------------------------------------------------------


def _command(folder: Path, *more: str) -> list[str]:
    flags = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    return [
        sys.executable, "launch.py", "--config=configs/grpo.py", *flags,
        f"--config.log.dir={folder}", *more,
    ]  # fmt: skip


def _environment(work: Path, name: str, fault: dict | None) -> dict[str, str]:
    more = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(work / "programs"),
        "EVAC_JAX_CASE": name,  # by which processes that were left behind are found
    }
    if fault is not None:
        more |= {"PYTHONPATH": str(HOOK), "EVAC_JAX_FAULT": json.dumps(fault)}
        more["EVAC_JAX_FAULT_FOLDER"] = str(work / name / "runs")
    return os.environ | more


def _run(commands: list[list[str]], environment: dict, log: Path) -> tuple[list[int], list[str]]:
    """Start one process per host; return their statuses and outputs."""
    outputs = [log.with_suffix(f".{n}.log") for n in range(len(commands))]
    processes = []
    for command, path in zip(commands, outputs, strict=True):
        with path.open("w") as file:
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                )
            )
    deadline = time.monotonic() + TIMEOUT_S
    # The first host to end is what a scheduler sees; a stopped one never ends by itself.
    while time.monotonic() < deadline:
        if all(process.poll() is not None or _is_stopped(process.pid) for process in processes):
            break
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    return [p.returncode for p in processes], [path.read_text() for path in outputs]


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _left_behind(name: str, folder: Path) -> list[str]:
    """Return processes of the case that still run, and temporary files in its folder."""
    found = []
    mark = f"EVAC_JAX_CASE={name}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes().split(b"\0"):
                found.append(f"process {path.name}: {(path / 'cmdline').read_bytes()[:80]!r}")
    for path in folder.rglob("*"):
        if re.search(r"\.(tmp|partial)|orbax-checkpoint-tmp", path.name):
            found.append(f"file {path}")
    return found


def _result(run: Path) -> dict[str, Any]:
    """Return what must be equal: metrics but for clocks, and the last checkpoint's arrays."""
    import orbax.checkpoint as ocp

    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    figures = {
        line["iteration"]: {
            name: value
            for name, value in line.items()
            if not name.startswith(("time/", "log/compilations"))
        }
        for line in lines
    }
    path = run / "checkpoints" / str(ITERATIONS) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        names = reader.metadata(path).item_metadata.tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        state = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {"figures": figures, "state": state}


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    same = one["figures"] == other["figures"] and one["state"].keys() == other["state"].keys()
    return same and all(
        np.array_equal(array, other["state"][name], equal_nan=True)
        for name, array in one["state"].items()
    )


@contextlib.contextmanager
def _disk(folder: Path, wanted: bool) -> Iterator[None]:
    """Mount a disk of 64 MB at `folder` while the case runs.

    Raises:
        PermissionError: this machine does not let us.
    """
    folder.mkdir(parents=True)
    if not wanted:
        yield
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        raise PermissionError("a disk cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _hosts(count: int) -> list[tuple[str, ...]]:
    if count == 1:
        return [()]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = (
        f"--config.cluster.num_nodes={count}",
        f"--config.cluster.coordinator=localhost:{port}",
    )
    return [(*shared, f"--config.cluster.node={node}") for node in range(count)]


def _printed_command(output: str) -> list[str] | None:
    """Return the last command of `launch.py` that the run printed."""
    lines = [line.strip() for line in output.splitlines() if " launch.py " in line]
    return shlex.split(lines[-1]) if lines and lines[-1].startswith("/") else None


def try_case(case: Case, work: Path, plain: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Run a case; return what came of it, as JSON values."""
    folder = work / case.name
    shutil.rmtree(folder, ignore_errors=True)
    runs = folder / "runs"
    with _disk(runs, case.disk):
        if case.damage:
            found = _damaged(case, work, runs)
        else:
            found = _broken(case, work, folder, runs, plain)
        command = found.pop("command")
        if command is None:
            found |= {"survived": found["bit_equal"], "lost_iterations": 0}
        else:
            found |= _resumed(case, command, work, folder, runs, plain)
        time.sleep(LINGER_S)
        left = _left_behind(case.name, runs)
    if found["survived"]:
        shutil.rmtree(folder, ignore_errors=True)
    return {"name": case.name, **found, "orphans": left}


def _broken(
    case: Case, work: Path, folder: Path, runs: Path, plain: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """Start the run that fails; return its end and the commands that go on."""
    stamp = folder / "stamp"
    fault = (case.fault or {}) | {"stamp": str(stamp)}
    more = tuple(f"--config.{setting}" for setting in case.settings)
    hosts = [(*flags, *more) for flags in _hosts(case.hosts)]
    commands = [_command(runs, *flags) for flags in hosts]
    statuses, outputs = _run(commands, _environment(work, case.name, fault), folder / "broken")
    ended = time.time()
    if not stamp.exists():
        raise SystemExit(f"{case.name}: the fault never happened:\n{outputs[0][-3000:]}")
    if case.harmless and not any(statuses):
        equal = _equal(_result(runs / "run"), plain[case.hosts])
        return {
            "detect_s": 0.0,
            "statuses": statuses,
            "said": "",
            "command": None,
            "bit_equal": equal,
        }
    if not any(statuses):
        raise PermissionError("the fault had no effect here: the run ended with status 0")
    if case.disk:  # the user makes room
        (runs / "filler").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,rw", str(runs)], check=True)
    printed = [_printed_command(output) for output in outputs]
    told = [
        command or [*_command(runs, *flags), "--config.checkpoint.restore=auto"]
        for command, flags in zip(printed, hosts, strict=True)
    ]
    if case.hosts > 1:  # both need the flag that one of them printed
        told = [
            [*_command(runs, *flags), "--config.checkpoint.restore=auto"] for flags in _hosts(2)
        ]
    said = " | ".join(output.strip().splitlines()[-1][:200] for output in outputs if output.strip())
    return {
        "detect_s": ended - float(stamp.read_text()),
        "statuses": statuses,
        "said": said,
        "traceback": any("Traceback" in o for o in outputs) and "error" not in case.name,
        "command": told,
    }


def _damaged(case: Case, work: Path, runs: Path) -> dict[str, Any]:
    """Copy the plain run, as it was before its last iteration, and damage its newest checkpoint."""
    shutil.copytree(work / "plain-1" / "runs" / "run", runs / "run")
    (runs / "run" / "summary.json").unlink(missing_ok=True)
    shutil.rmtree(runs / "run" / "checkpoints" / str(ITERATIONS))
    case.damage(runs / "run" / "checkpoints" / str(ITERATIONS - 1))
    command = [*_command(runs), f"--config.checkpoint.restore={runs / 'run'}"]
    return {"detect_s": 0.0, "statuses": [], "said": "", "command": [command]}


def _resumed(
    case: Case, commands: list[list[str]], work: Path, folder: Path, runs: Path, plain: dict
) -> dict[str, Any]:
    """Go on as told; return whether the end is that of an unbroken run."""
    metrics = runs / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    complete = max((json.loads(line)["iteration"] for line in lines), default=0)
    if case.damage:
        complete = ITERATIONS - 1  # the newest, damaged one
    statuses, outputs = _run(commands, _environment(work, case.name, None), folder / "resumed")
    restored = re.search(r"restored .* at iteration (\d+)", outputs[0])
    begun = int(restored[1]) if restored else 0
    found: dict[str, Any] = {"resumed_at": begun, "lost_iterations": max(0, complete - begun - 1)}
    try:
        equal = not any(statuses) and _equal(_result(runs / "run"), plain[case.hosts])
    except (OSError, ValueError, KeyError) as error:
        equal, found["why"] = False, repr(error)
    if any(statuses):
        found["why"] = outputs[0][-1500:]
    return found | {"survived": not any(statuses), "bit_equal": equal}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="these cases, by name or its beginning")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "faults")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    args = parser.parse_args()
    chosen = [c for c in cases() if not args.only or c.name.startswith(tuple(args.only))]
    if not chosen:
        parser.error(f"--only: no case begins with {args.only}; --list shows their names")
    if args.list:
        print("\n".join(case.name for case in chosen))
        return
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    machine.show(machine.describe())
    plain = {hosts: _plain(work, hosts) for hosts in sorted({case.hosts for case in chosen})}
    kept, results, skipped = work / "results.jsonl", {}, []
    if kept.exists() and not args.only:
        results = {r["name"]: r for r in map(json.loads, kept.read_text().splitlines())}
    for case in chosen:
        if case.name not in results:
            try:
                results[case.name] = try_case(case, work, plain)
            except PermissionError as error:
                skipped.append(f"{case.name} ({error})")
                continue
            with kept.open("a") as file:
                file.write(json.dumps(results[case.name]) + "\n")
        _show(results[case.name])
    _summary([results[case.name] for case in chosen if case.name in results], skipped)


def _plain(work: Path, hosts: int) -> dict[str, Any]:
    """Return the result of a run without a fault, made once."""
    folder = work / f"plain-{hosts}"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "runs").mkdir(parents=True)
        commands = [_command(folder / "runs", *flags) for flags in _hosts(hosts)]
        statuses, outputs = _run(commands, _environment(work, "plain", None), folder / "plain")
        if any(statuses):
            raise SystemExit(f"the run without a fault failed:\n{outputs[0][-3000:]}")
        (folder / "done").touch()
    result = _result(folder / "runs" / "run")
    if not all(result["figures"][n + 1]["actor/grad_norm"] > 0 for n in range(ITERATIONS)):
        raise SystemExit("the run without a fault learned nothing, so equal bits would say nothing")
    return result


def _show(result: dict[str, Any]) -> None:
    survived = "survived" if result["survived"] else "LOST"
    equal = "equal" if result["bit_equal"] else "DIFFERENT"
    print(
        f"{result['name']:28} {survived:9} {equal:10} after {result['detect_s']:5.1f} s, status "
        f"{result['statuses']}, resumed at {result.get('resumed_at', '-')}: {result['said']}",
        flush=True,
    )
    for line in [*result["orphans"], *result.get("why", "").splitlines()[-6:]]:
        print(f"    {line}", flush=True)


def _summary(results: list[dict[str, Any]], skipped: list[str]) -> None:
    for line in skipped:
        print(f"skipped: {line}")
    print(
        f"cases={len(results)} survived={sum(r['survived'] for r in results)} "
        f"bit_equal={sum(r['bit_equal'] for r in results)} "
        f"lost_iterations={sum(r['lost_iterations'] for r in results)} "
        f"worst_detect_s={max((r['detect_s'] for r in results), default=0.0):.1f} "
        f"orphans={sum(len(r['orphans']) for r in results)} skipped={len(skipped)}"
    )


if __name__ == "__main__":
    main()
