"""The page of all commands is that of the code, and a flag means one thing."""

import re

from benchmarks.commands import PAGE, find_commands, flags_of, help_of


def test_the_page_has_every_flag_and_a_flag_has_one_kind_of_value():
    page, values = PAGE.read_text(encoding="utf-8"), {}
    for command in find_commands():
        flags = flags_of(help_of(command))
        section = page.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
        assert flags_of(section) == flags, f"{command}: run python -m benchmarks.commands"
        for name, value in flags.items():
            kind = re.sub(r"^(DIR|FILE|FILE.html)$", "PATH", value.partition(" ")[0])  # several values are of one kind
            assert values.setdefault(name, kind) == kind, f"{name} of {command} takes another kind of value"
