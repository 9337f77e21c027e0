"""What the hosts of a run tell each other beside their devices: settings, waits, when to stop.

All of it goes through JAX's coordination service on host 0, so no device has to be free. Every wait
has a time limit. One host: nothing is asked, nothing waits.
"""

import contextlib
import itertools
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the client of the service has no public name

from evac_jax.config.addresses import FROM_HUB
from evac_jax.config.build import to_dict
from evac_jax.config.paths import RUN_PATHS, WORLD, with_absolute
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError, HostError

WAIT_S = 900.0  # hosts may be minutes apart: they compile, read weights and start simulators
SHARED_S = 30.0  # until a file that one host made is seen by the others
POLL_S = 0.5
OWN_FIELDS = ("cluster.node",)  # what may differ from host to host
SHARED = ("log.dir", "checkpoint.dir")  # folders that must be the same on all of them
T = TypeVar("T")
_numbers = itertools.count()  # every name is used once; hosts make the same calls in one order


def _client() -> Any:
    return distributed.global_state.client


def wait_for_all(what: str, timeout_s: float = WAIT_S) -> None:
    """Wait until every host's trainer has made this call.

    Raises:
        HostError: one has not within `timeout_s`.
    """
    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier(f"evac_jax/{next(_numbers)}", int(timeout_s * 1e3))
    except Exception as error:  # of JAX's runtime; its types are private
        raise HostError(
            f"host {jax.process_index()} waited for the others at {what!r}, and not all came "
            f"within {timeout_s:g} s: {error}"
        ) from error


def tell_all(what: str, text: str, timeout_s: float = WAIT_S) -> list[str]:
    """Return what every host says in this call, by host.

    Raises:
        HostError: one says nothing within `timeout_s`.
    """
    if jax.process_count() == 1:
        return [text]
    name = f"evac_jax/{next(_numbers)}"
    _client().key_value_set(f"{name}/{jax.process_index()}", text)
    said = []
    for host in range(jax.process_count()):
        try:
            said.append(_client().blocking_key_value_get(f"{name}/{host}", int(timeout_s * 1e3)))
        except Exception as error:
            raise HostError(
                f"host {host} did not tell the others its {what} within {timeout_s:g} s: {error}"
            ) from error
    return said


def compare(what: str, value: object) -> None:
    """Make sure that every host's trainer has the same value; all of them make this call.

    Args:
        what: it is, for the message.
        value: with a `repr` that tells all of it.

    Raises:
        HostError: it differs, so what one host says in numbers would mean another thing to others.
    """
    said = tell_all(what, repr(value))
    if odd := [host for host, other in enumerate(said) if other != said[0]]:
        raise HostError(
            f"{what} of hosts {odd} are not those of host 0, which are {said[0]}; "
            f"host {odd[0]} has {said[odd[0]]}. Give every host the same files and settings"
        )


def all_or_none(what: str, work: Callable[[], T]) -> T:
    """Return what `work` returns where it fails on no host; all of them make this call.

    Else all fail at once. A host that ended alone would leave the others waiting for it.

    Args:
        what: is done, for the message.
        work: tells the others nothing itself.

    Raises:
        HostError: it failed on another host; where it failed its own error is raised.
    """
    try:
        result = work()
    except Exception as error:
        tell_all(what, f"{type(error).__name__}: {error}")
        raise
    for host, failure in enumerate(tell_all(what, "")):
        if failure:
            raise HostError(f"{what} failed on host {host}: {failure}")
    return result


def check_same(config: TrainConfig) -> None:
    """Refuse hosts with other settings, or whose `SHARED` folders are not one folder each.

    Paths of what is read are compared as absolute ones: a relative one means another file in
    another folder.

    Raises:
        ConfigError: names every field that differs, with the value of each host; or the hosts that
            do not see a file in such a folder that host 0 made.
    """
    if jax.process_count() == 1:
        return
    own = _flat(to_dict(with_absolute(config, (*RUN_PATHS, *FROM_HUB, WORLD))))
    told = [json.loads(text) for text in tell_all("settings", json.dumps(own))]
    differing = [
        f"config.{name}: {[values.get(name) for values in told]}"
        for name in told[0]
        if name not in OWN_FIELDS and any(v.get(name) != told[0][name] for v in told)
    ]
    if differing:
        raise ConfigError(
            "the hosts of a run need the same settings; by host, 0 first, they have\n  "
            + "\n  ".join(differing)
        )
    for name in SHARED:
        if own[name]:
            _check_shared(name, Path(own[name]))


def _check_shared(name: str, folder: Path) -> None:
    token = tell_all("mark", secrets.token_hex(8))[0]
    mark = folder / f".hosts-{token}"

    def make() -> None:
        if jax.process_index() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                mark.touch()
            except OSError as error:
                raise ConfigError(f"config.{name}: cannot be written to: {error}") from error

    all_or_none(f"writing to {name}", make)
    deadline = time.monotonic() + SHARED_S
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    sees = tell_all(f"view of {name}", str(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if blind := [host for host, seen in enumerate(sees) if seen != "True"]:
        raise ConfigError(
            f"config.{name}: {str(folder)!r} must be one folder that all hosts share; hosts "
            f"{blind} do not see what host 0 wrote there"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"section.field": value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class StopTogether:
    """Finds the place at which all hosts stop, although a signal reached one, at any time.

    Hosts compute every step together, so all must stop at the same one. Each counts the places that
    it passes. When one asks for a stop, every host tells, from a thread, how many it has passed,
    and passes none until it knows the others' numbers. The place after the highest is where all
    stop: no host can be beyond it.

    Args:
        begun: called with the signal's number on every host once a stop is asked for.
        lost: called with a message when a host has not been heard of for `LOST_S`.
    """

    LOST_S = 40.0  # before JAX's own watch, which ends a process without saying how to go on

    def __init__(self, begun: Callable[[int], None], lost: Callable[[str], None]):
        self._begun, self._lost = begun, lost
        self._passed, self._stop_at = 0, None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._name = f"evac_jax/stop/{next(_numbers)}"
        self._heard = {host: ("", time.monotonic()) for host in range(jax.process_count())}
        for work in (self._watch, self._guard):
            threading.Thread(target=work, daemon=True).start()

    def ask(self, number: int) -> None:
        """Tell all hosts to stop, for the signal `number`."""
        with contextlib.suppress(Exception):  # another host was faster
            _client().key_value_set(f"{self._name}/asked", str(number))

    def is_here(self) -> bool:
        """Whether all hosts stop at this place; every host asks at the same places."""
        with self._lock:
            self._passed += 1
            return self._stop_at is not None and self._passed >= self._stop_at

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _watch(self) -> None:
        asked = ""
        while not self._closed.wait(POLL_S):
            with contextlib.suppress(Exception):  # what fails shows in what is heard no more
                self._listen()
                if not asked:
                    asked = _client().key_value_try_get(f"{self._name}/asked")
                    self._agree(int(asked))

    def _agree(self, number: int) -> None:
        self._begun(number)
        with self._lock:
            own = f"{self._name}/passed/{jax.process_index()}"
            _client().key_value_set(own, str(self._passed))
            passed = [
                int(_client().blocking_key_value_get(f"{self._name}/passed/{host}", 10_000))
                for host in range(jax.process_count())
            ]
            self._stop_at = max(passed) + 1

    def _listen(self) -> None:
        """Note every host that has shown a new sign of life since."""
        own = f"{self._name}/alive/{jax.process_index()}"
        _client().key_value_set(own, f"{os.getpid()} {time.time()}", allow_overwrite=True)
        for name, sign in _client().key_value_dir_get(f"{self._name}/alive"):
            host = int(name.rpartition("/")[2])
            if sign != self._heard[host][0]:
                self._heard[host] = sign, time.monotonic()

    def _guard(self) -> None:
        """A thread of its own: where host 0 is stuck, the other one waits for its answer."""
        while not self._closed.wait(POLL_S):
            for host, (sign, when) in list(self._heard.items()):
                if sign and host != jax.process_index() and time.monotonic() - when > self.LOST_S:
                    self._lost(f"host {host} has not been heard of for {self.LOST_S:g} s")
                    return
