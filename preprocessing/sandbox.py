"""Running a program on hostile input: limits, an environment without secrets, no network where the kernel grants that.

Each layer holds alone, and one that this machine does not offer is left out: `sandbox_layers` and `missing_layers` say so. What
the program may open is for its command line to say (see `decode.py`).
"""

import fcntl
import functools
import math
import os
import resource
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

MAX_MESSAGE_BYTES = 16 << 20
# ffmpeg 9 maps 0.56 GB at most for the clips of the tests; a video of 2^26 pixels a frame needs some GB.
_MAX_ADDRESS_BYTES = 4 << 30
_MAX_OPEN_FILES = 64
_PIPE_BYTES = 1 << 20
_IDLE_SECONDS = 0.2
_CPU_TOLERANCE_SECONDS = 0.25  # the kernel's books differ a little
_PROBE_SECONDS = 20
_NO_NETWORK = "no network"
_NO_NEW_PRIVILEGES = "no new privileges"
_LIMITS = "limits of processor time, memory, open files and messages"
_ALWAYS = ("protocols and formats that open no other file", "own process group", "clean environment", _LIMITS)
# Each takes a command as its last words; the first of a group that works is used.
_NETWORK_PREFIXES = (("unshare", "--net", "--"), ("unshare", "--user", "--map-root-user", "--net", "--"))
_PRIVILEGE_PREFIX = ("setpriv", "--no-new-privs", "--")


class TimeLimitError(Exception):
    """The program took longer than it was given; the text says which limit."""


class MessageLimitError(Exception):
    """The program printed more than `MAX_MESSAGE_BYTES` of messages."""


class SandboxedProcess:
    """A running program; see `start_sandboxed`."""

    def __init__(self, process: subprocess.Popen[bytes], messages: IO[bytes], timeout_seconds: float) -> None:
        self._process = process
        self._messages = messages
        self._timeout_seconds = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds

    @property
    def pid(self) -> int:
        """Of the program, which leads a process group of that number."""
        return self._process.pid

    def chunks(self) -> Iterator[bytes]:
        """The standard output as it comes; an empty chunk whenever nothing has come for a while.

        Raises:
            TimeLimitError: if the time is over.
            MessageLimitError: if there are too many messages.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while True:
                if time.monotonic() > self._deadline:
                    raise TimeLimitError(f"took longer than {self._timeout_seconds:g} s")
                if os.fstat(self._messages.fileno()).st_size >= MAX_MESSAGE_BYTES:
                    raise MessageLimitError(f"printed more than {MAX_MESSAGE_BYTES} bytes of messages")
                if not selector.select(timeout=_IDLE_SECONDS):
                    yield b""
                    continue
                chunk = os.read(descriptor, _PIPE_BYTES)
                if not chunk:
                    return
                yield chunk

    def messages(self) -> list[str]:
        """The lines printed on standard error so far."""
        data = os.pread(self._messages.fileno(), MAX_MESSAGE_BYTES, 0)
        return data.decode("utf-8", "replace").splitlines()

    def wait(self) -> int:
        """Wait for the end, after `chunks` has ended; returns the exit code, negative for a signal.

        Raises:
            TimeLimitError: if the program closed its output but does not end, or used up its processor time.
            MessageLimitError: if there are too many messages.
            ChildProcessError: if it was killed from outside, or a layer of the sandbox that held before failed to start.
        """
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() > self._deadline:
                raise TimeLimitError(f"closed its output but did not end within {self._timeout_seconds:g} s")
            time.sleep(0.001)
        # Before it is reaped: its number is still its own, and /proc still knows its times.
        cpu_seconds = _cpu_seconds(self.pid)
        _kill_group(self.pid)
        return_code = self._process.wait()
        used_up = return_code == -signal.SIGXCPU or cpu_seconds >= _cpu_limit(self._timeout_seconds) - _CPU_TOLERANCE_SECONDS
        if return_code != 0 and used_up:
            raise TimeLimitError(f"used more than {_cpu_limit(self._timeout_seconds)} s of processor time")
        if return_code == -signal.SIGXFSZ:
            raise MessageLimitError(f"printed more than {MAX_MESSAGE_BYTES} bytes of messages")
        if return_code == -signal.SIGKILL:
            raise ChildProcessError(f"process {self.pid} was killed from outside (out of memory?)")
        if return_code != 0 and (lines := self.messages()) and lines[-1].startswith(("unshare: ", "setpriv: ")):
            raise ChildProcessError(f"the sandbox could not be set up: {lines[-1]}")
        return return_code


@contextmanager
def start_sandboxed(command: Sequence[str], timeout_seconds: float) -> Iterator[SandboxedProcess]:
    """Start a program in the sandbox; when the block ends, it and what it started are gone.

    It gets no input, no variables but PATH, LC_ALL and LD_LIBRARY_PATH, the folder /, and a process group of its own. The
    limits are set just after it has started: wall-clock time, a second more of processor time, 4 GiB of address space, 64 open
    files, 16 MiB of messages, no core dump.

    Args:
        command: the program's absolute path and its arguments; no shell is involved.
        timeout_seconds: from now on.

    Raises:
        OSError: if it cannot be started.
    """
    environment = {"PATH": os.defpath, "LC_ALL": "C"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            [*_network_prefix(), *_privilege_prefix(), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            _limit(process.pid, timeout_seconds)
            with suppress(OSError):  # above the user's quota; the usual size serves as well
                fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            yield SandboxedProcess(process, messages, timeout_seconds)
        finally:
            if process.returncode is None:
                _kill_group(process.pid)
                process.wait()
            process.stdout.close()


@functools.cache
def sandbox_layers() -> tuple[str, ...]:
    """What protects this machine from a hostile video, in words, as found out by trying; asked once a process.

    Example:
        >>> sandbox_layers()[:3]
        ('protocols and formats that open no other file', 'own process group', 'clean environment')
    """
    layers = list(_ALWAYS)
    if _privilege_prefix():
        layers.append(_NO_NEW_PRIVILEGES)
    if _network_prefix():
        layers.append(_NO_NETWORK)
    return tuple(layers)


def missing_layers() -> tuple[str, ...]:
    """The layers that this machine does not offer."""
    return tuple(name for name in (_NO_NEW_PRIVILEGES, _NO_NETWORK) if name not in sandbox_layers())


@functools.cache
def _network_prefix() -> tuple[str, ...]:
    """The words before a command that give it a network namespace with nothing but a loopback device that is down."""
    for prefix in _NETWORK_PREFIXES:
        devices = _try((*prefix, "cat", "/proc/net/dev"))
        if devices is not None and [line.split(":")[0].strip() for line in devices.splitlines()[2:]] == ["lo"]:
            return _absolute(prefix)
    return ()


@functools.cache
def _privilege_prefix() -> tuple[str, ...]:
    """The words before a command after which it gains nothing from programs with the setuid bit."""
    status = _try((*_PRIVILEGE_PREFIX, "cat", "/proc/self/status"))
    return _absolute(_PRIVILEGE_PREFIX) if status is not None and "NoNewPrivs:\t1" in status else ()


def _absolute(prefix: Sequence[str]) -> tuple[str, ...]:
    return (shutil.which(prefix[0]) or prefix[0], *prefix[1:])


def _try(command: Sequence[str]) -> str | None:
    """The output of a command; None if it does not end well."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PROBE_SECONDS, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")


def _kill_group(pid: int) -> None:
    """End a process that was not reaped yet, and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _cpu_limit(timeout_seconds: float) -> int:
    return math.ceil(timeout_seconds) + 1


def _limit(pid: int, timeout_seconds: float) -> None:
    """Set the limits from outside: code between fork and exec is not safe in a process with threads."""
    cpu = _cpu_limit(timeout_seconds)
    limits = {
        resource.RLIMIT_CPU: (cpu, cpu + 2),
        resource.RLIMIT_AS: (_MAX_ADDRESS_BYTES, _MAX_ADDRESS_BYTES),
        resource.RLIMIT_FSIZE: (MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES),
        resource.RLIMIT_NOFILE: (_MAX_OPEN_FILES, _MAX_OPEN_FILES),
        resource.RLIMIT_CORE: (0, 0),
    }
    # It has ended already, or the hard limits that it was started with are lower than ours.
    for kind, (soft, hard) in limits.items():
        with suppress(ProcessLookupError):
            highest = resource.prlimit(pid, kind)[1]
            if highest != resource.RLIM_INFINITY:
                soft, hard = min(soft, highest), min(hard, highest)
            resource.prlimit(pid, kind, (soft, hard))


def _cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, user and system; 0 where /proc does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
