"""Checks of keys and numbers in JSON files that users write, with the same wording for every file."""

import difflib
import math
from collections.abc import Iterable


def check_keys(values: dict, known: Iterable[str], where: str) -> None:
    """Raise ValueError for the first key that is not known, naming the nearest known one."""
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def check_number(
    value: object,
    name: str,
    low: float = 0,
    high: float = math.inf,
    *,
    exclude: float | None = None,
    whole: bool = False,
) -> None:
    """Raise ValueError unless `value` is a finite number from `low` to `high`. The message begins with `name`.

    `exclude` is a bound that is not allowed itself; `whole` requires an integer. JSON's true is not a number.
    """
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and low <= value <= high and value != exclude):
        kind = "whole number" if whole else "number"
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        other_than = "" if exclude is None else f", but not {exclude}"
        raise ValueError(f"{name}={value!r} must be a {kind} {limits}{other_than}")


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' if something known is spelt like `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
