"""Command lines from dataclasses."""

from dataclasses import dataclass

import pytest

from metamerge.errors import ConfigError
from zoo.options import parse


@dataclass(frozen=True)
class Everything:
    """Do a thing or two.

    At length, to 100 %.
    """

    name: str  # what it is called
    count: int = 3  # how many
    rate: float = 1e-3  # how fast, in % of a lot
    careful: bool = True  # whether to look first
    loud: bool = False  # whether to shout
    train_sizes: tuple[int, ...] = (2, 4)  # sizes of the parts
    tags: tuple[str, ...] = ()  # words
    limit: int | None = None  # stop after so many
    folder: str | None = None  # where it lies
    steps: tuple[int, ...] | None = None  # at these steps
    fast: bool | None = None  # whether to hurry; decides by itself if not given
    bare: int = 1

    def __post_init__(self):
        if self.count < 0:
            raise ConfigError(f"count: expected 0 or more, got {self.count}.")


DEFAULTS = Everything("x")


def read(line):
    return parse(Everything, line.split(), prog="thing")


def refused(line, capsys):
    """What is said on a command line that is refused with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        read(line)
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


def test_what_is_not_given_is_the_default():
    assert read("--name x") == DEFAULTS


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("--count 7", "count", 7),
        ("--count=7", "count", 7),
        ("--rate 1", "rate", 1.0),
        ("--rate 2.5e-4", "rate", 2.5e-4),
        ("--no-careful", "careful", False),
        ("--careful", "careful", True),
        ("--loud", "loud", True),
        ("--train-sizes 5", "train_sizes", (5,)),
        ("--train-sizes 5 6 7", "train_sizes", (5, 6, 7)),
        ("--train-sizes -5", "train_sizes", (-5,)),
        ("--tags a b", "tags", ("a", "b")),
        ("--limit 10", "limit", 10),
        ("--folder there", "folder", "there"),
        ("--steps 1 2", "steps", (1, 2)),
        ("--fast", "fast", True),
        ("--no-fast", "fast", False),
        ("--bare 4", "bare", 4),
    ],
)
def test_a_value_is_read_as_its_type(line, field, value):
    options = read(f"--name x {line}")
    found = getattr(options, field)
    assert found == value
    assert type(found) is type(value)
    others = set(vars(options).items()) - {(field, value)}
    assert others == set(vars(DEFAULTS).items()) - {(field, getattr(DEFAULTS, field))}


def test_the_command_line_of_the_process_is_read_by_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["thing.py", "--name", "y"])
    assert parse(Everything, prog="thing").name == "y"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--nmae x --name x", "unknown option '--nmae'. Did you mean --name?"),
        ("--name x --train_sizes 5", "unknown option '--train_sizes'. Did you mean --train-sizes?"),
        ("--name x --cout=5", "unknown option '--cout=5'. Did you mean --count?"),
        ("--name x --cou 5", "unknown option '--cou'. Did you mean --count?"),
        ("--name x stray", "unknown option 'stray'. See --help"),
        ("--name x --xyzzy", "unknown option '--xyzzy'. See --help"),
    ],
)
def test_an_unknown_option_is_refused_with_a_suggestion(line, told, capsys):
    assert told in refused(line, capsys)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "required: --name"),
        ("--name", "argument --name: expected one argument"),
        ("--name x --count 1.5", "argument --count: invalid int value: '1.5'"),
        ("--name x --count", "argument --count: expected one argument"),
        ("--name x --rate fast", "argument --rate: invalid float value: 'fast'"),
        ("--name x --train-sizes", "argument --train-sizes: expected at least one argument"),
        ("--name x --train-sizes 1 b", "argument --train-sizes: invalid int value: 'b'"),
        ("--name x --careful=no", "argument --careful/--no-careful"),
        ("--name x --limit None", "argument --limit: invalid int value: 'None'"),
    ],
)
def test_a_bad_value_is_refused(line, told, capsys):
    assert told in refused(line, capsys)


def test_what_the_dataclass_refuses_is_told_without_a_traceback(capsys):
    told = refused("--name x --count -1", capsys)
    assert told.endswith("thing: error: count: expected 0 or more, got -1.\n")


def test_the_help_is_made_of_docstring_comments_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        read("--help")
    assert stopped.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for piece in (
        "usage: thing",
        "Do a thing or two. At length, to 100 %.",
        "--name NAME what it is called --count",  # needed, so it has no default
        "--count COUNT how many (default: 3)",
        "how fast, in % of a lot (default: 0.001)",
        "--careful, --no-careful whether to look first (default: True) --loud",
        "sizes of the parts (default: 2 4)",
        "words (default: none)",
        "stop after so many (default: None)",
        "--bare BARE (default: 1)",
    ):
        assert piece in told


def test_every_script_s_options_carry_a_comment():
    from evaluation.compare import CompareOptions
    from trainers.merger import MergerOptions
    from zoo.build import ZooOptions
    from zoo.options import _comments

    for kind in (CompareOptions, MergerOptions, ZooOptions):
        assert set(_comments(kind)) == set(kind.__dataclass_fields__), kind
