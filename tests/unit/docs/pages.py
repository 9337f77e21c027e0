"""The pages, their code blocks, and the commands in them."""

import re
import shlex
from pathlib import Path

from tests import house

PAGES = [*house.ROOT.glob("*.md"), *house.ROOT.glob("docs/**/*.md")]
# Commands of others.
FOREIGN = {"pip", "pytest", "venv", "http.server"}
PROGRAMS = r"(PY|\$PY|python3?|\.venv/bin/(python|torchrun)|make|CHECKOUT/\.venv/bin/python)"
LINE = re.compile(rf"(\w+=\S+ )*{PROGRAMS} ")
LEFT_OUT = {"...", "..", "FLAGS"}  # stand for more arguments
ENDS = {"|", ">", "&&", ";"}  # of a command; what follows is another program or a file


def name(page: Path) -> str:
    """Return the name of a page for a test."""
    return str(page.relative_to(house.ROOT))


def blocks(page: Path, language: str = r"\w*") -> list[str]:
    """Return the fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def prose(page: Path) -> str:
    """Return what is not in fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def words_of(line: str) -> list[str]:
    """Return the words of a command; [] if the line calls no program that is known here."""
    if not LINE.match(line):
        return []
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words = words[1:]
    end = next((i for i, word in enumerate(words) if word in ENDS), len(words))
    return [word for word in words[:end] if word not in LEFT_OUT]


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command in the fenced or indented blocks of a page."""
    indented = re.findall(r"^    .*$", prose(page), flags=re.M)
    text = "\n".join((*blocks(page), *indented)).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := words_of(line.strip()))]


def spans(page: Path) -> list[list[str]]:
    """Return the words of the commands within the text of a page, `so`; they may be incomplete."""
    found = re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))
    return [words for span in found if (words := words_of(" ".join(span.split())))]


def module_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """Return what a command's interpreter runs, "launch.py" or a module, and its arguments.

    ("", []) where it is code of others.
    """
    if "-m" in words[:-1]:
        words = [word for word in words if word != "--"]  # torchrun's end of options
        place = words.index("-m")
        module, arguments = words[place + 1], words[place + 2 :]
        return ("", []) if module in FOREIGN else (module, arguments)
    return ("launch.py", words[2:]) if words[1:2] == ["launch.py"] else ("", [])
