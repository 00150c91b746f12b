"""Spread the work of a command over hosts in three steps: prepare once, make every slice, finish once."""

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
        """Raise ValueError if a later step is requested but the file `prepared` of the first step is missing."""
        if (self.slice or self.finish) and not prepared.exists() and not (output / FINISHED_FILE).exists():
            raise ValueError(f"{output} is not prepared: first run the same command once with --prepare")

    @contextmanager
    def claimed(self, output: Path, command: str, identity: dict, parts: Path) -> Iterator["Steps"]:
        """Claim the folder `output` (see `claim_output`) and yield the steps that this process has to do.

        After the last step, mark the folder as finished and remove `parts`, the folder of intermediate files.
        Raises ValueError if another process is working in `output`, unless both make slices.
        """
        with sole_process(output, shared=self.slice is not None):
            if claim_output(output, command, identity) == "done":
                shutil.rmtree(parts, ignore_errors=True)  # a process may have been killed before it removed them
                yield Steps(False, None, False)
            else:
                does_all = not (self.prepare or self.slice or self.finish)
                steps = Steps(True, (0, 1), True) if does_all else Steps(self.prepare, self.slice, self.finish)
                yield steps
                if steps.finish:
                    mark_finished(output)
                    shutil.rmtree(parts)


class Steps(NamedTuple):
    """The steps that this process does; `slice` is (I, N), or None for no slice."""

    prepare: bool
    slice: tuple[int, int] | None
    finish: bool


def require_made(output: Path, paths: list[Path], what: str) -> None:
    """Raise ValueError unless all `paths` exist; `what` is the message's word for them, such as "shards"."""
    if absent := [path.name for path in paths if not path.exists()]:
        raise ValueError(
            f"{output} is not complete: {len(absent)} of {len(paths)} {what} are missing, the first {absent[0]}; "
            "run all its --slice commands again (they skip finished files), then --finish"
        )
