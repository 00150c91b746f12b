"""What all commands share: options that are declared once, and one way to report a user's mistake.

A command declares its options as a frozen dataclass and parses them in `main`. It checks all its input first, then
claims its output folder, then works:

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
import inspect
import math
import os
import re
import sys
import typing
from collections.abc import Callable
from io import TextIOWrapper
from typing import Any, NoReturn, TypeVar

Options = TypeVar("Options")
HOSTS = "over many hosts"


def option(help: str | None, *, default: Any = dataclasses.MISSING, **settings: Any) -> Any:
    """A field of an options class: the field `seq_length` is the flag --seq-length.

    The annotation decides how a flag is read. A `bool` is a switch, off by default. A `tuple[X, ...]` takes several
    values, and repeating the flag adds to them. Any other flag takes one value. A flag without a default is required.

    Args:
        help: what --help prints, followed by the default; None hides the flag
        group: the heading under which --help lists the flag
        one_of: a name; at most one of the flags that share it may be given
        flags: what is written on the command line instead of the field's name; a name without hyphens is positional
        settings: anything else that argparse's `add_argument` takes: `type` (also to check the value), `choices`,
            `metavar`, `nargs`, `const`
    """
    return dataclasses.field(default=default, metadata={"help": help, **settings})


def parse(options: type[Options], command: str, argv: list[str] | None) -> Options:
    """The command line `argv` of `python -m command` as an instance of the frozen dataclass `options`.

    The class's docstring is the description in --help. Raises ValueError for a command line that does not fit.
    """
    return options(**vars(build_parser(options, command).parse_args(argv)))


def build_parser(options: type, command: str) -> argparse.ArgumentParser:
    """The parser behind `parse`. It fills in every field, except those that are not given and have a default."""
    parser = _Parser(
        prog=f"python -m {command}",
        description=inspect.getdoc(options),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {"": parser}
    types = typing.get_type_hints(options)
    own_first = sorted(dataclasses.fields(options), key=lambda field: field.name not in options.__annotations__)
    for field in own_first:
        settings = dict(field.metadata)
        flags = settings.pop("flags", ("--" + field.name.replace("_", "-"),))
        group, one_of = settings.pop("group", ""), settings.pop("one_of", "")
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if one_of and one_of not in groups:
            groups[one_of] = groups[group].add_mutually_exclusive_group()
        if flags[0].startswith("-"):
            settings |= {"dest": field.name, "required": field.default is dataclasses.MISSING}
        groups[one_of or group].add_argument(*flags, **_settings_by_type(types[field.name]) | settings | _help(field))
    return parser


def _settings_by_type(annotation: Any) -> dict[str, Any]:
    """What argparse is told about an option because of its annotation."""
    if annotation is bool:
        return {"action": "store_true"}
    if typing.get_origin(annotation) is tuple and annotation.__args__[-1] is Ellipsis:
        return {"action": _Extend, "nargs": "+", "type": annotation.__args__[0]}
    inner = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)]
    return {"type": inner[0]}


def _help(field: dataclasses.Field) -> dict[str, str]:
    """The help text of a flag with its default, if it has one that says something."""
    text, default = field.metadata["help"], field.default
    if text is None:
        return {"help": argparse.SUPPRESS}
    if default in (dataclasses.MISSING, None, False, "", ()):
        return {"help": text}
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return {"help": f"{text} (default: {shown})"}


class _Extend(argparse.Action):
    """Collects the values of a flag into a tuple; a repeated flag adds to them instead of replacing them."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other wrong input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `{self.prog} --help` lists the options")


def at_least(minimum: int) -> Callable[[str], int]:
    """A `type` of an option: an integer that is not below `minimum`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is below {minimum}")
        return value

    return integer


def number(above: float | None = None, low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """A `type` of an option: a finite number from `low` to `high`, and greater than `above` if that is given."""

    def real(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} is not above {above:g}")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return real


share = number(low=0, high=1)


def matching(pattern: str, description: str) -> Callable[[str], str]:
    """A `type` of an option: a text that the regular expression `pattern` matches to its end."""

    def matched(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return text

    return matched


def part(text: str) -> tuple[int, int]:
    """A `type` of an option: "I/N", part I of N parts that are counted from 0."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1, as in 0/4, 1/4, 2/4, 3/4")
    return int(index), int(count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliceOptions:
    """The options of a command whose work can be spread over hosts. Without any of them, one process does it all."""

    prepare: bool = option("only the first step, in one process", default=False, group=HOSTS, one_of="step")
    slice: tuple[int, int] | None = option(
        "only slice I of N (0 to N-1), after --prepare",
        default=None,
        type=part,
        metavar="I/N",
        group=HOSTS,
        one_of="step",
    )
    finish: bool = option(
        "only the last step, in one process, after all slices", default=False, group=HOSTS, one_of="step"
    )


def run_cli(main: Callable[[list[str] | None], object], argv: list[str] | None = None) -> None:
    """Call `main(argv)`; a ValueError or OSError becomes `error: message` on stderr and exit code 2, no traceback.

    `python -X dev -m ...` shows the traceback all the same. Arguments have to be text, since paths go into JSON files.
    A character that the terminal's encoding lacks is printed as an escape.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        for argument in sys.argv[1:] if argv is None else argv:
            if not _is_text(argument):
                raise ValueError(
                    f"the argument {os.fsencode(argument)!r} is no text in {sys.getfilesystemencoding()}, the encoding "
                    "of this locale; rename the file or folder, or set a locale of UTF-8, as in LC_ALL=C.UTF-8"
                )
        main(argv)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {describe_error(error)}", file=sys.stderr)
        sys.exit(2)


def _is_text(text: str) -> bool:
    """Whether a name that came from the operating system was decoded without leftover bytes (PEP 383)."""
    return text.encode(errors="ignore").decode() == text


def describe_error(error: Exception) -> str:
    """One line for the user; an operating-system error is told as `file: reason`, without its errno."""
    if isinstance(error, UnicodeEncodeError):
        near = error.object[max(0, error.start - 100) : error.end + 100]
        return f"{near!a} cannot be written in {error.encoding}; if it is the name of a file or folder, rename that"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def add_slice_arguments(parser: argparse.ArgumentParser, prepared: str) -> None:
    """The same options on a parser of argparse; goes as soon as corpus and build declare theirs."""
    steps = parser.add_argument_group(HOSTS).add_mutually_exclusive_group()
    steps.add_argument("--prepare", action="store_true", help=f"only the first step, in one process: {prepared}")
    steps.add_argument("--slice", type=part, metavar="I/N", help="only slice I of N (0 to N-1), after --prepare")
    steps.add_argument("--finish", action="store_true", help="only the last step, in one process, after all slices")
