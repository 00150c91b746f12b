"""Commands whose work can be spread over hosts in three steps: prepare once, make every slice, finish once."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.cli import option, part
from data_prep.files import FINISHED_FILE, claim_output, mark_finished, sole_process

STEP = {"group": "over many hosts", "one_of": "step"}


@dataclass(frozen=True, kw_only=True)
class SliceOptions:
    """The options of a command that has these steps. Without any of them, one process does all steps."""

    prepare: bool = option("only the first step, in one process", default=False, **STEP)
    slice: tuple[int, int] | None = option(
        "only slice I of N (0 to N-1), after --prepare", default=None, type=part, metavar="I/N", **STEP
    )
    finish: bool = option("only the last step, in one process, after all slices", default=False, **STEP)

    def require_prepared(self, output: Path, prepared: Path) -> None:
        """Raise ValueError if a later step is asked for and the first one has not left the file `prepared`."""
        if (self.slice or self.finish) and not prepared.exists() and not (output / FINISHED_FILE).exists():
            raise ValueError(f"{output} is not prepared: give the same command with --prepare first, once")

    @contextmanager
    def claimed(self, output: Path, command: str, identity: dict, parts: Path) -> Iterator["Steps"]:
        """Claim the folder `output` (see `claim_output`) and give the steps that are left to this process.

        At the end of the last step the folder is marked as finished and `parts`, which holds intermediate files, is
        removed. Raises ValueError if another process is at work in `output`; slices may share it.
        """
        with sole_process(output, shared=self.slice is not None):
            if claim_output(output, command, identity) == "done":
                shutil.rmtree(parts, ignore_errors=True)  # a process may have been killed before it could do this
                yield Steps(False, None, False)
            else:
                does_all = not (self.prepare or self.slice or self.finish)
                steps = Steps(True, (0, 1), True) if does_all else Steps(self.prepare, self.slice, self.finish)
                yield steps
                if steps.finish:
                    mark_finished(output)
                    shutil.rmtree(parts)


class Steps(NamedTuple):
    """The steps that this process does; `slice` is (I, N), and None for no slice."""

    prepare: bool
    slice: tuple[int, int] | None
    finish: bool


def require_made(output: Path, paths: list[Path], what: str) -> None:
    """Raise ValueError unless slices have made all the files `paths`, which hold `what`."""
    if absent := [path.name for path in paths if not path.exists()]:
        raise ValueError(
            f"{output} is not complete: {len(absent)} of {len(paths)} {what} are missing, the first {absent[0]}; "
            "give all its --slice commands again (they skip what is done), then --finish"
        )
