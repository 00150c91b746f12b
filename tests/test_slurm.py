"""The jobs in slurm/ on a real Slurm with two nodes: from text to a table, and what becomes of a job that is told to
go, cancelled, preempted, or loses a node. As root the nodes are two hosts with a network between them.

One run that nobody disturbs (`undisturbed`, made by submit_all.sh) is what all others have to equal bit for bit.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from data_prep import build, corpus
from pretrain.checkpoint_reader import MOMENTS, find_checkpoint, tensor_reader
from pretrain.metrics_file import read_metrics, read_rows
from tests.hosts import two_hosts, why_no_hosts
from tests.pretrain.test_train import CONFIG
from tests.slurm_cluster import SlurmCluster, kill, missing_programs, processes_with, slurm_cluster

ROOT = Path(__file__).parents[1]
NUM_STEPS = (100, 20)  # of the two phases; the first is long enough to be disturbed in its midst
MODEL = {
    "vocab_size": 500,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)} here; on Debian `make test-slurm` installs them as root")
    with two_hosts() if why_no_hosts() is None else nullcontext(()) as hosts, slurm_cluster(*hosts) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, str]:
    """Text, GLUE files, a tiny model, and all that the jobs take from the environment."""
    folder = tmp_path_factory.mktemp("site")
    for split, names in (("text", sorted(topics)[::2]), ("heldout", sorted(topics)[1::20])):
        (folder / split).mkdir()
        for name in names:
            (folder / split / f"{name}.txt").write_text(topics[name])
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for split, size in (("train", 64), ("dev", 16)):
        pairs = [(f"The {name} statement", f"It is {name}.", i % 2) for i, name in enumerate(sorted(topics)[:size])]
        for task, rows in {
            "CoLA": [f"src\t{label}\t\t{first}" for first, _, label in pairs],
            "RTE": ["sentence1\tsentence2\tlabel"]
            + [f"{first}\t{second}\t{'not_' * label}entailment" for first, second, label in pairs],
        }.items():
            path = folder / "glue" / task / f"{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(rows) + "\n")
        questions = [
            {"id": first, "question": f"What is {first}?", "is_impossible": bool(label),
             "answers": [] if label else [{"text": second[6:-1], "answer_start": 6}]}
            for first, second, label in pairs
        ]  # fmt: skip
        paragraphs = [{"context": pair[1], "qas": [question]} for pair, question in zip(pairs, questions, strict=True)]
        path = folder / "squad" / f"{split}-v2.0.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"data": [{"title": "statements", "paragraphs": paragraphs}]}))
    return {
        **{"PYTHON": sys.executable, "WORK": f"{folder}/work", "SBATCH_TIMELIMIT": "30"},
        **{"GPUS_PER_NODE": "0", "TASKS_PER_NODE": "2", "CPUS_PER_TASK": "1", "NODES": "2", "TP": "2"},
        **{"TEXT": f"{folder}/text", "HELDOUT_TEXT": f"{folder}/heldout", "SLICES": "4", "WORKERS": "1"},
        **{"LENGTHS": "32 64", "PREDICTIONS": "5 10", "BUILD_OPTIONS": "--duplicates 2"},
        **{"VOCAB_OPTIONS": "--type wordpiece --size 500", "STEPS": " ".join(map(str, NUM_STEPS))},
        **{"MODEL": f"{folder}/model.json", "CONFIGS": f"{folder}/config.json {folder}/config.json"},
        "TRAIN_OPTIONS": "--log-interval 1 --save-interval 100000",
        **{
            "GLUE": f"{folder}/glue",
            "SQUAD": f"{folder}/squad",
            "GLUE_TASKS": "CoLA RTE",
            "SQUAD_TASKS": "squad2",
            "SEEDS": "0 1",
            "GLUE_OPTIONS": "--epochs 1 --seq-length 64",
            "SQUAD_OPTIONS": "--epochs 1 --seq-length 64 --doc-stride 16 --max-query-length 24",
        },
    }


@pytest.fixture(scope="module")
def all_jobs(cluster, site) -> dict[str, str]:
    """The ids that submit_all.sh printed, once its last job has ended."""
    printed = cluster.run("slurm/submit_all.sh", **site)
    jobs = dict(re.findall(r"(data|phase 1|phase 2|glue table|squad table) (\d+)", printed))
    assert list(jobs) == ["data", "phase 1", "phase 2", "glue table", "squad table"], printed
    for name, job in jobs.items():
        assert cluster.wait(job, timeout=400) == "COMPLETED", f"{name}: {failures(site['WORK'])}"
    return jobs


def failures(work: str) -> list[str]:
    """What the jobs that failed said last."""
    return [line for path in Path(work, "logs").iterdir() for line in path.read_text().splitlines() if "failed" in line]


@pytest.fixture(scope="module")
def undisturbed(all_jobs, site) -> Path:
    return Path(site["WORK"], "pretrain_large")


def steps(run: Path) -> int:
    """Steps that phase 1 has logged so far."""
    return len(read_metrics(run / "phase1", "train")) if (run / "phase1/metrics.jsonl").exists() else 0


def wait_for_steps(cluster: SlurmCluster, job: str, run: Path, more: int = 5) -> None:
    """Until a job's phase 1 has logged `more` steps than now."""
    due, deadline = steps(run) + more, time.monotonic() + 180
    while steps(run) < due:
        state = cluster.job(job)["JobState"]
        assert state in ("RUNNING", "PENDING", "COMPLETING") and time.monotonic() < deadline, cluster.output(job)[
            -3000:
        ]
        time.sleep(0.2)


def wait_for_try(cluster: SlurmCluster, job: str, number: int, timeout: float = 120) -> None:
    """Until a job runs for the `number`-th time after its first."""
    deadline = time.monotonic() + timeout
    while (int((shown := cluster.job(job))["Restarts"]), shown["JobState"]) != (number, "RUNNING"):
        assert time.monotonic() < deadline, f"{shown['JobState']}: {cluster.output(job)[-3000:]}"
        time.sleep(0.3)


def launches(run: Path, phase: int = 1) -> list[int]:
    """The step at which each launch of a phase went on."""
    return [row["step"] for row in read_rows(run / f"phase{phase}" / "launches.jsonl")]


def assert_same_run(run: Path, other: Path) -> None:
    """Weights and moments of the last checkpoints of both phases, bit for bit."""
    for phase, num_steps in enumerate(NUM_STEPS, start=1):
        assert json.loads((run / f"phase{phase}/finished.json").read_text()) == {"step": num_steps}
        (names, read), (_, expected) = (tensor_reader(find_checkpoint(path / f"phase{phase}")) for path in (run, other))
        different = [name for name in names for kind in ("weight", *MOMENTS)
                     if not torch.equal(read(name, kind), expected(name, kind))]  # fmt: skip
        assert not different, f"phase {phase}"


def shard_checksums(shards: Path) -> dict[str, str]:
    """The sha256 of every shard of both lengths."""
    manifests = {length: json.loads((shards / length / "manifest.json").read_text()) for length in ("32", "64")}
    return {
        f"{length}/{entry['file']}": entry["sha256"] for length in manifests for entry in manifests[length]["shards"]
    }


def test_one_call_from_text_to_a_table(cluster, all_jobs, site):
    for name in ("glue", "squad"):
        folder = Path(site["WORK"], f"{name}_results")
        report = (folder / "report.md").read_text()
        for task in site[f"{name.upper()}_TASKS"].split():
            results = json.loads((folder / task / "results.json").read_text())
            assert results["start"] == "pretrained" and results["task"] in report
        assert "already finished: seed 0, 1" in cluster.output(all_jobs[f"{name} table"])
    assert read_metrics(Path(site["WORK"], "pretrain_large/phase1"), "eval")
    ends = [cluster.job(all_jobs[name])[time] for name in ("phase 1", "phase 2") for time in ("StartTime", "EndTime")]
    assert ends == sorted(ends), "phase 2 began before phase 1 was finished"


def test_four_slices_make_the_bytes_of_one_process(all_jobs, site, tmp_path):
    work = Path(site["WORK"])
    corpus.main(["--input", site["TEXT"], "--vocab", f"{work}/vocab", "--output", f"{tmp_path}/corpus"])
    for length, predictions in (("32", "5"), ("64", "10")):
        build.main(["--corpus", f"{tmp_path}/corpus", "--output", f"{tmp_path}/{length}", "--seq-length", length,
                    "--max-predictions", predictions, "--duplicates", "2"])  # fmt: skip
    assert shard_checksums(work / "shards") == shard_checksums(tmp_path)


def test_base_runs_both_phases_with_the_shipped_config(cluster, all_jobs, site):
    """Of which only the batch and the precision are scaled down."""
    own = {name: value for name, value in site.items() if name != "CONFIGS"}
    scale = "--set train_batch_size=16 train_micro_batch_size_per_gpu=4 bf16.enabled=false"
    job = cluster.run("slurm/pretrain_base.sh", **own | {"NODES": "1", "STEPS": "4 2", "TRAIN_OPTIONS": scale})
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)[-3000:]
    run = Path(site["WORK"], "pretrain_base")
    for phase, num_steps in ((1, 4), (2, 2)):
        assert json.loads((run / f"phase{phase}/finished.json").read_text()) == {"step": num_steps}
        assert json.loads((run / f"phase{phase}/deepspeed_config.json").read_text())["optimizer"]["params"]["lr"] > 0


def test_a_killed_slice_fails_the_chain_and_the_same_command_goes_on(cluster, all_jobs, site, tmp_path):
    again = site | {"WORK": tmp_path, "VOCAB": f"{site['WORK']}/vocab", "HELDOUT_TEXT": ""}
    last = int(cluster.run("slurm/data_prep.sh", **again))
    array = last - 1  # the jobs are submitted one after another, and an array has its first id
    cluster.wait(f"{array}_2", "RUNNING")
    deadline = time.monotonic() + 30
    while not (tasks := python_of(cluster, f"SLURM_ARRAY_JOB_ID={array}", "SLURM_ARRAY_TASK_ID=2")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for task in tasks:
        kill(task)
    assert cluster.wait(f"{array}_2") == "FAILED"
    assert cluster.wait(str(last)) == "CANCELLED"
    assert cluster.wait(cluster.run("slurm/data_prep.sh", **again)) == "COMPLETED"
    assert shard_checksums(tmp_path / "shards") == shard_checksums(Path(site["WORK"], "shards"))


def python_of(cluster: SlurmCluster, *variables: str) -> list[int]:
    """Python processes of ours that have these variables."""
    found = processes_with(cluster.mark, *variables)
    return [pid for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(sys.executable.encode())]


@contextmanager
def held(cluster: SlurmCluster, job: str, run: Path) -> Iterator[None]:
    """A job's ranks stand still in the midst of phase 1, until Slurm has warned the job."""
    wait_for_steps(cluster, job, run)
    ranks, warnings = (
        python_of(cluster, f"SLURM_JOB_ID={job}"),
        cluster.output(job).count("received the warning signal: saving"),
    )
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    yield
    deadline = time.monotonic() + 60
    while cluster.output(job).count("received the warning signal: saving") == warnings:
        assert time.monotonic() < deadline, "no warning"
        time.sleep(0.2)
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)


def test_warned_requeued_and_preempted_it_ends_as_if_undisturbed(cluster, undisturbed, site, tmp_path):
    """Plain `sbatch`, sizes in the environment alone."""
    job = cluster.run(
        *("sbatch", "--parsable", f"--output={tmp_path}/log", "slurm/pretrain_large.sh"),
        **site | {"RUN": tmp_path, "SBATCH_SIGNAL": "B:USR1@110"},
    )
    with held(cluster, job, tmp_path):  # a limit that is close enough for the warning, and far enough for the save
        running_s = time.time() - time.mktime(time.strptime(cluster.job(job)["StartTime"], "%Y-%m-%dT%H:%M:%S"))
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={math.ceil((running_s + 45) / 60)}")
    wait_for_try(cluster, job, 1)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    wait_for_steps(cluster, job, tmp_path)
    cluster.run("scontrol", "requeue", job)
    wait_for_try(cluster, job, 2)
    with held(cluster, job, tmp_path):
        urgent = cluster.run(
            *("sbatch", "--parsable", f"--output={tmp_path}/urgent", "--partition=high", "--nodes=2", "--exclusive"),
            "--wrap=true",
        )
    assert cluster.wait(urgent) == "COMPLETED"
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)[-3000:]
    assert cluster.job(urgent)["StartTime"] < cluster.job(job)["StartTime"]
    log = cluster.output(job)
    assert log.count("stopped by SIGUSR1 after step") == 2 and log.count("stopped by SIGTERM after step") == 1
    assert (
        log.count("not finished because the time limit or a preemption is near: requeued") == 2
    )  # the third time Slurm did it
    resumed = launches(tmp_path)
    assert len(resumed) == 4 and 0 == resumed[0] < resumed[1] < resumed[2] < resumed[3] < NUM_STEPS[0]
    assert launches(tmp_path, 2) == [0]
    assert_same_run(tmp_path, undisturbed)


def test_cancelled_it_stays_so_and_a_lost_node_does_not_end_it(cluster, undisturbed, site, tmp_path):
    job = cluster.run("slurm/pretrain_large.sh", **site | {"RUN": tmp_path})
    wait_for_steps(cluster, job, tmp_path)
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    time.sleep(8)  # longer than a requeued job waits
    assert cluster.job(job)["JobState"] == "CANCELLED" and cluster.job(job)["Restarts"] == "0"
    later = cluster.run("slurm/pretrain_large.sh", **site | {"RUN": tmp_path})
    wait_for_steps(cluster, later, tmp_path)
    cluster.lose_node("n2")
    deadline = time.monotonic() + 90
    while "DOWN" not in cluster.run("scontrol", "-o", "show", "node", "n2"):
        assert time.monotonic() < deadline, cluster.output(later)[-3000:]
        time.sleep(0.3)
    cluster.start_node("n2")
    assert cluster.wait(later) == "COMPLETED", cluster.output(later)[-3000:]
    assert int(cluster.job(later)["Restarts"]) == 1
    assert_same_run(tmp_path, undisturbed)


def test_an_unfinished_job_fails_and_says_why(cluster, undisturbed, site, tmp_path):
    """A rank killed; stopped by hand; a wrong option, told through a container; phase 2 without a phase 1."""
    job = cluster.run("slurm/pretrain_large.sh", **site | {"RUN": tmp_path / "run"})
    wait_for_steps(cluster, job, tmp_path / "run", more=1)
    kill(python_of(cluster, f"SLURM_JOB_ID={job}", "SLURM_PROCID=3")[0])
    started = time.monotonic()
    assert cluster.wait(job) == "FAILED" and time.monotonic() - started < 20
    assert re.search(r"failed with code \d+: .*task 3: Killed", last_line(cluster, job))
    job = cluster.run("slurm/pretrain_large.sh", **site | {"RUN": tmp_path / "run"})
    after = cluster.run("slurm/pretrain_large.sh", f"--dependency=afterok:{job}", **site | {"RUN": tmp_path / "after"})
    (tmp_path / "run/phase1/STOP").touch()
    assert cluster.wait(job) == "FAILED" and cluster.job(job)["ExitCode"] == "75:0"
    assert last_line(cluster, job).endswith("stopped before the end: submit again to resume")
    assert cluster.wait(after) == "CANCELLED"
    container = tmp_path / "apptainer"  # a stand-in that leads into no container
    container.write_text(
        '#!/bin/sh\n[ "$1 $2 $3 $4 $5 $7" = "exec --nv --bind a:b --pwd image.sif" ] && shift 7 && exec "$@"\n'
    )
    container.chmod(0o755)
    inside = {
        "CONTAINER": "apptainer",
        "IMAGE": "image.sif",
        "MOUNTS": "a:b",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    job = cluster.run("slurm/pretrain_large.sh", **site | inside | {"RUN": tmp_path / "wrong", "TP": "3"})
    assert cluster.wait(job) == "FAILED"
    assert "failed with code 2: error: 4 ranks cannot form groups of --tensor-parallel 3" in last_line(cluster, job)
    job = cluster.run("slurm/pretrain_large.sh", **site | {"RUN": tmp_path / "none", "PHASES": "2"})
    assert cluster.wait(job) == "FAILED"
    assert last_line(cluster, job).endswith(f"phase 1 in {tmp_path}/none/phase1 is not finished")


def last_line(cluster: SlurmCluster, job: str) -> str:
    return cluster.output(job).splitlines()[-1]


def test_scripts_are_clean_and_name_nothing_of_one_site():
    scripts = sorted((ROOT / "slurm").glob("*.sh"))
    for script in scripts:
        text = script.read_text()
        paths = set(re.findall(r"""[\s"'=:](/[a-z]\w*)""", text)) - {"/proc"}
        options = re.findall(r"(?:--(?:partition|account|qos)|#SBATCH -[pAq])\b", text)
        assert script.name == "env.sh" or not (paths or options), script
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here")
    subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, check=True)
