"""Shared by all commands: options that are declared once, and one way to report a user's mistake.

A command declares its options as a frozen dataclass and parses them in `main`. It first checks all of its input, then
claims its output folder, and then does its work:

    @dataclass(frozen=True, kw_only=True)
    class CountOptions:
        '''Count the tokens of a corpus.'''  # --help opens with this

        corpus: Path = option("folder made by data_prep.corpus", metavar="DIR")
        workers: int = option("number of processes", default=1, type=at_least(1))

    def main(argv: list[str] | None = None) -> None:
        options = parse(CountOptions, "data_prep.count", argv)
        ...  # every check of the input raises ValueError here

    if __name__ == "__main__":
        run_cli(main)
"""

import argparse
import dataclasses
import functools
import inspect
import math
import os
import re
import sys
import typing
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Options = TypeVar("Options")
REQUIRED, OPTIONAL = "required", "options"
METAVARS = {int: "N", float: "X", Path: "PATH"}


def option(help: str | None, *, default: Any = dataclasses.MISSING, **settings: Any) -> Any:
    """A field of an options class: the field `seq_length` is the flag --seq-length.

    The annotation decides how a flag is read. A `bool` is a switch, off by default. A `bool | None` is a pair of
    switches, `flags=("--yes", "--no")`. A `tuple[X, ...]` takes several values, and repeating the flag adds to them.
    Any other flag takes one value. A flag without a default is required.

    Args:
        help: what --help prints, followed by the default; None hides the flag
        group: the heading under which --help lists the flag
        one_of: a name; at most one of the flags that share it may be given
        flags: names on the command line that replace the field's name; a name without hyphens is positional
        settings: anything else that argparse's `add_argument` takes: `type` (also to check the value), `choices`,
            `metavar`, `nargs`, `const`
    """
    return dataclasses.field(default=default, metadata={"help": help, **settings})


def parse(options: type[Options], command: str, argv: list[str] | None) -> Options:
    """The command line `argv` of `python -m command` as an instance of `options`. Raises ValueError if it is wrong."""
    values = vars(build_parser(options, command).parse_args(argv))
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def build_parser(options: type, command: str) -> argparse.ArgumentParser:
    """The parser behind `parse`. It sets only the fields that are given; the dataclass has the defaults."""
    parser = _Parser(
        prog=f"python -m {command}",
        description=inspect.getdoc(options),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    groups: dict[str, Any] = {name: parser.add_argument_group(name) for name in (REQUIRED, OPTIONAL)}
    groups[OPTIONAL].add_argument("-h", "--help", action="help", help="show this message and exit")
    types = typing.get_type_hints(options)
    usage = [parser.prog]
    for field in sorted(dataclasses.fields(options), key=functools.partial(_depth, options)):
        is_required = field.default is dataclasses.MISSING
        settings = _settings_by_type(types[field.name], "choices" in field.metadata) | field.metadata | _help(field)
        flags = settings.pop("flags", _default_flags(field))
        is_flag = flags[0].startswith("-")
        group = settings.pop("group", REQUIRED if is_required else OPTIONAL)
        one_of = settings.pop("one_of", "")
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if one_of and one_of not in groups:
            groups[one_of] = groups[group].add_mutually_exclusive_group()
        if is_flag:
            settings |= {"dest": field.name, "required": is_required}
        action = groups[one_of or group].add_argument(*flags, **settings)
        if is_required:
            values = action.metavar or action.dest.upper()
            usage += [flags[0], values] if is_flag else [values]
    parser.usage = " ".join([*usage, "[options]"])
    return parser


def command_line(options: Any) -> list[str]:
    """The inverse of `parse`: the command line, as words, that gives these options. Defaults are left out."""
    words = []
    for field in dataclasses.fields(options):
        value, flags = getattr(options, field.name), field.metadata.get("flags", _default_flags(field))
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flags[0] if value else flags[1])
        elif isinstance(value, tuple):
            words += [flags[0], *map(str, value)]
        else:
            words.append(f"{flags[0]}={value}")
    return words


def _default_flags(field: dataclasses.Field) -> tuple[str]:
    return ("--" + field.name.replace("_", "-"),)


def _depth(options: type, field: dataclasses.Field) -> int:
    """The index in the MRO of the class that declares a field, so that a class's own fields precede inherited ones."""
    return next(i for i, base in enumerate(options.__mro__) if field.name in vars(base).get("__annotations__", {}))


def _settings_by_type(annotation: Any, has_choices: bool) -> dict[str, Any]:
    """The argparse settings that follow from an option's annotation."""
    if annotation is bool:
        return {"action": "store_true"}
    if annotation == bool | None:
        return {"action": _YesOrNo, "nargs": 0}
    if typing.get_origin(annotation) is tuple and annotation.__args__[-1] is Ellipsis:
        return {"action": "extend", "nargs": "+", "type": annotation.__args__[0]}
    inner = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)]
    return {"type": inner[0], "metavar": None if has_choices else METAVARS.get(inner[0])}


def _help(field: dataclasses.Field) -> dict[str, str]:
    """The help text of an option, followed by its default unless that is None, False or empty."""
    text, default = field.metadata["help"], field.default
    if text is None:
        return {"help": argparse.SUPPRESS}
    if default is dataclasses.MISSING or default is None or default is False or default in ("", ()):
        return {"help": text}
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return {"help": f"{text} (default: {shown:g})" if isinstance(shown, float) else f"{text} (default: {shown})"}


class _YesOrNo(argparse.Action):
    """A pair of flags: the first one sets the field to True and the second one to False. They exclude each other."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        chosen = option_string == self.option_strings[0]
        if getattr(namespace, self.dest, chosen) != chosen:
            raise argparse.ArgumentError(self, "only one of the two may be given")
        setattr(namespace, self.dest, chosen)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other wrong input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `{self.prog} --help` lists the options")


def at_least(minimum: int) -> Callable[[str], int]:
    """A `type` of an option: an integer that is not below `minimum`."""
    return _reader(int, "an integer", minimum, math.inf)


def between(low: int, high: int) -> Callable[[str], int]:
    """A `type` of an option: an integer from `low` to `high`."""
    return _reader(int, "an integer", low, high)


def number(
    above: float = -math.inf, low: float = -math.inf, high: float = math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """A `type` of an option: a finite number from `low` to `high`, greater than `above` and less than `below`."""
    return _reader(float, "a number", low, high, above, below)


def _reader(
    kind: type, noun: str, low: float, high: float, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], Any]:
    both = f"is not between {low} and {high}" if math.isfinite(low) and math.isfinite(high) else ""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}") from None
        for is_wrong, rule in (
            (kind is float and not math.isfinite(value), "is not finite"),
            (value < low, both or f"is below {low}"),
            (value > high, both or f"is above {high}"),
            (value <= above, f"is not above {above}"),
            (value >= below, f"is not below {below}"),
        ):
            if is_wrong:
                raise argparse.ArgumentTypeError(f"{text} {rule}")
        return value

    return read


share = number(low=0, high=1)


def matching(pattern: str, description: str) -> Callable[[str], str]:
    """A `type` of an option: a text that the regular expression `pattern` matches as a whole."""

    def matched(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return text

    return matched


def part(text: str) -> tuple[int, int]:
    """A `type` of an option: "I/N", part I of N, counted from 0."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1, as in 0/4, 1/4, 2/4, 3/4")
    return int(index), int(count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputOptions:
    """The text that a command reads. `data_prep.text.documents` finds and reads the files."""

    input: tuple[str, ...] = option("text files, and folders of them", metavar="PATH")
    format: str = option(
        "text: a file is a document; jsonl: a line is one; wikitext: ' = Title = ' starts one; sentences: one sentence "
        "per line, a blank line between documents; mediawiki: an XML dump; html: a file is a document; auto: by file "
        "name and first line, never sentences",
        default="auto",
        choices=("auto", "text", "jsonl", "wikitext", "sentences", "mediawiki", "html"),
    )
    text_key: str = option("the key of a jsonl object that holds the text", default="text", metavar="KEY")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseOptions:
    """Whether a vocab.txt is cased. The other kinds of vocabularies say so themselves."""

    cased: bool | None = option(
        "whether a vocab.txt distinguishes capital letters from small ones; by default tokenizer_config.json beside it "
        "decides, and without that file it is guessed, with a warning",
        default=None,
        flags=("--cased", "--uncased"),
    )


def run_cli(main: Callable[[list[str] | None], object], argv: list[str] | None = None) -> None:
    """Call `main(argv)`. A ValueError or OSError becomes `error: message` on stderr and exit code 2, without traceback.

    `python -X dev -m ...` shows the traceback. Arguments must be decodable text, because paths are written to JSON
    files. Characters that the terminal's encoding lacks are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        for argument in sys.argv[1:] if argv is None else argv:
            if argument.encode(errors="ignore").decode() != argument:  # bytes that could not be decoded (PEP 383)
                raise ValueError(
                    f"the argument {os.fsencode(argument)!r} is not text in {sys.getfilesystemencoding()}, the "
                    "encoding of this locale; rename the file or folder, or set a UTF-8 locale, as in LC_ALL=C.UTF-8"
                )
        main(argv)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {describe_error(error)}", file=sys.stderr)
        sys.exit(2)


def describe_error(error: Exception) -> str:
    """One line for the user. An operating-system error reads `file: reason`, without its errno."""
    if isinstance(error, UnicodeEncodeError):
        near = error.object[max(0, error.start - 100) : error.end + 100]
        return f"{near!a} cannot be written in {error.encoding}; if it is the name of a file or folder, rename it"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
