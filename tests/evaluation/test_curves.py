"""Runs side by side: a figure a curve, one page with all of them, and what differs."""

import json
import re

import pytest

from evaluation.report_page.curves import compare_runs, differing_settings


def make_run(folder, rate, num_steps):
    folder.mkdir()
    rows = [{"kind": "train", "step": n, "loss": 9 - n * rate, "learning_rate": rate} for n in range(1, num_steps + 1)]
    rows.append({"kind": "eval", "step": num_steps, "mlm_loss": 8 - num_steps * rate})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')
    (folder / "run.json").write_text(json.dumps({"seed": 1, "deepspeed": {"optimizer": {"params": {"lr": rate}}}}))
    return folder


def test_two_runs_become_figures_and_one_page(tmp_path):
    runs = [make_run(tmp_path / "slow", 0.125, 4), make_run(tmp_path / "fast <b>", 0.5, 6)]
    names = ["train_loss.png", "eval_mlm_loss.png", "train_learning_rate.png", "curves.html"]
    assert [path.name for path in compare_runs(runs, tmp_path / "out")] == names
    page = (tmp_path / "out" / "curves.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and "<b>" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page), "nothing outside the page"
    for value in ("8.5", "7.5", "5", "deepspeed.optimizer.params.lr"):
        assert re.search(rf">\s*{re.escape(value)}\s*<", page), value
    assert differing_settings(list(map(str, runs))) == [["deepspeed.optimizer.params.lr", 0.125, 0.5]]


def test_folders_that_are_no_runs(tmp_path):
    run = make_run(tmp_path / "run", 0.1, 2)
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match=r"new has no metrics.jsonl, so it is no run folder"):
        compare_runs([run, tmp_path / "new"], tmp_path / "out")
    (tmp_path / "new" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="has logged nothing yet"):
        compare_runs([tmp_path / "new"], tmp_path / "out")
    with pytest.raises(ValueError, match="named twice"):
        compare_runs([run, run], tmp_path / "out")
    assert not (tmp_path / "out").exists()
