"""Training over two hosts and a cable: by the deepspeed launcher with a hostfile over ssh, and by torchrun."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint_reader import MOMENTS, list_checkpoints, tensor_reader
from pretrain.metrics_file import read_metrics, read_rows
from tests.hosts import PATH, Host, two_hosts, why_no_hosts
from tests.pretrain.test_train import ROOT, arguments, config_file, run_training  # noqa: F401 (a fixture)
from tests.ranks import run_ranks

LONG = ("--steps", "100000", "--eval-interval", "100000")
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    if reason := why_no_hosts():
        pytest.skip(reason)
    with two_hosts() as hosts:
        yield hosts


def start(host: Host, log: Path, *command: object) -> subprocess.Popen:
    """A command on a host, in a folder where all see the sources."""
    with open(log, "w") as file:
        return subprocess.Popen(host.command(*command, folder=ROOT), stdout=file, stderr=file, start_new_session=True)


def test_a_cut_cable_ends_the_run_and_it_goes_on(hosts, shard_folders, config_file, tmp_path):  # noqa: F811
    """Started by deepspeed on two hosts at DP 2, cut off in its midst, resumed by torchrun: the same weights as those
    of two ranks on one host that nobody disturbed.
    """
    output, log, hostfile = tmp_path / "run", tmp_path / "log", tmp_path / "hostfile"
    train = ["pretrain.train", *arguments(shard_folders, config_file, output, *LONG, "--save-interval", "20")]
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    forwarded = tmp_path / "environment"  # what a shell that ssh opens does not have
    forwarded.write_text(f"PATH={BIN}:{PATH}\nOMP_NUM_THREADS=1\n")
    launcher = [BIN / "deepspeed", "--hostfile", hostfile, "--master_addr", "host1", "--module"]
    process = start(hosts[0], log, f"DS_ENV_FILE={forwarded}", f"PATH={BIN}:{PATH}", *launcher, *train, "--timeout", 1)
    wait_for(lambda: list_checkpoints(output), process, log)
    (launch,) = read_rows(output / "launches.jsonl")
    assert (launch["host"], launch["ranks"]) == ("host1", 2)

    hosts[1].set_cable("down")
    cut = time.monotonic()
    wait_for(lambda: "Ranks that no longer answer: [1]" in log.read_text(), process, log)
    assert time.monotonic() - cut < 90  # --timeout is one minute
    assert "rank 0 on host1, in step " in log.read_text()
    hosts[1].set_cable("up")
    assert process.wait(timeout=120) != 0, log.read_text()[-3000:]

    step = int(list_checkpoints(output)[-1].name.removeprefix("step_"))
    last = ("--stop-after", str(step + 20))
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "host1:29400", "--rdzv-id", "cable"]
    torchrun = [f"PATH={BIN}:{PATH}", "OMP_NUM_THREADS=1", BIN / "torchrun", "--nnodes", 2, "--nproc-per-node", 1]
    logs = [tmp_path / host.name for host in hosts]
    processes = [
        start(host, log, *torchrun, *rendezvous, "-m", *train, *last) for host, log in zip(hosts, logs, strict=True)
    ]
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=120) == 0, log.read_text()[-3000:]
    assert [row["step"] for row in read_rows(output / "launches.jsonl")] == [0, step]
    assert read_metrics(output, "train")[-1]["step"] == step + 20

    run_ranks(run_training, 2, arguments(shard_folders, config_file, tmp_path / "one", *LONG, *last))
    (names, read), (_, expected) = (tensor_reader(list_checkpoints(path)[-1]) for path in (output, tmp_path / "one"))
    assert all(torch.equal(read(name, kind), expected(name, kind)) for name in names for kind in ("weight", *MOMENTS))


def wait_for(condition, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)
