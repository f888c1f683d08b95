"""Hosts of our own on this machine: network namespaces with an address each, joined by a bridge. For root.

A host has its own address, name, and folder /tmp/ray; all see one disk besides. Its cable can be pulled.
Nothing outside 10.77.0.0/24 can be reached from there, nor anything there from outside.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_SUBNET = "10.77.0"
_ENTER = 'mkdir -p "$1" /tmp/ray && mount --bind "$1" /tmp/ray && hostname "$2" && shift 2 && exec "$@"'
_FOREIGN = ("RAY_", "MLFLOW_", "AWS_", "PG")


def is_possible() -> bool:
    """Whether this process may make hosts."""
    return os.geteuid() == 0 and shutil.which("ip") is not None


@dataclass
class Host:
    """One host.

    Attributes:
        name: what `hostname` says there.
        address: the one that others reach it by.
        namespace: name of its network namespace.
        folder: for its logs and its /tmp/ray.
        environment: variables that its programs get, besides those of this process that are not about services.
    """

    name: str
    address: str
    namespace: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    _programs: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str | Path, log: str, **environment: str) -> subprocess.Popen[bytes]:
        """A program on this host; what it prints is appended to the file `log` of its folder."""
        with (self.folder / log).open("ab") as file:
            program = subprocess.Popen(
                self._entering(command), env=self._variables(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        self._programs.append(program)
        return program

    def run(self, *command: str | Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """A program on this host, waited for; its output is kept."""
        return subprocess.run(
            self._entering(command),
            env=self._variables(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def kill(self) -> None:
        """As when the power goes: no program gets to say anything."""
        while pids := _output("ip", "netns", "pids", self.namespace).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        while self._programs:
            self._programs.pop().wait()

    def runs(self, name: str) -> bool:
        """Whether a program with this in its command line is running there."""
        return any(name in _command_line(pid) for pid in _output("ip", "netns", "pids", self.namespace).split())

    def listening(self) -> dict[int, str]:
        """The TCP ports that are open on this host, and the addresses at which they are."""
        found: dict[int, str] = {}
        for line in _output("ip", "netns", "exec", self.namespace, "ss", "-Hltn").splitlines():
            address, _, port = line.split()[3].rpartition(":")
            found[int(port)] = f"{found.get(int(port), '')} {address}".strip()
        return found

    def _entering(self, command: tuple[str | Path, ...]) -> list[str | Path]:
        apart = ["unshare", "--mount", "--uts", "--propagation", "private"]
        inside = ["sh", "-c", _ENTER, "sh", self.folder / "ray", self.name]
        return ["ip", "netns", "exec", self.namespace, *apart, *inside, *command]

    def _variables(self, more: Mapping[str, str]) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        return {**ours, "HOME": str(self.folder), **self.environment, **more}


class Network:
    """The hosts and the bridge between them; `close` removes all of it, with the programs that run there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prefix = f"sagsm-{os.getpid()}"
        self._bridge = f"{self._prefix}-bridge"
        self.hosts: dict[str, Host] = {}
        _ip("netns", "add", self._bridge)
        _ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "bridge", "up")

    def add(self, name: str) -> Host:
        """A new host; the first one has the address 10.77.0.1. The name has at most 15 characters."""
        number = len(self.hosts) + 1
        host = Host(name, f"{_SUBNET}.{number}", f"{self._prefix}-{name}", self._folder / name)
        host.folder.mkdir()
        self.hosts[name] = host
        _ip("netns", "add", host.namespace)
        _ip("-n", self._bridge, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        _ip("-n", self._bridge, "link", "set", name, "master", "bridge", "up")
        _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", host.namespace, "link", "set", link, "up")
        return host

    def cut(self, host: Host) -> None:
        """Pull the cable: nothing comes or goes, and nobody is told."""
        _ip("-n", self._bridge, "link", "set", host.name, "down")

    def join(self, host: Host) -> None:
        """Put the cable back."""
        _ip("-n", self._bridge, "link", "set", host.name, "up")

    def close(self) -> None:
        """Kill all programs and remove the namespaces; with them go the links."""
        for host in self.hosts.values():
            host.kill()
            _ip("netns", "del", host.namespace)
        _ip("netns", "del", self._bridge)

    def logs(self) -> Iterator[Path]:
        """What the programs have printed, for a message."""
        for host in self.hosts.values():
            yield from sorted(host.folder.glob("*.log"))


def _command_line(pid: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""  # it has just ended


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
