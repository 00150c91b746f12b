"""What ends a run before its last step, on real processes: requests to stop, a loss that is not finite, a second run in
the same folder, a rank that dies.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain.metrics_file import read_metrics
from pretrain.run_lock import locked_run_folder
from pretrain.train import main
from tests.pretrain.test_train import CONFIG, ROOT, arguments, losses, run_training
from tests.ranks import free_ports, run_ranks

DEEPSPEED = ("deepspeed", "--num_accelerators", "2", "--module")
LONG = ["--steps", "100000", "--eval-interval", "100000", "--save-interval", "100000"]


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def start(argv: list[str], log: Path, *launcher: str) -> subprocess.Popen:
    command = [*(launcher or (sys.executable, "-m")), "pretrain.train", *argv]
    with open(log, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)


def start_ranks(argv: list[str], logs: list[Path]) -> list[subprocess.Popen]:
    """A rank a log, without a launcher, which costs seconds."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": str(len(logs))}
    processes = []
    for rank, log in enumerate(logs):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(log, "w") as file:
            command = [sys.executable, "-m", "pretrain.train", *argv]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))
    return processes


def wait_for_step(output: Path, process: subprocess.Popen, log: Path, step: int = 2) -> None:
    """Until a run of a process has logged a step."""
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or len(read_metrics(output, "train")) < step:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def last_step(output: Path) -> int:
    return read_metrics(output, "train")[-1]["step"]


def test_a_signal_saves_and_the_same_command_goes_on(shard_folders, config_file, tmp_path):
    """One process: USR1 first, TERM several times while it saves. A second run is refused meanwhile."""
    output, log = tmp_path / "run", tmp_path / "log"
    process = start(arguments(shard_folders, config_file, output, *LONG), log)
    wait_for_step(output, process, log)
    with pytest.raises(ValueError, match=rf"in use by process {process.pid} on .*; wait for it, stop it by `touch"):
        main(arguments(shard_folders, config_file, output, *LONG))
    process.send_signal(signal.SIGUSR1)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.returncode == 0, log.read_text()
    assert re.search(r"stopped by .*SIGUSR1.* after step \d+ of 100000, saved: the same command", log.read_text())
    saved = [path.name for path in (output / "checkpoints").glob("step_*")]
    assert saved == [f"step_{last_step(output):08d}"]
    assert not (output / "finished.json").exists()
    (launch,) = [json.loads(line) for line in (output / "launches.jsonl").read_text().splitlines()]
    assert launch["process"] == process.pid and {"host", "git", "torch", "deepspeed"} <= launch.keys()
    with locked_run_folder(output):  # it is free again
        pass


def test_a_stop_file_stops_all_ranks_once(shard_folders, config_file, tmp_path):
    output = tmp_path / "run"
    run_ranks(run_training, 2, arguments(shard_folders, config_file, output, "--stop-after", "1"))
    (output / "STOP").touch()
    run_ranks(run_training, 2, arguments(shard_folders, config_file, output))
    assert last_step(output) == 2 and not (output / "STOP").exists()
    run_ranks(run_training, 2, arguments(shard_folders, config_file, output, "--stop-after", "1"))  # it is past that
    assert (output / "checkpoints/latest").read_text() == "step_00000002"
    run_ranks(run_training, 2, arguments(shard_folders, config_file, output))
    assert len(losses(output)) == 6 and (output / "finished.json").exists()


def fault_of(argv: list[str]) -> str:
    """What a run stops with; all ranks stop, so that they can be used again."""
    with pytest.raises(FloatingPointError) as caught:
        run_training(argv)
    return str(caught.value)


def test_a_loss_that_is_not_finite_stops_with_its_samples(shard_folders, config_file, tmp_path):
    """A learning rate of 1e30 makes the loss of step 2 NaN, though only step 1 and multiples of 5 are logged."""
    data = [f"{folder}={weight}" for folder, weight in zip(shard_folders, (3, 1), strict=True)]
    more = ["--data", *data] + ["--set", "optimizer.params.lr=1e30", "--log-interval", "5", "--tensor-parallel", "2"]
    faults = run_ranks(fault_of, 2, arguments(shard_folders, config_file, tmp_path / "run", *more))
    assert faults[0] == faults[1]
    assert re.match(
        r"step 2: the loss is (nan|inf); 16 samples: \d+ of \S+/train, .* \.\.\.; more in .*fault_step_00000002",
        faults[0],
    )
    dump = json.loads((tmp_path / "run/fault_step_00000002.json").read_text())
    assert [len(part["samples"]) for part in dump["micro_batches"]] == [4, 4, 4, 4]
    folders = [folder for part in dump["micro_batches"] for folder, _ in part["samples"]]
    assert folders == [str(shard_folders[0])] * 12 + [str(shard_folders[1])] * 4
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_down_within_a_minute(shard_folders, config_file, tmp_path):
    """kill -9 of rank 1 of 2 under the deepspeed launcher. Measured: 14 s; launcher and rank 0 say which it was."""
    output, log = tmp_path / "run", tmp_path / "log"
    launcher = start(arguments(shard_folders, config_file, output, *LONG), log, *DEEPSPEED)
    wait_for_step(output, launcher, log)
    ranks = processes_of_ranks(launcher)
    ranks[1].kill()
    killed = time.monotonic()
    assert launcher.wait(60) != 0, log.read_text()
    print(f"down after {time.monotonic() - killed:.1f} s")
    assert not any(rank.is_running() for rank in ranks.values())
    assert re.search(r"--local_rank=1.* exits with return code = -9", log.read_text())
    assert re.search(r"rank 0 on \S+, in step \d+: another rank died, .* no longer answer: \[1\]", log.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stands_still_is_named_and_the_job_goes_on(stopped, shard_folders, config_file, tmp_path):
    """SIGSTOP of one rank of two, --timeout of 6 s. Measured: the other ends after 18 and 19 s."""
    output, logs = tmp_path / "run", [tmp_path / "0", tmp_path / "1"]
    argv = arguments(shard_folders, config_file, output, *LONG, "--timeout", "0.1")
    ranks = start_ranks(argv, logs)
    wait_for_step(output, ranks[0], logs[0])
    ranks[stopped].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert ranks[1 - stopped].wait(60) == 1
    print(f"ended after {time.monotonic() - began:.1f} s")
    ranks[stopped].kill()
    assert ranks[stopped].wait(10) == -signal.SIGKILL
    told = rf"rank {1 - stopped} on \S+, in step \d+: another rank died, .* no longer answer: \[{stopped}\]"
    assert re.search(told, logs[1 - stopped].read_text())
    ranks = start_ranks([*argv, "--stop-after", "2"], logs)
    assert [rank.wait(120) for rank in ranks] == [0, 0], logs[0].read_text()
    assert last_step(output) == 2


@pytest.mark.slow
def test_the_launchers_sigterm_saves(shard_folders, config_file, tmp_path):
    """Slurm's SIGTERM reaches launcher and ranks; the launcher passes it on and waits 30 s before it kills."""
    output, log = tmp_path / "run", tmp_path / "log"
    launcher = start(arguments(shard_folders, config_file, output, *LONG), log, *DEEPSPEED)
    wait_for_step(output, launcher, log)
    ranks = processes_of_ranks(launcher)
    ranks[0].parent().terminate()
    launcher.wait(60)
    psutil.wait_procs(ranks.values(), timeout=30)
    assert "stopped by SIGTERM after step" in log.read_text()
    assert (output / "checkpoints/latest").read_text() == f"step_{last_step(output):08d}"


def processes_of_ranks(launcher: subprocess.Popen) -> dict[int, psutil.Process]:
    """Rank -> process, of all that a launcher on this host started."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}
