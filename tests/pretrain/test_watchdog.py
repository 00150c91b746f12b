"""How a rank ends on a fault, without other ranks; tests/pretrain/test_faults.py has the rest."""

import ctypes
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from pretrain.layout import Layout
from pretrain.watchdog import Watchdog, one_report_per_host, watch_rank


def hang(log: Path) -> None:
    with open(log, "w") as sys.stderr, Watchdog(0) as watchdog:
        watchdog.seconds = 0.2
        watchdog.at("step 1")
        watchdog.at("step 2")
        read_from_a_dead_file_system()


def read_from_a_dead_file_system() -> None:
    ctypes.PyDLL(None).sleep(60)  # and never releases the interpreter


def test_a_rank_that_hangs_prints_its_stack_and_ends(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=hang, args=(tmp_path / "log",))
    process.start()
    process.join(20)
    assert process.exitcode == 1
    told = (tmp_path / "log").read_text()
    assert "in read_from_a_dead_file_system" in told and "Timeout (0:00:00.2" in told


@pytest.mark.parametrize(("rank", "told"), [(0, "error: the loss is nan\n"), (1, "")])
def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(rank, told, capsys):
    with pytest.raises(SystemExit) as caught, watch_rank(Layout(2, 1, rank, 0, torch.device("cpu"))):
        raise FloatingPointError("the loss is nan")
    assert (caught.value.code, capsys.readouterr().err) == (1, told)


def test_only_the_first_rank_of_a_host_reports_wrong_input():
    with pytest.raises(ValueError, match="wrong"), one_report_per_host(0):
        raise ValueError("wrong")
    with pytest.raises(SystemExit) as caught, one_report_per_host(1):
        raise ValueError("wrong")
    assert caught.value.code == 2
