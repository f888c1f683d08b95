import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import PipelineError
from infra.tracking_spool import AwayError, Entry, Spool, decode, encode, read_left

JSON = st.dictionaries(st.text(), st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text())


class Receiver:
    """Takes entries in groups of three; away or stuck when told so; never takes an entry that is marked "bad"."""

    def __init__(self) -> None:
        self.taken: list[Entry] = []
        self.is_away = False
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def send(self, entries: Sequence[Entry]) -> int:
        self.may_go_on.wait()
        if self.is_away:
            raise AwayError("gone fishing")
        group = list(entries[:3])
        if any(entry.get("bad") for entry in group):
            raise ValueError("not this one")
        self.taken += group
        return len(group)


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def make_spool(receiver: Receiver, tmp_path: Path) -> Callable[[], Spool]:
    return lambda: Spool(tmp_path / "spool", receiver.send, "the receiver")


def journals(tmp_path: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((tmp_path / "spool").glob("*.journal"))]


@settings(max_examples=50)
@given(st.lists(JSON), st.binary(max_size=40).filter(lambda rest: b"\n" not in rest))
def test_a_journal_gives_back_what_was_written_and_no_line_that_was_cut_off(entries: list[Entry], rest: bytes) -> None:
    assert decode(b"".join(map(encode, entries)) + rest) == (entries, bool(rest))


@given(st.lists(JSON, min_size=1), st.data())
def test_a_damaged_line_costs_itself_alone(entries: list[Entry], data: st.DataObject) -> None:
    lines = [encode(entry) for entry in entries]
    index = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[index]) - 2))
    byte = data.draw(st.sampled_from(sorted(set(range(256)) - {lines[index][at], 10})))
    lines[index] = lines[index][:at] + bytes([byte]) + lines[index][at + 1 :]
    assert decode(b"".join(lines)) == (entries[:index] + entries[index + 1 :], 1)


def test_entries_arrive_in_order_and_the_journal_is_removed(
    make_spool: Callable[[], Spool], receiver: Receiver, tmp_path: Path
) -> None:
    spool = make_spool()
    entries: list[Entry] = [{"n": number} for number in range(100)]
    for entry in entries:
        spool.append(entry)
    assert spool.flush(5)
    assert receiver.taken == entries
    assert journals(tmp_path) == [b""]
    spool.close(5)
    assert journals(tmp_path) == []
    with pytest.raises(PipelineError, match="nothing more is recorded with the receiver"):
        spool.append({})


def test_a_receiver_that_hangs_holds_nobody_up(make_spool: Callable[[], Spool], receiver: Receiver) -> None:
    spool = make_spool()
    receiver.may_go_on.clear()
    started = time.monotonic()
    for number in range(50):
        spool.append({"n": number})
    assert time.monotonic() - started < 2
    assert not spool.flush(0.1)
    started = time.monotonic()
    assert not spool.flush(60), "once was enough"
    assert time.monotonic() - started < 5
    receiver.may_go_on.set()
    spool.close(5)
    assert len(receiver.taken) == 50


def test_an_absence_is_told_once_and_loses_nothing(
    make_spool: Callable[[], Spool], receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    spool = make_spool()
    receiver.is_away = True
    for number in range(10):
        spool.append({"n": number})
    started = time.monotonic()
    while spool.flush(1) or "is away" not in caplog.text:
        time.sleep(0.01)
    assert not spool.flush(60), "it is known to be away, so there is nothing to wait for"
    assert time.monotonic() - started < 5
    time.sleep(1)  # it is tried again
    receiver.is_away = False
    spool.close(10)
    assert receiver.taken == [{"n": number} for number in range(10)]
    first, second = [record.message for record in caplog.records]
    assert first.startswith("the receiver is away (gone fishing); the work goes on, and ")
    assert second.startswith("the receiver is back after ")
    assert second.endswith("; 10 records follow")


def test_what_is_never_taken_is_set_aside_alone(
    make_spool: Callable[[], Spool], receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.may_go_on.clear()
    spool = make_spool()
    for number in range(9):
        spool.append({"n": number, **({"bad": True} if number in (4, 7) else {})})
    receiver.may_go_on.set()
    assert spool.flush(5)
    assert [entry["n"] for entry in receiver.taken] == [0, 1, 2, 3, 5, 6, 8]
    kept, _ = decode((tmp_path / "spool" / "refused.txt").read_bytes())
    assert kept == [{"n": number, "bad": True, "refused": "not this one"} for number in (4, 7)]
    assert caplog.text.count("the receiver refused a record, kept in ") == 2


def test_files_are_kept_until_they_are_sent(make_spool: Callable[[], Spool], receiver: Receiver, tmp_path: Path) -> None:
    spool = make_spool()
    receiver.is_away = True
    file = spool.keep("a.txt", b"text")
    spool.append({"file": file})
    assert (spool.folder / file).read_bytes() == b"text"
    receiver.is_away = False
    spool.close(10)
    assert receiver.taken == [{"file": file}]
    assert list((tmp_path / "spool" / "files").iterdir()) == []


KILLED = """
import os, signal, sys; from pathlib import Path; from infra.tracking_spool import AwayError, Spool
def send(entries): raise AwayError("gone")
spool = Spool(Path(sys.argv[1]), send, "it")
for number in range(5): spool.append({"n": number})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_one_sends_what_a_killed_process_left(
    make_spool: Callable[[], Spool], receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", KILLED, tmp_path / "spool"]
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    (journal,) = (tmp_path / "spool").glob("*.journal")
    with journal.open("ab") as file:
        file.write(encode({"n": 5})[:-3])  # the kill came while a line was written
    spool = make_spool()
    assert not journal.exists()
    spool.append({"n": "new"})
    assert spool.flush(5)
    assert [entry["n"] for entry in receiver.taken] == [0, 1, 2, 3, 4, "new"]
    assert "1 lines that were cut off or damaged" in caplog.text
    assert "sending 5 records that an earlier run could not send" in caplog.text


def test_what_cannot_be_sent_is_kept_for_the_next_one(
    make_spool: Callable[[], Spool], receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.is_away = True
    spool = make_spool()
    spool.append({"n": 0})
    spool.close(0.2)
    assert f"1 records could not be sent to the receiver; they are kept in {spool.path}" in caplog.text
    assert decode(spool.path.read_bytes()) == ([{"n": 0}], 0)


def test_the_journal_of_a_process_at_work_is_left_alone(make_spool: Callable[[], Spool], receiver: Receiver) -> None:
    receiver.is_away = True
    first = make_spool()
    first.append({"n": 0})
    second = make_spool()
    receiver.is_away = False
    second.append({"n": 1})
    first.close(20)
    second.close(20)
    assert sorted(entry["n"] for entry in receiver.taken) == [0, 1]


FULL = """
import json, resource, sys; from pathlib import Path
from infra.errors import PipelineError
from infra.tracking_spool import AwayError, Spool
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def send(entries): raise AwayError("gone")
spool = Spool(Path(sys.argv[1]), send, "it")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
spool.append({"n": 0})
for what in (lambda: spool.append({"n": "x" * 200}), lambda: spool.keep("a", b"x" * 200)):
    try: what()
    except PipelineError as error: print(error)
spool.append({"n": 1})
"""


def test_a_full_disk_is_a_clear_error_and_breaks_no_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path / "spool"], check=True, capture_output=True, text=True)
    assert done.stdout.count("cannot write ") == 2
    assert "free some space or choose another place with --workdir" in done.stdout
    (journal,) = journals(tmp_path)
    assert decode(journal) == ([{"n": 0}, {"n": 1}], 0)


def test_no_secret_is_written_or_sent(
    receiver: Receiver, make_spool: Callable[[], Spool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "planted-token")
    receiver.may_go_on.clear()
    spool = make_spool()
    place = spool.keep("page.html", b"<p>planted-token</p>")
    spool.append({"error": "http://me:hush@host refused planted-token", "file": place, "bad": True})
    written = [path.read_bytes() for path in (tmp_path / "spool").rglob("*") if path.is_file()]
    receiver.may_go_on.set()
    spool.flush(10)
    spool.close(10)
    written += [path.read_bytes() for path in (tmp_path / "spool").rglob("*") if path.is_file()]
    assert b"http://***@host refused ***" in b"".join(written)
    assert not [data for data in written if b"hush" in data or b"planted" in data]


def test_what_ended_processes_have_left_is_read_and_stays(
    receiver: Receiver, make_spool: Callable[[], Spool], tmp_path: Path
) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from infra.tracking_spool import AwayError, Spool\n"
        "def send(entries): raise AwayError('gone')\n"
        "spool = Spool(Path(sys.argv[1]), send, 'it')\n"
        "spool.append({'n': 1, 'file': spool.keep('a.txt', b'text')}); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "spool"], check=True)
    for _ in range(2):
        left = read_left(tmp_path / "spool")
        [(name, data), (file, content)] = left.items()
        [entry], num_broken = decode(data)
        assert (name, entry["n"], entry["file"], content, num_broken) == ("0.journal", 1, file, b"text", 0)
    receiver.is_away = True
    spool = make_spool()  # takes it over, and is at work
    assert read_left(tmp_path / "spool") == {}
    spool.close(0)
