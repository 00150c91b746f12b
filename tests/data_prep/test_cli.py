"""Claiming an output folder, finishing files, and how a user's mistake is told."""

import os

import pytest

from data_prep.cli import run_cli
from data_prep.files import claim_output, finished_file, read_json, sha256_file, sole_process, write_json


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


def test_names_that_are_no_text_are_told_or_printed_as_escapes(capsys, tmp_path):
    latin = os.fsdecode(b"f\xfcr")
    (tmp_path / latin).touch()

    def main(argv):
        print(*(path.name for path in tmp_path.iterdir()))
        write_json(tmp_path / "config.json", {"input": [str(path) for path in tmp_path.iterdir()]})

    with pytest.raises(SystemExit) as stop:
        run_cli(main, ["--input", str(tmp_path / latin)])
    told = capsys.readouterr()
    assert stop.value.code == 2 and not told.out and not (tmp_path / "config.json").exists()
    assert (
        told.err.startswith(f"error: the argument b'{tmp_path}/f\\xfcr' is no text in utf-8") and "LC_ALL" in told.err
    )
    with pytest.raises(SystemExit):
        run_cli(main, ["--input", "für"])
    told = capsys.readouterr()
    assert told.out == "f\\udcfcr\n" and not (tmp_path / "config.json").exists()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and f"{tmp_path}/f\\udcfcr" in told.err


def test_our_own_bugs_keep_their_traceback():
    with pytest.raises(KeyError):
        run_cli(lambda argv: {}["bug"], [])


def test_claim_new_resume_done(tmp_path, capsys):
    folder, config = tmp_path / "run", {"seed": 0, "sizes": (1, 2)}
    assert claim_output(folder, config) == "new"
    (folder / "part.bin").write_bytes(b"1")
    assert claim_output(folder, config) == "resume"
    write_json(folder / "manifest.json", {})
    assert claim_output(folder, config) == "done"
    assert "reused" in capsys.readouterr().out
    assert read_json(folder / "config.json") == {"seed": 0, "sizes": [1, 2]}


def test_an_output_folder_has_one_process_or_sharers(tmp_path):
    for first, second, is_refused in (
        (False, False, True),
        (False, True, True),
        (True, False, True),
        (True, True, False),
    ):
        with sole_process(tmp_path / "run", shared=first):
            if is_refused:
                with pytest.raises(ValueError, match="another process is at work in .*run; wait"):
                    sole_process(tmp_path / "run", shared=second).__enter__()
            else:
                with sole_process(tmp_path / "run", shared=second):
                    pass
    (tmp_path / "file").touch()
    with sole_process(tmp_path / "file"), pytest.raises(ValueError, match="is a file"):
        claim_output(tmp_path / "file", {})


def test_claim_refuses_what_is_not_its_own(tmp_path):
    claim_output(tmp_path / "a", {"seed": 0})
    (tmp_path / "a" / "part.bin").write_bytes(b"1")
    with pytest.raises(ValueError, match="seed: 0 there, 1 asked for"):
        claim_output(tmp_path / "a", {"seed": 1})
    assert read_json(tmp_path / "a" / "config.json") == {"seed": 0}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"already holds 'thesis\.tex'"):
        claim_output(tmp_path / "b", {})
    with pytest.raises(ValueError, match="is a file"):
        claim_output(tmp_path / "b" / "thesis.tex", {})
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["thesis.tex"]


def test_a_refusal_names_the_differing_value_alone(tmp_path):
    held = {"engine": {"optimizer": {"lr": 0.1, "eps": 1e-6}, "bf16": None}, "seed": 0}
    claim_output(tmp_path / "a", held)
    (tmp_path / "a" / "part.bin").write_bytes(b"1")
    asked = {"engine": {"optimizer": {"lr": 0.2, "eps": 1e-6}, "bf16": {"enabled": True}}, "seed": 0}
    with pytest.raises(ValueError, match="another run") as refused:
        claim_output(tmp_path / "a", asked)
    differences = "engine.bf16: None there, {'enabled': True} asked for; engine.optimizer.lr: 0.1 there, 0.2 asked for"
    assert str(refused.value).split("(")[1].split(")")[0] == differences


def test_a_claim_alone_may_be_changed(tmp_path):
    claim_output(tmp_path / "a", {"size": 90_000})
    assert claim_output(tmp_path / "a", {"size": 8_000}) == "new"
    assert read_json(tmp_path / "a" / "config.json") == {"size": 8_000}


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), finished_file(path, "w") as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with finished_file(path) as file:
        file.write(b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]
    assert sha256_file(path) == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_json(tmp_path / "config.json")
