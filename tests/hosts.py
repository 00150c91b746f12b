"""Hosts on this machine, for tests: each has its own network, name, processes and sshd; a virtual cable joins two.

They are namespaces of the kernel, so it takes root. Nothing outside of them is changed: /run, /etc/hosts and
/etc/ssh/ssh_config are theirs alone, and when a host's sshd is killed all its processes go with it.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])  # where Debian keeps ip and daemons
PROGRAMS = ("unshare", "nsenter", "ip", "sshd", "ssh", "ssh-keygen", "pdsh")
ADDRESSES = {"host1": "10.77.0.1", "host2": "10.77.0.2"}

BOOT = """
set -e
hostname {name}
mount -t tmpfs none /run
mkdir -m 755 /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
ip link set lo up
exec {sshd} -D -e -f {folder}/sshd_config
"""
SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
"""
SSH_CONFIG = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def why_no_hosts() -> str | None:
    """What is missing for such hosts here, if anything is."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=PATH)]:
        return f"no {', '.join(missing)} here; `make test-slurm` installs them on Debian"
    trial = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "ip", "link", "add", "type", "veth"]
    result = subprocess.run(trial, env={**os.environ, "PATH": PATH}, capture_output=True, text=True, check=False)
    return f"no network namespaces here: {result.stderr.strip()}" if result.returncode else None


class Host:
    """One host: `command` is how a command line runs on it."""

    def __init__(self, name: str, folder: Path):
        self.name, self.log = name, folder / f"{name}.log"
        script = BOOT.format(name=name, folder=folder, sshd=shutil.which("sshd", path=PATH))
        namespaces = ("--net", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                ["unshare", *namespaces, "bash", "-c", script],
                **{"env": {**os.environ, "PATH": PATH}, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log},
                start_new_session=True,
            )
        self._wait_for("Server listening")
        self.pid = int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text())

    def command(self, *command: object, folder: str | Path = "/") -> list[str]:
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--pid", "--mount"]
        return [*enter, "env", f"--chdir={folder}", *map(str, command)]

    def plug_in(self, end: str) -> None:
        """Makes one end of a cable this host's network."""
        run("ip", "link", "set", end, "netns", str(self.pid))
        for change in (
            f"link set {end} name eth0",
            f"addr add {ADDRESSES[self.name]}/24 dev eth0",
            "link set eth0 up",
        ):
            run(*self.command("ip", *change.split()))

    def set_cable(self, state: str) -> None:
        """ "up" or "down": what pulling the cable does."""
        run(*self.command("ip", "link", "set", "eth0", state))

    def stop(self) -> None:
        self.process.kill()  # --kill-child: and with it all that runs on the host
        self.process.wait()

    def _wait_for(self, line: str) -> None:
        deadline = time.monotonic() + 20
        while line not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not come up: {self.log.read_text()}")
            time.sleep(0.05)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    folder.chmod(0o755)
    hosts: list[Host] = []
    try:
        for key in ("key", "host_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in ADDRESSES.items()))
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
        (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        for name in ADDRESSES:
            hosts.append(Host(name, folder))
        ends = [f"cable{os.getpid() % 100000}{side}" for side in "ab"]
        run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, end in zip(hosts, ends, strict=True):
            host.plug_in(end)
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.stop()
        shutil.rmtree(folder)


def run(*command: str) -> None:
    subprocess.run(command, env={**os.environ, "PATH": PATH}, check=True, timeout=30)
