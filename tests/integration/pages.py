"""Runs the commands of a page as they stand there, at small sizes.

The commands are those of the blocks marked *bash*. `PY` stands for the interpreter, words in
capitals for folders that a user has or makes.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PLACEHOLDER = r"(?<![\w.])[A-Z][A-Z0-9_]{2,}\b"


@dataclass(frozen=True)
class Page:
    """A page whose commands are run.

    Attributes:
        file: of the page.
        small: {end of a tool's name, or launch.py: options that make the command small}. Of options
            that come twice, the last one holds. `{folder}` stands for the folder below.
    """

    file: Path
    small: Mapping[str, str]

    def blocks(self, language: str) -> list[str]:
        """Return the contents of the fenced blocks of one language, in their order."""
        return re.findall(rf"^```{language}\n(.*?)^```", self.file.read_text(), flags=re.M | re.S)

    def commands(self) -> list[list[str]]:
        """Return the words of every command."""
        text = "".join(self.blocks("bash")).replace("\\\n", " ")
        return [shlex.split(line, comments=True) for line in text.splitlines()]

    def name_of(self, command: list[str]) -> str:
        """Return the key of `small` for a command."""
        tool = command[1] if command[1] == "launch.py" else command[2]
        return next(name for name in self.small if tool.endswith(f".{name}") or tool == name)

    def arguments(self, command: list[str], folder: Path) -> list[str]:
        """Return a command for this machine, small, with its folders below `folder`."""

        def placed(word: str) -> str:
            word = re.sub(PLACEHOLDER, lambda found: f"{folder}/{found[0].lower()}", word)
            word = re.sub(r"(?<![\w/])runs/", f"{folder}/runs/", word)
            flag, equals, file = word.rpartition("=")
            return f"{flag}{equals}{folder / file}" if (folder / file).is_file() else word

        assert command[0] == "PY", command
        small = self.small[self.name_of(command)].format(folder=folder).split()
        return [sys.executable, *map(placed, command[1:]), *small]

    def run(self, command: list[str], folder: Path, repository: Path) -> str:
        """Run a command in the checkout and return what it printed; `folder` may hold modules."""
        done = subprocess.run(
            self.arguments(command, folder),
            cwd=repository,
            env=environment(folder),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        told = f"{shlex.join(command)}\n{done.stdout}\n{done.stderr[-4000:]}"
        assert done.returncode == 0, told
        return done.stdout


def environment(folder: Path) -> dict[str, str]:
    """Return variables of a process on one device that also finds modules in `folder`."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(folder)}
