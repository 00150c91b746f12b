"""Options declared as dataclasses, their validators and help, and how a user's mistake is reported."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep.cli import (
    CaseOptions,
    InputOptions,
    at_least,
    between,
    build_parser,
    number,
    option,
    parse,
    part,
    run_cli,
    share,
)
from data_prep.files import write_json


@dataclass(frozen=True, kw_only=True)
class BakeOptions(CaseOptions):
    """Bake a cake.

    It is served warm.
    """

    dish: Path = option("where the cake goes", flags=("dish",), metavar="DISH")
    flour: str = option("kind of flour")
    minutes: int = option("time in the oven", default=40, type=at_least(1))
    heat: float = option("share of full heat", default=0.5, type=share)
    layers: tuple[int, ...] = option("eggs in each layer", default=(2, 3))
    shape: str = option("shape of the tin", default="round", choices=("round", "square"), group="tin")
    lid: bool = option("cover it", default=False, group="tin", one_of="cover")
    foil: bool = option("wrap it", default=False, group="tin", one_of="cover")
    served_by: str | None = option("who serves it", default=None, flags=("--served-by", "--served_by"))
    secret: str | None = option(None, default=None)


def bake(*argv):
    return parse(BakeOptions, "kitchen.bake", ["tin/", "--flour", "rye", *argv])


def test_annotations_decide_how_flags_are_read():
    assert bake() == BakeOptions(dish=Path("tin"), flour="rye")
    assert bake("--layers", "1", "--layers", "4", "5").layers == (1, 4, 5)
    assert bake("--served_by", "Ada", "--lid", "--minutes", "9") == BakeOptions(
        dish=Path("tin"), flour="rye", served_by="Ada", lid=True, minutes=9
    )
    assert [bake(*flag).cased for flag in ((), ("--cased",), ("--uncased",))] == [None, True, False]
    assert bake("--secret", "salt").secret == "salt"


def test_help_shows_what_is_required_first_and_the_defaults():
    text = build_parser(BakeOptions, "kitchen.bake").format_help()
    assert text.startswith("usage: python -m kitchen.bake DISH --flour FLOUR [options]\n\nBake a cake.\n\nIt is served")
    assert text.index("required:") < text.index("  --flour") < text.index("options:") < text.index("--help")
    assert text.index("--served-by") < text.index("--cased, --uncased") < text.index("tin:") < text.index("--lid")
    assert "--minutes N" in text and "time in the oven (default: 40)" in text and "(default: 2 3)" in text
    assert text.count("(default") == 4 and "--secret" not in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--minutes", "0"], "argument --minutes: 0 is below 1"),
        (["--minutes", "1.5"], "argument --minutes: '1.5' is not an integer"),
        (["--heat", "2"], "argument --heat: 2 is not between 0 and 1"),
        (["--lid", "--foil"], "argument --foil: not allowed with argument --lid"),
        (["--cased", "--uncased"], "argument --cased/--uncased: only one of the two may be given"),
        (["--shape", "oval"], r"argument --shape: invalid choice: 'oval' \(choose from"),
        (["--minute", "3"], "unrecognized arguments: --minute 3"),
    ],
)
def test_a_wrong_command_line_is_a_value_error(argv, message):
    with pytest.raises(ValueError, match=f"^{message}.*; `python -m kitchen.bake --help` lists the options$"):
        bake(*argv)
    with pytest.raises(ValueError, match="^the following arguments are required: DISH, --flour;"):
        parse(BakeOptions, "kitchen.bake", [])


@pytest.mark.parametrize(
    "read, text, rule",
    [
        (between(8, 65_535), "7", "7 is not between 8 and 65535"),
        (number(low=0), "-0.5", "-0.5 is below 0"),
        (number(high=8), "9", "9 is above 8"),
        (number(above=0, high=8), "0", "0 is not above 0"),
        (number(low=0.5, below=1), "1", "1 is not below 1"),
        (number(), "nan", "nan is not finite"),
        (number(), "many", "'many' is not a number"),
        (between(0, 9), "1" + 400 * "0", "10* is not between 0 and 9"),
        (part, "4/4", "'4/4' is not I/N with I from 0 to N-1"),
    ],
)
def test_validators_name_the_rule(read, text, rule):
    with pytest.raises(Exception, match=f"^{rule}"):
        read(text)
    assert (between(8, 9)("9"), number(low=0)("0"), number(above=0, below=1)("0.15")) == (9, 0, 0.15)
    assert part("3/4") == (3, 4)


def test_the_input_may_be_given_in_several_places():
    options = parse(InputOptions, "x", ["--input", "a", "b", "--format", "jsonl", "--input", "c"])
    assert options == InputOptions(input=("a", "b", "c"), format="jsonl", text_key="text")


def test_a_mistake_is_one_line_and_exit_code_2(capsys, tmp_path):
    def main(argv):
        raise ValueError("tp=3 does not divide 16 heads")

    with pytest.raises(SystemExit) as stop:
        run_cli(main, [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: tp=3 does not divide 16 heads\n"
    with pytest.raises(SystemExit):
        run_cli(lambda argv: (tmp_path / "absent").read_text(), [])
    assert capsys.readouterr().err == f"error: {tmp_path / 'absent'}: No such file or directory\n"


def test_names_that_are_not_text_are_refused_or_printed_as_escapes(capsys, tmp_path):
    latin = os.fsdecode(b"f\xfcr")
    (tmp_path / latin).touch()

    def main(argv):
        print(*(path.name for path in tmp_path.iterdir()))
        write_json(tmp_path / "run.json", {"input": [str(path) for path in tmp_path.iterdir()]})

    with pytest.raises(SystemExit) as stop:
        run_cli(main, ["--input", str(tmp_path / latin)])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out and not (tmp_path / "run.json").exists()
    assert printed.err.startswith(f"error: the argument b'{tmp_path}/f\\xfcr' is not text in utf-8")
    assert "LC_ALL" in printed.err
    with pytest.raises(SystemExit):
        run_cli(main, ["--input", "für"])
    printed = capsys.readouterr()
    assert printed.out == "f\\udcfcr\n" and not (tmp_path / "run.json").exists()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert f"{tmp_path}/f\\udcfcr" in printed.err


def test_our_own_bugs_keep_their_traceback():
    with pytest.raises(KeyError):
        run_cli(lambda argv: {}["bug"], [])
