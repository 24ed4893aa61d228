"""A real Slurm on this one machine: munged, slurmctld and a few slurmd, in a folder of its own.

Choices: the daemons run in the foreground as children of this process, so that ending them needs no pid files and can
touch nobody else's; no systemd, cgroups, accounting or network; more CPUs, memory and GPUs are declared than there are
(a GPU is a link to /dev/null). Root only: slurmd changes user. Written for Slurm 22.05 (Debian 12).

By hand: `python -m tests.slurm.cluster` starts one and prints the SLURM_CONF to export; Ctrl-C ends it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.launch.namespaces import Network

T = TypeVar("T")

HOSTS = Path("/etc/hosts")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
SEARCH_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # Debian keeps the daemons there
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")

_CONF = """
ClusterName=testcluster
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire: a requeued job waits this long before it starts again; 5 s is the least
AuthInfo=socket={dir}/munge.socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerParameters=sched_interval=5,sched_min_interval=0,bf_interval=5,batch_sched_delay=0,defer_batch
ReturnToService=2
MinJobAge=3600
KillWait=5
MailProg=/bin/true
{node_lines}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

_NODE = (
    "NodeName=node{number} NodeHostname={host} NodeAddr={address} Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=8000 Gres=gpu:h100:{gpus}"
)


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]
    if missing:
        return f"no {', '.join(missing)}: run tests/slurm/install_packages.sh"
    if os.geteuid() != 0:
        return "a Slurm test cluster needs root"
    return None


@dataclass(frozen=True)
class SlurmJob:
    """What `scontrol show job` says of a job, the fields that tests ask for."""

    state: str
    exit_code: int
    signal: int
    restarts: int


@dataclass
class SlurmCluster:
    """Start and stop it as a context manager."""

    directory: Path
    nodes: int = 2
    cpus: int = 8  # declared per node
    gpus: int = 8  # pretended per node
    network: Network | None = None  # a namespace for each node; None: all on loopback
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop()

    @property
    def conf(self) -> Path:
        return self.directory / "slurm.conf"

    @property
    def env(self) -> Mapping[str, str]:
        """The environment in which Slurm's programs talk to this cluster."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return {**outer, "PATH": SEARCH_PATH, "SLURM_CONF": str(self.conf)}

    def slurm(self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """One of Slurm's programs; its output. Raises with its error output where it fails."""
        done = subprocess.run(
            command, cwd=cwd, env={**self.env, **(env or {})}, capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> int:
        """Submit; the job's id."""
        return int(self.slurm("sbatch", "--parsable", *arguments, cwd=cwd, env=env).split(";")[0])

    def job(self, job_id: int) -> SlurmJob:
        fields = dict(
            word.split("=", 1) for word in self.slurm("scontrol", "show", "job", str(job_id)).split() if "=" in word
        )
        code, signal = fields["ExitCode"].split(":")
        return SlurmJob(fields["JobState"], int(code), int(signal), int(fields["Restarts"]))

    def wait(self, job_id: int, *states: str, timeout_s: float = 60) -> SlurmJob:
        """Until the job is in one of the states; without any, until it has ended."""
        return poll(
            lambda: job if (job := self.job(job_id)).state in (states or FINISHED) else None,
            timeout_s,
            lambda: f"job {job_id} is {self.job(job_id)}",
        )

    def _start(self) -> None:
        for name in ("state", "dev"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o755)
        self._write_files()
        self._resolve_node_names()
        private = self.directory / "munge"
        private.mkdir(mode=0o700)
        key = private / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        munge = {name: private / f"munge.{name}" for name in ("seed", "log", "pid")}
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.directory}/munge.socket",
            f"--pid-file={munge['pid']}", f"--seed-file={munge['seed']}", f"--log-file={munge['log']}",
        )  # fmt: skip
        socket_file = self.directory / "munge.socket"
        poll(lambda: socket_file.exists() or None, 20, lambda: "munged opened no socket")
        self._daemon("slurmctld", "-D", "-f", str(self.conf))
        for node in range(1, self.nodes + 1):
            (self.directory / f"spool-node{node}").mkdir()
            inside = self.network.nodes[node - 1].inside() if self.network else []
            self._daemon("slurmd", "-D", "-f", str(self.conf), "-N", f"node{node}", inside=inside)
        poll(lambda: self._idle_nodes() == self.nodes or None, 60, self._last_errors)

    def _idle_nodes(self) -> int:
        with contextlib.suppress(RuntimeError):  # the controller does not answer yet
            return self.slurm("sinfo", "-h", "-N", "-o", "%N %T").split().count("idle")
        return 0

    def _write_files(self) -> None:
        first = _free_ports(self.nodes + 1)
        self.conf.write_text(
            _CONF.format(
                host=_hostname(), dir=self.directory, port=first, controller=self._address(0),
                node_lines="\n".join(
                    _NODE.format(
                        number=node, host=_hostname(), address=self._address(node), port=first + node,
                        cpus=self.cpus, gpus=self.gpus,
                    )
                    for node in range(1, self.nodes + 1)
                ),
            )
        )  # fmt: skip
        # Slurm counts only GPUs that have a device file
        for gpu in range(self.gpus):
            (self.directory / "dev" / f"gpu{gpu}").symlink_to("/dev/null")
        devices = f"{self.directory}/dev/gpu[0-{self.gpus - 1}]"
        (self.directory / "gres.conf").write_text(f"Name=gpu Type=h100 File={devices}\n")

    def _address(self, node: int) -> str:
        """Of a node, from 1; of the controller: 0."""
        if self.network is None:
            return "127.0.0.1"
        return self.network.nodes[node - 1].address if node else self.network.address

    @property
    def _hosts_mark(self) -> str:
        return f"# slurm test cluster {self.directory}"

    def _resolve_node_names(self) -> None:
        """Jobs reach their peers under the names that Slurm gives them; Slurm itself needs the machine's own name."""
        names = {f"node{node}": self._address(node) for node in range(1, self.nodes + 1)}
        try:
            socket.gethostbyname(_hostname())
        except OSError:
            names[_hostname()] = "127.0.0.1"
        # appended in place: in a container the file is mounted and cannot be replaced
        with HOSTS.open("a") as hosts:
            hosts.writelines(f"{address} {name} {self._hosts_mark}\n" for name, address in names.items())

    def _daemon(self, program: str, *arguments: str, inside: Sequence[str] = ()) -> None:
        path = shutil.which(program, path=SEARCH_PATH)
        assert path is not None, program
        with (self.directory / "daemons.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    [*inside, path, *arguments], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )

    def _last_errors(self) -> str:
        lines = [line for log in sorted(self.directory.glob("*.log")) for line in log.read_text().splitlines()]
        return "the nodes did not become idle: " + "\n".join(
            line for line in lines if "error" in line or "fatal" in line
        )

    def _stop(self) -> None:
        """Jobs first, while there is a controller to end them cleanly; then the daemons, the last one first."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self.slurm("scancel", "--user=root", "--quiet")
            poll(lambda: None if self.slurm("squeue", "-h") else True, 15, lambda: "jobs are still there")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        others = [line for line in HOSTS.read_text().splitlines() if not line.endswith(self._hosts_mark)]
        HOSTS.write_text("\n".join(others) + "\n")


def poll(ready: Callable[[], T | None], timeout_s: float, describe: Callable[[], str]) -> T:
    """The first answer that is not None; a TimeoutError with the description after the deadline."""
    deadline = time.monotonic() + timeout_s
    while (value := ready()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s: {describe()}")
        time.sleep(0.2)
    return value


def _hostname() -> str:
    return socket.gethostname().split(".")[0]


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that are free now, below the range the kernel gives away."""
    for first in range(17000 + os.getpid() % 1000, 30000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(contextlib.closing(socket.socket())).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")


@contextlib.contextmanager
def running_cluster(*, nodes: int = 2, network: Network | None = None) -> Iterator[SlurmCluster]:
    """A cluster in a folder with a short name: the path of a socket may have 107 characters."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as directory,
        SlurmCluster(Path(directory), nodes, network=network) as cluster,
    ):
        yield cluster


if __name__ == "__main__":
    if reason := why_not():
        raise SystemExit(reason)
    with running_cluster() as hand_started:
        print(f"export SLURM_CONF={hand_started.conf}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
