"""Claiming an output folder, and files that appear whole or not at all."""

import pytest

from data_prep.files import claim_output, finished_file, mark_finished, read_json, sha256_file, sole_process, write_json


def claim(folder, **identity):
    return claim_output(folder, "package.command", identity)


def test_claim_new_resume_done(tmp_path, capsys):
    folder = tmp_path / "run"
    assert claim(folder, seed=0, sizes=(1, 2)) == "new"
    (folder / "part.bin").write_bytes(b"1")
    assert claim(folder, seed=0, sizes=(1, 2)) == "resume"
    mark_finished(folder, num_parts=1)
    assert claim(folder, seed=0, sizes=(1, 2)) == "done"
    assert "reused" in capsys.readouterr().out
    assert read_json(folder / "run.json") == {"command": "package.command", "seed": 0, "sizes": [1, 2]}
    assert read_json(folder / "finished.json") == {"num_parts": 1}


def test_a_part_of_a_run_may_be_done(tmp_path, capsys):
    claim(tmp_path / "run", seed=0)
    (tmp_path / "run" / "seed_1").mkdir()
    mark_finished(tmp_path / "run" / "seed_1")
    assert claim_output(tmp_path / "run", "package.command", {"seed": 0}, "seed_0") == "resume"
    assert claim_output(tmp_path / "run", "package.command", {"seed": 0}, "seed_1") == "done"
    assert f"{tmp_path / 'run' / 'seed_1'} is complete" in capsys.readouterr().out


def test_an_output_folder_has_one_process_or_sharers(tmp_path):
    for first, second, is_refused in (
        (False, False, True),
        (False, True, True),
        (True, False, True),
        (True, True, False),
    ):
        with sole_process(tmp_path / "run", shared=first):
            if is_refused:
                with pytest.raises(ValueError, match="another process is working in .*run; wait"):
                    sole_process(tmp_path / "run", shared=second).__enter__()
            else:
                with sole_process(tmp_path / "run", shared=second):
                    pass
    (tmp_path / "file").touch()
    with sole_process(tmp_path / "file"), pytest.raises(ValueError, match="is a file"):
        claim(tmp_path / "file")


def test_claim_refuses_what_is_not_its_own(tmp_path):
    claim(tmp_path / "a", seed=0)
    (tmp_path / "a" / "part.bin").write_bytes(b"1")
    with pytest.raises(ValueError, match="seed: 0 there, 1 requested"):
        claim(tmp_path / "a", seed=1)
    with pytest.raises(ValueError, match="command: 'package.command' there, 'package.other' requested"):
        claim_output(tmp_path / "a", "package.other", {"seed": 0})
    assert read_json(tmp_path / "a" / "run.json")["seed"] == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"already holds 'thesis\.tex'"):
        claim(tmp_path / "b")
    with pytest.raises(ValueError, match="is a file"):
        claim(tmp_path / "b" / "thesis.tex")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["thesis.tex"]


def test_a_refusal_names_the_differing_value_alone(tmp_path):
    held = {"engine": {"optimizer": {"lr": 0.1, "eps": 1e-6}, "bf16": None}, "seed": 0}
    claim(tmp_path / "a", **held)
    (tmp_path / "a" / "part.bin").write_bytes(b"1")
    asked = {"engine": {"optimizer": {"lr": 0.2, "eps": 1e-6}, "bf16": {"enabled": True}}, "seed": 0}
    with pytest.raises(ValueError, match="another run") as refused:
        claim(tmp_path / "a", **asked)
    differences = "engine.bf16: None there, {'enabled': True} requested; engine.optimizer.lr: 0.1 there, 0.2 requested"
    assert str(refused.value).split("(")[1].split(")")[0] == differences


def test_a_claim_alone_may_be_changed(tmp_path):
    claim(tmp_path / "a", size=90_000)
    assert claim(tmp_path / "a", size=8_000) == "new"
    assert read_json(tmp_path / "a" / "run.json")["size"] == 8_000


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
    write_json(tmp_path / "run.json", {"seed": 0})
    assert (tmp_path / "run.json").read_text() == '{\n  "seed": 0\n}\n'
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not valid JSON"):
        read_json(tmp_path / "run.json")
