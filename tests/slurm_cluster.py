"""A real Slurm on this machine, for tests: munge, slurmctld and two slurmd without systemd, all on loopback as root or
as a user, or each node on a host of its own (tests/hosts.py) with a network between them.

Everything lives in one temporary folder, with ports of its own, and only what was started here is stopped. Debian:
`apt-get install slurmctld slurmd slurm-client munge`.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.hosts import ADDRESSES, PATH, Host
from tests.ranks import free_ports

ROOT = Path(__file__).parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")

# No cgroups, no accounting. CPUs and memory are believed, not measured. Partition `high` requeues jobs of `low`, which
# get their --signal first. cred_expire also bounds the wait before a requeued job may start again (else 120 s).
CONFIG = """
ClusterName=test
SlurmctldHost={names[0]}({addresses[0]})
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=10
SlurmdTimeout=10
SlurmctldTimeout=10
ReturnToService=2
MinJobAge=3600
NodeName=n1 NodeHostname={names[0]} NodeAddr={addresses[0]} Port={ports[1]} CPUs=4 RealMemory=8000
NodeName=n2 NodeHostname={names[1]} NodeAddr={addresses[1]} Port={ports[2]} CPUs=4 RealMemory=8000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


class SlurmCluster:
    """The daemons that run, and the commands to talk to them; every command has a time limit, and runs on n1."""

    def __init__(self, folder: Path, hosts: Sequence[Host]):
        self.folder, self.hosts = folder, dict(zip(NODES, hosts, strict=False))
        self.mark = f"SLURM_CONF={folder}/slurm.conf"  # in the environment of all that runs here
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)  # munge refuses a socket that others could not reach
        names = [host.name for host in self.hosts.values()] or [socket.gethostname().split(".")[0]] * 2
        addresses = [ADDRESSES[name] for name in names] if self.hosts else ["127.0.0.1"] * 2
        values = {"names": names, "addresses": addresses, "user": getpass.getuser(), "ports": free_ports(3)}
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, **values))
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        options = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file", "seed-file", "log-file")]
        options[0] = f"--socket={self.folder}/munge.sock"
        self.start_daemon("munged", "n1", "--foreground", f"--key-file={key}", *options)
        self._wait_until(lambda: (self.folder / "munge.sock").exists(), "munged")
        self.start_daemon("slurmctld", "n1", "-D")
        for node in NODES:
            self.start_node(node)
        self._wait_until(lambda: all(self.is_idle(node) for node in NODES), "the nodes")

    def on_node(self, node: str, *command: str) -> list[str]:
        return self.hosts[node].command(*command, folder=ROOT) if self.hosts else list(command)

    def start_daemon(self, name: str, node: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.out", "a") as log:
            self.daemons[name] = subprocess.Popen(
                self.on_node(node, shutil.which(name.split(".")[0], path=PATH), *arguments),
                **{"env": self.environment, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log},
                start_new_session=True,
            )

    def start_node(self, node: str) -> None:
        self.start_daemon(f"slurmd.{node}", node, "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """Kills a slurmd and all that runs under it, as a power cut would."""
        os.killpg(self.daemons[f"slurmd.{node}"].pid, signal.SIGKILL)
        tasks = processes_with(self.mark, f"SLURMD_NODENAME={node}")
        for pid in [*{daemon for task in tasks if (daemon := step_daemon(task))}, *tasks]:
            kill(pid)

    def is_idle(self, node: str) -> bool:
        """A node that never registered is called idle at first, too: it has no start time yet."""
        shown = self.run("scontrol", "-o", "show", "node", node, check=False)
        return "State=IDLE " in shown and "SlurmdStartTime=20" in shown

    def run(self, *command: str | Path, check: bool = True, timeout: float = 60, **environment: str | Path) -> str:
        """What a command printed, as a user of the cluster would run it; `environment` is added to ours."""
        added = {name: str(value) for name, value in environment.items()}
        result = subprocess.run(
            self.on_node("n1", *map(str, command)),
            **{"env": self.environment | added, "capture_output": True, "text": True, "timeout": timeout},
            **{"cwd": ROOT, "check": False},
        )
        assert result.returncode == 0 or not check, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Slurm's record of a job, as `scontrol show job` has it."""
        shown = self.run("scontrol", "-o", "show", "job", job).splitlines()[0]
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def wait(self, job: str, *states: str, timeout: float = 240) -> str:
        """Waits until a job is in one of `states`, or has ended. Returns the state."""
        deadline = time.monotonic() + timeout
        while (state := self.job(job)["JobState"]) not in (*states, *ENDED):
            assert time.monotonic() < deadline, f"job {job} is still {state}:\n{self.output(job)[-3000:]}"
            time.sleep(0.3)
        return state

    def output(self, job: str) -> str:
        path = Path(self.job(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def stop(self) -> None:
        """Cancels all jobs, then ends the daemons, and the steps that outlived their slurmd."""
        for options in ((), ("--signal=KILL", "--batch")):
            self.run("scancel", f"--user={getpass.getuser()}", *options, check=False, timeout=20)
        deadline = time.monotonic() + 10
        while self.run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
            time.sleep(0.3)
        for process in reversed(self.daemons.values()):
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(timeout=10)
        for pid in processes_with(self.mark):
            kill(pid)

    def _wait_until(self, condition, what: str) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            dead = [name for name, process in self.daemons.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.out"))
                raise RuntimeError(f"{what} did not come up; ended: {dead}\n{logs}")
            time.sleep(0.1)


@contextmanager
def slurm_cluster(*hosts: Host) -> Iterator[SlurmCluster]:
    """Two nodes on two hosts, or both on this machine."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has 107 characters
    cluster = SlurmCluster(folder, hosts)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


def processes_with(*variables: str) -> list[int]:
    """Processes that have all of these `NAME=value` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if set(variables) <= set(path.read_text(errors="replace").split("\0")):
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile
            pass
    return found


def step_daemon(task: int) -> int | None:
    """The slurmstepd above a task or a batch script, if that is its parent."""
    try:
        parent = int(Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[1])
        return parent if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd") else None
    except OSError:
        return None


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
