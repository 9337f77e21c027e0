"""Commands of the pages parse: programs, options, settings, make targets. Nothing is run."""

import argparse
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import launch
from evac_jax.config.build import default_config
from evac_jax.config.fields import walk
from evac_jax.config.flags import DEFAULT_PRESET, read_preset
from tests import house
from tests.unit.docs.pages import (
    PAGES,
    blocks,
    commands,
    module_and_arguments,
    name,
    prose,
    spans,
)

FIELDS = {field.name for kind in ("grpo", "ppo") for field in walk(default_config(kind))}
SECTIONS = {field.rpartition(".")[0] for field in FIELDS} - {""}
# Programs that take no options.
PLAIN = {"evac_jax.config.reference", "tests.house", "tests.parity", "tests.integration.browser"}
KNOWN = argparse.ArgumentParser.parse_known_args


class ParsedError(Exception):
    """Ends a program as soon as its command line is parsed.

    Attributes:
        parser: of the program.
        rest: arguments that it does not know.
        strict: whether it would refuse them.
    """

    def __init__(self, parser, rest, strict: bool):
        super().__init__()
        self.parser, self.rest, self.strict = parser, rest, strict


@pytest.fixture
def parse(monkeypatch, capsys):
    """Return (module, arguments) -> ParsedError; arguments None = nothing is parsed."""
    wanted = []

    def parsing(*, strict: bool):
        def method(parser, args=None, namespace=None):
            rest = [] if wanted[-1] is None else KNOWN(parser, args, namespace)[1]
            raise ParsedError(parser, rest, strict)

        return method

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parsing(strict=False))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsing(strict=True))

    def parsed(module: str, arguments: list[str] | None) -> ParsedError:
        wanted.append(arguments)
        monkeypatch.setattr(sys, "argv", [module, *(arguments or ())])
        spec = importlib.util.find_spec(module)
        assert spec, f"no module {module}"
        package = spec.submodule_search_locations is not None
        main = importlib.import_module(f"{module}.__main__" if package else module).main
        try:
            main()
        except ParsedError as found:
            return found
        except SystemExit:
            pytest.fail(f"{sys.argv}\n{capsys.readouterr().err}")
        raise AssertionError(f"{module}: its main() parses no command line")

    return parsed


def check_launch(arguments: list[str]) -> None:
    """Check the flags of launch.py: names, choices, types of values."""
    preset, settings = DEFAULT_PRESET, []
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag == "--config":
            preset = value
        elif flag.startswith("--config."):
            # A world's folder is not there.
            settings += [argument] * (flag != "--config.world")
        elif flag != "--help":
            assert flag.startswith("--"), f"launch.py: unexpected {argument!r}"
            assert flag[2:] in ("mode", "export_dir"), f"launch.py: no flag {flag}"
            launch.flags.FLAGS[flag[2:]].parser.parse(value)
    read_preset(preset, settings)


@pytest.fixture
def files_of_the_page(tmp_path, monkeypatch):
    """Return page -> folder with the Python files that it writes; modules are found there."""

    def write(page: Path) -> Path:
        for code in blocks(page, "python"):
            if named := re.match(r"# (\w+\.py)\n", code):
                (tmp_path / named[1]).write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_of_blocks_parse(page, parse, monkeypatch, files_of_the_page):
    monkeypatch.chdir(house.ROOT)
    written = files_of_the_page(page)
    for words in commands(page):
        if words[0] == "make":
            continue
        module, arguments = module_and_arguments(words)
        for file in written.glob("*.py"):
            arguments = [
                word.replace(f"--config={file.name}", f"--config={file}") for word in arguments
            ]
        if module == "launch.py":
            check_launch(arguments)
        elif module in PLAIN:
            assert not [word for word in arguments if word.startswith("-")], words
        elif module:
            found = parse(module, arguments)
            settings = [word for word in found.rest if word.startswith("--config.")]
            assert found.rest == ([] if found.strict else settings), f"{module}: {found.rest}"
            check_launch(settings)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_of_commands_within_text_are_known(page, parse):
    for words in spans(page):
        module, arguments = module_and_arguments(words)
        if not module or module in PLAIN:
            continue
        options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        options = {option for option in options if not option.startswith("--config")}
        if module == "launch.py":
            assert options <= {"--mode", "--export_dir", "--help"}, words
        elif options:
            known = parse(module, None).parser._option_string_actions
            assert options <= set(known), f"{module}: {sorted(options - set(known))}"


@pytest.mark.parametrize("page", [*PAGES, house.ROOT / "Dockerfile"], ids=name)
def test_settings_exist(page):
    own = set(re.findall(r"^    (\w+): \w+ = ", page.read_text(), re.M))  # of an example's Config
    for setting in re.findall(r"--config\.([a-z]\w*(?:\.[a-z]\w*)*)", page.read_text()):
        known = setting in FIELDS | SECTIONS or setting.removeprefix("algo.") in own
        assert known, f"{page.name}: --config.{setting}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_settings_within_text_exist(page):
    """`section.field` is a setting, unless it is a tool, a file or a function of that name."""
    for span in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", prose(page)):
        section, _, field = span.partition(".")
        if section in SECTIONS and field != "py" and span not in FIELDS | SECTIONS:
            tool = house.ROOT / f"evac_jax/tools/{section}/{field}.py"
            module = house.ROOT / f"evac_jax/{section}.py"
            function = module.exists() and f"def {field}(" in module.read_text()
            assert tool.exists() or function, f"{page.name}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_and_variables_exist(page):
    makefile = (house.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for words in [*commands(page), *spans(page)]:
        if words[0] == "make":
            for word in words[1:]:
                variable, is_set, _ = word.partition("=")
                known = re.search(rf"\b{variable}\b", makefile) if is_set else word in targets
                assert known, f"{page.name}: make {word}"
