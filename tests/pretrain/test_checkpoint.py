"""Checkpoints that cannot be trusted: damaged, cut short, full of code, half written, on a full disk."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_prep.files import sha256_file
from evaluation.embed import main as embed
from evaluation.predict import main as predict
from pretrain.checkpoint_reader import CHECKSUMS, damaged_files, list_checkpoints, tensor_reader
from pretrain.convert import main as convert
from pretrain.layout import environment_side_by_side
from pretrain.metrics_file import read_rows
from pretrain.options import claimed_run_folder
from pretrain.train import main
from tests.pretrain.test_train import (
    CONFIG,
    ROOT,
    SMALL_MODEL,
    arguments,
    losses,
    prepare,
    refusal_of,
    run_training,
    state,
)
from tests.ranks import free_ports, run_ranks


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def stopped_run(shard_folders, config_file, tmp_path_factory) -> Path:
    """A run of 6 steps on two ranks that was stopped after step 4; checkpoints after 2 and 4. Not to be changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    more = ["--save-interval", "2", "--stop-after", "4"]
    run_ranks(run_training, 2, arguments(shard_folders, config_file, folder, *more))
    return folder


@pytest.fixture
def run_folder(stopped_run, tmp_path) -> Path:
    return shutil.copytree(stopped_run, tmp_path / "run")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": ("*optim_states.pt", flip_a_bit, "optim_states.pt does not match its checksum"),
    "truncated": (
        "mp_rank_00*.pt",
        lambda path: os.truncate(path, path.stat().st_size - 1),
        "does not match its checksum",
    ),
    "missing": ("fragments_dp_1*", Path.unlink, "fragments_dp_1_tp_0.json is missing"),
    "checksums cut": (CHECKSUMS, lambda path: os.truncate(path, path.stat().st_size // 2), "missing or cut short"),
    "checksums cut in the last line": (
        CHECKSUMS,
        lambda path: os.truncate(path, path.stat().st_size - len("checkpoint.json\n")),
        "missing or cut short",
    ),
    "checksums zeroed": (
        CHECKSUMS,
        lambda path: path.write_bytes(path.read_bytes()[:100] + bytes(90) + path.read_bytes()[190:]),
        "a line without a checksum and a name",
    ),
    "no checksums": (CHECKSUMS, Path.unlink, "missing or cut short"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage, run_folder, tmp_path):
    pattern, break_it, message = DAMAGES[damage]
    checkpoint = list_checkpoints(run_folder)[-1]
    assert damaged_files(checkpoint) == []
    break_it(next(checkpoint.glob(pattern)))
    assert message in " ".join(damaged_files(checkpoint))
    if damage.startswith("checksums"):
        assert all(problem.startswith(CHECKSUMS) for problem in damaged_files(checkpoint))
    if damage == "flipped bit":
        with pytest.raises(ValueError, match=f"is damaged: .*{message}"):
            convert(["--checkpoint", str(run_folder), "--output", str(tmp_path / "hf")])


JOB = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}


@pytest.mark.parametrize("job", [JOB, {name: JOB[name] for name in ("SLURM_NTASKS", "SLURM_PROCID")}], ids=len)
def test_tools_of_one_process_ignore_the_job_around_them(job, stopped_run, tmp_path, monkeypatch):
    """Neither do they ask for MASTER_ADDR, nor do they wait for other ranks."""
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "lines.txt").write_text("a line\n")
    embed(["--checkpoint", str(stopped_run), "--input", f"{tmp_path}/lines.txt", "--output", f"{tmp_path}/vectors.npy"])
    convert(["--checkpoint", str(stopped_run), "--output", str(tmp_path / "hf")])
    assert (tmp_path / "hf/model.safetensors").is_file() and (tmp_path / "vectors.npy").is_file()
    with pytest.raises(ValueError, match="has no run.json"):
        predict(["--run", str(tmp_path), "--file", f"{tmp_path}/lines.txt"])
    alone = environment_side_by_side(0, 1)
    assert not {*JOB, "MASTER_ADDR", "MASTER_PORT"} - {"SLURM_NTASKS"} & alone.keys() and "PATH" in alone


def test_the_checksums_are_those_of_sha256sum(stopped_run):
    for checkpoint in list_checkpoints(stopped_run):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", CHECKSUMS], cwd=checkpoint, check=True)
        names = {line.split("  ")[1] for line in (checkpoint / CHECKSUMS).read_text().splitlines()}
        assert names == {path.name for path in checkpoint.iterdir()} - {CHECKSUMS}


def test_a_damaged_newest_falls_back_loudly(shard_folders, config_file, run_folder):
    """From step 2 again: the losses of steps 3 and 4 are the same as before."""
    before = losses(run_folder)
    flip_a_bit(next(list_checkpoints(run_folder)[-1].glob("*pp_rank_1*optim_states.pt")))
    run_ranks(run_training, 2, arguments(shard_folders, config_file, run_folder))
    assert losses(run_folder)[:4] == before
    assert len(losses(run_folder)) == 6
    launches = [json.loads(line) for line in (run_folder / "launches.jsonl").read_text().splitlines()]
    assert [launch["step"] for launch in launches] == [0, 2]
    (warning,) = launches[1]["warnings"]
    assert "step_00000004 is damaged (zero_pp_rank_1_mp_rank_00_optim_states.pt does not match its checksum)" in warning
    assert (run_folder / "checkpoints/step_00000004.damaged").is_dir()


def test_without_any_whole_checkpoint_nothing_is_started(shard_folders, config_file, run_folder):
    for checkpoint in list_checkpoints(run_folder):
        flip_a_bit(checkpoint / "checkpoint.json")
    messages = run_ranks(refusal_of, 2, arguments(shard_folders, config_file, run_folder))
    assert (
        "every checkpoint is damaged (step_00000004: checkpoint.json does not match its checksum; step_00000002"
        in messages[0]
    )
    assert [path.name for path in list_checkpoints(run_folder)] == ["step_00000002", "step_00000004"]


class RunsCode:
    """Pickled, it makes a file where it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_strangers_pickle_is_not_run(stage, shard_folders, config_file, run_folder, tmp_path):
    """At the layout of the save and at another, its checksums in order."""
    for checkpoint in list_checkpoints(run_folder):
        for path in checkpoint.glob("*.pt"):
            torch.save(torch.load(path, weights_only=False) | {"more": RunsCode(tmp_path / "code ran")}, path)
        names = [line.split("  ")[1] for line in (checkpoint / CHECKSUMS).read_text().splitlines()]
        (checkpoint / CHECKSUMS).write_text("".join(f"{sha256_file(checkpoint / name)}  {name}\n" for name in names))
    more = ["--set", f"zero_optimization.stage={stage}"]
    messages = run_ranks(refusal_of, 2, arguments(shard_folders, config_file, run_folder, *more))
    assert "refused because it contains posix.mkdir" in messages[0]
    with pytest.raises(ValueError, match=r"refused because it contains posix\.mkdir"):
        tensor_reader(checkpoint)
    assert not (tmp_path / "code ran").exists()
    with open(next(checkpoint.glob("*optim_states.pt")), "rb") as file:  # the pickle does what it says
        torch.load(file, weights_only=False)
    assert (tmp_path / "code ran").exists()


def test_what_is_kept(shard_folders, config_file, tmp_path):
    """The last checkpoint and every second one are kept; the rest of a killed save is removed."""
    output = tmp_path / "run"
    more = ["--steps", "5", "--save-interval", "1", "--keep-checkpoints", "1", "--keep-every", "2"]
    argv = arguments(shard_folders, config_file, output, *more)
    with claimed_run_folder(prepare(argv, 2)):
        pass
    (output / "checkpoints/step_00000003.tmp").mkdir(parents=True)
    (output / "checkpoints/step_00000003.tmp/mp_rank_00_model_states.pt").write_bytes(b"half")
    run_ranks(run_training, 2, argv)
    assert [path.name for path in list_checkpoints(output)] == ["step_00000002", "step_00000004", "step_00000005"]
    assert not list((output / "checkpoints").glob("*.tmp"))


ON_A_SMALL_DISK = """
mount -t tmpfs -o size={size} none {disk} || exit 77
{command}
code=$?
cp -r {disk}/run/checkpoints {copy}
exit $code
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints_before_it_whole(shard_folders, config_file, tmp_path):
    """24 MB hold two checkpoints of 9 MB and not a third."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    command = [sys.executable, "-m", "pretrain.train"]
    command += arguments(shard_folders, config_file, disk / "run", "--save-interval", "1")
    script = ON_A_SMALL_DISK.format(size="24m", disk=disk, copy=copy, command=" ".join(command))
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    if result.returncode in (1, 77):
        pytest.skip(f"a user may not mount a disk here: {result.stderr}")
    assert result.returncode == 2, result.stderr
    (error,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert f"error: {disk}/run/checkpoints/step_00000003 could not be written (" in error
    assert "Make room and run the same command again" in error
    whole = sorted(copy.glob("step_????????"))
    assert [path.name for path in whole] == ["step_00000001", "step_00000002"]
    assert [damaged_files(path) for path in whole] == [[], []]


NUM_KILLS = 20


@pytest.mark.slow
def test_killed_again_and_again_the_end_is_the_same(shard_folders, config_file, tmp_path):
    """kill -9 of both ranks at twenty random moments, ten of them in a save that has begun; every step has one. No
    checkpoint is ever half there. Measured: 89 s on 2 busy cores, 10 saves half done, resumes from 18 different steps.
    """
    (tmp_path / "model.json").write_text(json.dumps(SMALL_MODEL))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["--model", str(tmp_path / "model.json"), "--steps", str(5 * NUM_KILLS), "--eval-interval", "100000"]
    run_ranks(run_training, 2, arguments(shard_folders, config_file, whole, *more))
    saving = arguments(shard_folders, config_file, killed, *more, "--save-interval", "1")
    moments, num_partial = random.Random(0), 0
    for index in range(NUM_KILLS):
        before = newest(killed)
        ranks = fork_ranks(saving)
        wait_until(lambda number=index: len(starts(killed)) > number, ranks)
        if index % 4:  # the others may be killed before their first step
            wait_until(lambda step=before: newest(killed) > step, ranks)
        if index % 2:
            wait_until(lambda: list(killed.glob("checkpoints/*.tmp")), ranks, 0.001)
            time.sleep(moments.uniform(0, 0.03))
        else:
            time.sleep(moments.uniform(0, 0.6))
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [-signal.SIGKILL] * 2
        num_partial += bool(list(killed.glob("checkpoints/*.tmp")))
        assert not [problem for checkpoint in list_checkpoints(killed) for problem in damaged_files(checkpoint)]
    last = fork_ranks(saving)
    for rank in last:
        rank.join(240)
    assert [rank.exitcode for rank in last] == [0, 0]
    print(f"{num_partial} of {NUM_KILLS} kills left a save half done; the starts went on from {starts(killed)}")
    assert num_partial >= 5 and len(set(starts(killed))) > 5
    assert losses(killed) == losses(whole)
    found, expected = state(killed), state(whole)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def fork_ranks(argv: list[str]) -> list[multiprocessing.process.BaseProcess]:
    """Two ranks, forked from a process that has already imported all: a start costs two seconds instead of ten."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["pretrain.train"])
    port = free_ports(1)[0]
    ranks = [server.Process(target=be_rank, args=(argv, rank, port)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


def be_rank(argv: list[str], rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    main(argv)


def wait_until(holds: Callable[[], object], ranks: list, pause_s: float = 0.02) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline and ranks[0].is_alive()
        time.sleep(pause_s)


def starts(run: Path) -> list[int]:
    """The steps that a run's starts went on from."""
    path = run / "launches.jsonl"
    return [row["step"] for row in read_rows(path)] if path.exists() else []


def newest(run: Path) -> int:
    """The step of a run's newest checkpoint, 0 without one."""
    return max((int(path.name.removeprefix("step_")) for path in list_checkpoints(run)), default=0)
