"""The sandbox: a hostile file reaches no other file and no address, and a program that runs wild is ended."""

import http.server
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from preprocessing import decode, sandbox
from preprocessing.decode import DecodeSettings, VideoRejectedError, decode_video, ffmpeg_path
from preprocessing.sandbox import MessageLimitError, TimeLimitError, missing_layers, sandbox_layers, start_sandboxed

MANIFESTS = {
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
    "list.ffconcat": "ffconcat version 1.0\nfile {target}\n",
    "dash.mpd": (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S">'
        '<Period><AdaptationSet mimeType="video/mp4"><Representation id="0" bandwidth="1">'
        '<SegmentList duration="1"><Initialization sourceURL="{target}"/>'
        '<SegmentURL media="{target}"/></SegmentList></Representation></AdaptationSet></Period></MPD>'
    ),
    "session.sdp": (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    ),
}


@pytest.fixture
def canary() -> Iterator[tuple[str, list[str]]]:
    """The address of a loopback server and the requests that it has seen."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/secret.ts", seen
        server.shutdown()
        thread.join()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.ts"
    source = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=10:duration=1", "-c:v", "mpeg2video"]
    subprocess.run([ffmpeg_path(), "-v", "error", *source, str(path)], check=True, stdin=subprocess.DEVNULL)
    return path


def unguarded(path: Path) -> list[str]:
    """A command line that lets ffmpeg open what it likes."""
    options = ["-protocol_whitelist", "file,http,tcp,crypto,data", "-allowed_extensions", "ALL", "-extension_picky", "0"]
    if path.suffix != ".m3u8":
        options = options[:2]
    if path.suffix == ".ffconcat":
        options += ["-safe", "0"]
    return [ffmpeg_path(), "-nostdin", *options, "-i", str(path), "-t", "1", "-f", "framecrc", "pipe:1"]


def lines_of_frames(output: bytes) -> int:
    return sum(not line.startswith(b"#") for line in output.splitlines())


@pytest.mark.parametrize("suffix", ["own", ".mp4"])
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_reaches_neither_file_nor_address(
    name: str, suffix: str, tmp_path: Path, secret: Path, canary: tuple[str, list[str]]
) -> None:
    address, seen = canary
    for target in (address, f"file://{secret}", secret.name):
        path = (tmp_path / name) if suffix == "own" else (tmp_path / name).with_suffix(suffix)
        path.write_text(MANIFESTS[name].format(target=target))
        with pytest.raises(VideoRejectedError, match="undecodable") as caught:
            decode_video(path, DecodeSettings(timeout_seconds=25))
        assert str(tmp_path) not in caught.value.detail
    assert seen == []


@pytest.mark.parametrize("name", ["hls.m3u8", "list.ffconcat"])
def test_the_same_manifest_does_reach_the_file_without_the_lists(name: str, tmp_path: Path, secret: Path) -> None:
    path = tmp_path / name
    path.write_text(MANIFESTS[name].format(target=secret.name))
    done = subprocess.run(unguarded(path), capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert lines_of_frames(done.stdout) == 10


@pytest.mark.parametrize("name", ["hls.m3u8", "list.ffconcat", "dash.mpd"])
def test_the_same_manifest_reaches_the_server_without_the_lists_but_not_from_the_sandbox(
    name: str, tmp_path: Path, canary: tuple[str, list[str]]
) -> None:
    address, seen = canary
    path = tmp_path / name
    path.write_text(MANIFESTS[name].format(target=address))
    done = subprocess.run(unguarded(path), capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    if name == "dash.mpd" and not seen:
        pytest.skip(f"this ffmpeg does not read DASH manifests: {done.stderr[-80:]!r}")
    assert seen
    if "no network" not in sandbox_layers():
        pytest.skip("this machine grants no network namespace")
    seen.clear()
    with start_sandboxed(unguarded(path), 60) as process:
        assert b"".join(process.chunks()).count(b"0, ") == 0
        process.wait()
    assert seen == []


def test_layers_are_named_and_nothing_is_both_there_and_missing() -> None:
    assert len(sandbox_layers()) + len(missing_layers()) == 6
    assert not set(sandbox_layers()) & set(missing_layers())


def test_a_machine_without_the_programs_runs_with_the_other_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = (sandbox.sandbox_layers, sandbox._network_prefix, sandbox._privilege_prefix)
    monkeypatch.setenv("PATH", str(tmp_path))
    for probe in probes:
        probe.cache_clear()
    try:
        assert missing_layers() == ("no new privileges", "no network")
        with start_sandboxed(["/bin/echo", "x"], 20) as process:
            assert (b"".join(process.chunks()), process.wait()) == (b"x\n", 0)
    finally:
        for probe in probes:
            probe.cache_clear()


def test_limits_and_environment_are_those_that_are_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    script = "import os,resource as r,time;time.sleep(0.3);print([r.getrlimit(getattr(r,'RLIMIT_'+n))[0] for n in "
    script += (
        "('CPU','AS','FSIZE','NOFILE','CORE')],sorted(set(os.environ)-{'LC_CTYPE'}),os.getpgid(0)==os.getpid(),os.getcwd())"
    )
    with start_sandboxed([sys.executable, "-I", "-c", script], 20) as process:
        printed = b"".join(process.chunks()).decode()
        assert process.wait() == 0
    names = sorted({"PATH", "LC_ALL"} | ({"LD_LIBRARY_PATH"} & set(os.environ)))
    assert printed == f"[21, {4 << 30}, {16 << 20}, 64, 0] {names} True /\n"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64  # ours are as they were


def test_silence_is_ended_and_a_flood_of_messages_too() -> None:
    with start_sandboxed(["/bin/sleep", "300"], 0.5) as process, pytest.raises(TimeLimitError, match=r"longer than 0\.5 s"):
        list(process.chunks())
    flood = ["/bin/sh", "-c", "cat /dev/zero >&2"]
    with start_sandboxed(flood, 60) as process, pytest.raises(MessageLimitError, match="more than 16777216 bytes"):
        assert not any(process.chunks()) and process.wait()  # noqa: PT018


def test_a_sandbox_that_fails_to_start_is_no_fault_of_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "unshare"
    program.write_text("#!/bin/sh\necho unshare: unshare failed: No space left on device >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sandbox, "_network_prefix", lambda: (str(program),))
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(ChildProcessError, match="could not be set up: unshare: unshare failed: No space"):
        decode_video(tmp_path / "clip.mp4", decode.DecodeSettings())
