"""What LIBERO's `.bddl` files say of a task: its things, how they begin, and what is wanted.

Standard library only; nothing of LIBERO is imported.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from evac_jax.errors import DataError

Predicate = tuple[str, ...]  # ("on", "akita_black_bowl_1", "plate_1")


@dataclass(frozen=True)
class Problem:
    """One task.

    Attributes:
        bodies: names of the movable things and of the fixtures.
        initial: what holds when an episode begins; predicates in lower case.
        goal: what must hold at its end, all of it.
    """

    bodies: tuple[str, ...]
    initial: tuple[Predicate, ...]
    goal: tuple[Predicate, ...]


def kind_of(name: str) -> str:
    """Return a thing's name without its number: "basket_1_contain_region" is of another kind than
    "basket_1", and of the same as "basket_2_contain_region".
    """  # noqa: D205
    return re.sub(r"_\d+(?=_|$)", "", name)


def read_problem(path: Path) -> Problem:
    """Return the task that a `.bddl` file describes.

    Raises:
        DataError: the file is missing, or it is no such description.
    """
    try:
        text = re.sub(r";.*", "", path.read_text()).lower()
        tree = _nested(iter(re.findall(r"[()]|[^\s()]+", text)))[0]
        parts = {part[0]: part[1:] for part in tree[1:] if isinstance(part[0], str)}
        goal = parts[":goal"][0]
        goals = goal[1:] if goal[0] == "and" else [goal]
        return Problem(
            bodies=(*_names(parts[":objects"]), *_names(parts.get(":fixtures", []))),
            initial=_predicates(parts[":init"]),
            goal=_predicates(goals),
        )
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: expected a task's description in BDDL ({error!r}); bddl_files lies below "
            "config.libero.root"
        ) from error


def followed(problem: Problem) -> tuple[str, str, str]:
    """Return what a goal moves, where it belongs, and another thing that looks alike; "" for none.

    The first goal of the form "a on b" or "a in b" counts.
    """
    goals = (goal for goal in problem.goal if goal[0] in ("on", "in") and len(goal) == 3)
    taken, place = next(((a, b) for _, a, b in goals), ("", ""))
    others = (body for body in problem.bodies if body != taken and kind_of(body) == kind_of(taken))
    return taken, place, next(others, "")


def _nested(tokens) -> list:
    """Return tokens up to the closing bracket; what is in brackets becomes a list."""
    result = []
    for token in tokens:
        if token == ")":
            break
        result.append(_nested(tokens) if token == "(" else token)
    return result


def _names(words: list[str]) -> list[str]:
    """Return a, b, c of "a b - kind c - kind"."""
    after = ["", *words]
    return [w for w, before in zip(words, after, strict=False) if "-" not in (w, before)]


def _predicates(found: list[list[str]]) -> tuple[Predicate, ...]:
    if not all(isinstance(word, str) for predicate in found for word in predicate):
        raise ValueError("a predicate within another one")
    return tuple(tuple(predicate) for predicate in found)
