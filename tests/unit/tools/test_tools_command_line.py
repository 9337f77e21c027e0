import argparse
import ast
import re

import pytest

from evac_jax.errors import DataError, StorageError
from evac_jax.tools.command_line import KINDS, Parser, refuse_existing, run_tool
from tests import house

TOOLS = [
    file
    for file in house.python_files("evac_jax/tools")
    if 'if __name__ == "__main__":' in (house.ROOT / file).read_text()
]
DOC = r"""Does something.

    python -m evac_jax.tools.noun.verb \
        --out DIR
"""


def _help() -> str:
    parser = Parser("noun.verb", DOC)
    parser.add_argument("--out", required=True)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--which", type=int, nargs="+", default=[0, 1], help="held-out ones")
    parser.add_argument("--mix", default="half=50%", help="shares")
    parser.add_argument("--few", action="store_true", help="do less")
    parser.add_argument("--config", help="file; left out, the usual one")
    parser.add_argument("--hidden", default=3, help=argparse.SUPPRESS)
    parser.add_argument_group("more").add_argument("--chunk", type=int, default=8, help="actions")
    parser.add_image_size()
    return parser.format_help()


def test_help_keeps_the_layout_and_names_the_command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = _help()
    assert text.startswith("usage: python -m evac_jax.tools.noun.verb ")
    assert DOC.strip() in text


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--lr", "(default: 0.001)"),
        ("--which", "held-out ones (default: 0 1)"),
        ("--mix", "shares (default: half=50%)"),
        ("--chunk", "actions (default: 8)"),
        ("--image_size", "pixels per side; 0 = as they are (default: 0)"),
        ("--out", ""),
        ("--few", "do less"),
        ("--config", "file; left out, the usual one"),
        ("--help", "show this help message and exit"),
    ],
)
def test_help_states_a_default_when_there_is_one(monkeypatch, option, told):
    monkeypatch.setenv("COLUMNS", "100")
    lines = " ".join(_help().split("options:")[1].split())
    found = re.search(rf"{option}(?: [A-Z_]+(?: \[[A-Z_ .]+\])?)?(.*?)(?= --| more:|$)", lines)
    assert found is not None
    assert found[1].strip() == told
    assert "hidden" not in lines


@pytest.mark.parametrize(
    ("count", "known", "unknown"),
    [
        (0, ["cpu"], ["cuda", "cuda:0", "gpu"]),
        (2, ["cuda", "cpu", "cuda:0", "cuda:1"], ["cuda:2", "cuda:01", "gpu"]),
    ],
)
def test_device_is_refused_when_pytorch_has_none_of_this_name(
    monkeypatch, capsys, count, known, unknown
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    parser = Parser("noun", None)
    parser.add_device()
    assert parser.parse_args([]).device == known[0]
    assert [parser.parse_args(["--device", name]).device for name in known] == known
    for name in unknown:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(["--device", name])
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert f"argument --device: expected one of cpu{', cuda' * (count > 0)}" in told
        assert re.search(rf"got '{name}'; PyTorch \S+ sees {count} CUDA devices\n", told)


@pytest.mark.parametrize("error", [DataError("no pose"), OSError(28, "No space left", "out")])
def test_users_mistake_ends_a_tool_with_one_message_and_status_2(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_tool(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"\n{type(error).__name__}: {error}\n"


def test_every_tool_is_named_by_its_module_and_spells_options_alike():
    assert len(TOOLS) > 15
    shared = {"--device", "--threads", "--seed", "--image_size"}
    for file in house.python_files("evac_jax/tools"):
        if file == "evac_jax/tools/command_line.py":
            continue
        calls = [node for node in house.nodes(file) if isinstance(node, ast.Call)]
        texts = [c.args[0].value for c in calls if c.args and isinstance(c.args[0], ast.Constant)]
        options = {text for text in texts if re.fullmatch(r"--[\w-]+", str(text))}
        assert not {option for option in options if "-" in option[2:]}, file
        assert not options & shared, f"{file}: use the method of Parser"
        assert "ArgumentParser" not in {getattr(c.func, "attr", "") for c in calls}, file
        if file in TOOLS:
            assert "    run_tool(main)\n" in (house.ROOT / file).read_text(), file
            tool = house.module_of(file).removeprefix("evac_jax.tools.").removesuffix(".__main__")
            source = (house.ROOT / file).read_text()
            if file.endswith("world_model/train.py"):
                source = (house.ROOT / file).with_name("options.py").read_text()
            assert tool in texts or f'"{tool}"' in source, f"{file}: its parser is not named {tool}"


def test_paths_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser("noun.verb", DOC)
    parser.add_argument("--out")
    parser.add_argument("--mix")
    parser.add_argument("folders", nargs="*")
    args = parser.parse_args(["--out=~/a,~/b", "--mix", "a~/b=c~", "~/c", "x=~"])
    assert (args.out, args.mix) == ("/home/me/a,/home/me/b", "a~/b=c~")
    assert args.folders == ["/home/me/c", "x=~"]


NUMBERS = {
    "count": (["1", "40"], ["0", "-1", "1.5", "x", "nan"]),
    "natural": (["0", "40"], ["-1", "1e3", "inf"]),
    "positive": (["1e-3", "2"], ["0", "-1", "nan", "inf", ""]),
    "not_negative": (["0", "0.5"], ["-0.1", "nan", "1e999"]),
    "share": (["0", "1"], ["1.01", "nan"]),
    "share_above_0": (["1"], ["0", "-inf"]),
    "share_below_1": (["0"], ["1"]),
    "dropout": (["0.25"], ["0.3"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_number_outside_of_its_range_or_not_finite_is_refused_by_name(kind, capsys):
    parser = Parser("noun.verb", DOC)
    parser.add_argument_group("more").add_argument("--number", type=kind)
    good, bad = NUMBERS[kind]
    assert [parser.parse_args([f"--number={text}"]).number for text in good] == [
        float(text) for text in good
    ]
    for text in bad:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([f"--number={text}"])
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert re.search(rf"argument --number: expected a (whole|finite) .*, got '{text}'\n", told)


@pytest.mark.parametrize("flag", ["--seed=-1", "--seed=99999999999", "--threads=0"])
def test_shared_numbers_have_bounds(flag):
    parser = Parser("noun.verb", DOC)
    parser.add_seed("all")
    parser.add_threads()
    with pytest.raises(SystemExit):
        parser.parse_args([flag])


def test_every_number_of_tools_and_benchmarks_has_bounds():
    # world.pack's are checked against the card's fields; hub and runs check their own.
    elsewhere = ("world/options.py", "hub/", "runs/")
    for file in (*house.python_files("evac_jax/tools"), *house.python_files("benchmarks")):
        if any(part in file for part in elsewhere):
            continue
        types = [
            keyword.value.id
            for node in house.nodes(file)
            if isinstance(node, ast.Call)
            for keyword in node.keywords
            if keyword.arg == "type" and isinstance(keyword.value, ast.Name)
        ]
        assert not {"int", "float"} & set(types), f"{file}: use a kind of command_line.KINDS"


def test_output_that_exists_is_refused_whether_file_or_folder(tmp_path):
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(DataError, match="--out: .* exists; choose another folder or remove it"):
        refuse_existing(tmp_path)
    with pytest.raises(DataError, match="card.json exists; choose another file or remove it"):
        refuse_existing(str(tmp_path / "card.json"))
    refuse_existing(tmp_path / "new")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="link exists; choose another file or remove it"):
        refuse_existing(tmp_path / "link")


def test_output_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file' is a file, .*; choose another --out"):
        refuse_existing(tmp_path / "file" / "x" / "out")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may do all
    with pytest.raises(StorageError, match="cannot be written to; choose another --out"):
        refuse_existing(tmp_path / "new" / "out")
