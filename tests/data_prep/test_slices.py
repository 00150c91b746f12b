"""The three steps of a command that hosts can share: who does which, and what must be there before."""

import pytest

from data_prep.files import claim_output, mark_finished
from data_prep.slices import SliceOptions, Steps, require_made


def claimed(output, **options):
    return SliceOptions(**options).claimed(output, "package.command", {"seed": 0}, output / "parts")


def test_each_process_does_its_steps_and_the_last_one_cleans_up(tmp_path):
    output = tmp_path / "run"
    for options, expected in (
        ({"prepare": True}, (True, None, False)),
        ({"slice": (1, 2)}, (False, (1, 2), False)),
        ({"finish": True}, (False, None, True)),
    ):
        with claimed(output, **options) as steps:
            assert steps == Steps(*expected)
            (output / "parts").mkdir(exist_ok=True)
    assert sorted(path.name for path in output.iterdir()) == ["finished.json", "run.json"]
    with claimed(tmp_path / "whole") as steps:
        assert steps == Steps(True, (0, 1), True)
        (tmp_path / "whole" / "parts").mkdir()


def test_a_finished_folder_leaves_nothing_to_do_but_to_remove_the_parts(tmp_path):
    claim_output(tmp_path, "package.command", {"seed": 0})
    (tmp_path / "parts").mkdir()
    mark_finished(tmp_path)  # and killed before it could remove the parts
    with claimed(tmp_path) as steps:
        assert steps == Steps(False, None, False)
    assert not (tmp_path / "parts").exists()


def test_a_step_that_fails_leaves_the_folder_unfinished(tmp_path):
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "run"):
        (tmp_path / "run" / "parts").mkdir()
        raise KeyboardInterrupt
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["parts", "run.json"]


def test_slices_share_the_folder_and_other_steps_do_not(tmp_path):
    with claimed(tmp_path, slice=(0, 2)):
        with claimed(tmp_path, slice=(1, 2)):
            pass
        with pytest.raises(ValueError, match="another process is working"):
            claimed(tmp_path, finish=True).__enter__()


def test_later_steps_need_the_earlier_ones(tmp_path):
    prepared = tmp_path / "prepared.json"
    for options in (SliceOptions(slice=(0, 2)), SliceOptions(finish=True)):
        with pytest.raises(ValueError, match="not prepared: first run the same command once with --prepare"):
            options.require_prepared(tmp_path, prepared)
    SliceOptions().require_prepared(tmp_path, prepared)
    prepared.touch()
    SliceOptions(finish=True).require_prepared(tmp_path, prepared)
    with pytest.raises(ValueError, match=f"{tmp_path} is not complete: 1 of 2 shards are missing, the first b;"):
        require_made(tmp_path, [prepared, tmp_path / "b"], "shards")
