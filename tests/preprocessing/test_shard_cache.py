import itertools
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from infra.errors import ConfigError, DataError
from infra.filesystems import Folder
from preprocessing.loader import make_loader
from preprocessing.reader import FrameReader, open_shards
from preprocessing.shard_cache import ShardCache

SIZE = 100_000
NAMES = [f"train-{number}.tar" for number in range(6)]


def content_of(name):
    return np.random.default_rng(int(name[6])).bytes(SIZE)


@pytest.fixture(scope="module")
def remote(s3_url):
    """Six files of 100 kB of noise."""
    folder = Folder(f"{s3_url}/noise")
    for name in NAMES:
        folder.write_bytes(name, content_of(name))
    return folder


@pytest.fixture(scope="module")
def remote_shards(s3_url, tiny_shard_dir):
    """The tiny shard set, three training shards, in a bucket."""
    remote = Folder(f"{s3_url}/tiny")
    for path in tiny_shard_dir.iterdir():
        remote.write_bytes(path.name, path.read_bytes())
    return open_shards(remote, "train")


def bytes_used(folder):
    """What the folder takes at a moment at which nobody changes it."""
    with FileLock(folder / "cache.lock"):
        return sum(path.stat().st_size for path in folder.iterdir())


def copies(folder):
    return sorted(path.name.split("-", 1)[1] for path in folder.glob("*.copy"))


def test_a_shard_is_fetched_once(remote, tmp_path, s3_reads):
    cache = ShardCache(tmp_path / "new" / "cache", 10 * SIZE)
    with ThreadPoolExecutor(6) as pool:
        opened = list(pool.map(lambda _: cache.open(remote, NAMES[0], SIZE), range(12)))
    assert all(ranges.read(0, SIZE) == content_of(NAMES[0]) for ranges in opened)
    assert s3_reads(NAMES[0]) == 1
    assert copies(tmp_path / "new" / "cache") == [f"{NAMES[0]}.copy"]
    assert ShardCache(tmp_path / "new" / "cache", SIZE).open(remote, NAMES[0], SIZE).read(5, 9) == content_of(NAMES[0])[5:14]
    assert s3_reads(NAMES[0]) == 1


def test_the_longest_unused_goes_first(remote, tmp_path):
    cache = ShardCache(tmp_path, 3 * SIZE + 5)
    for number in (0, 1, 2, 0, 3):
        cache.open(remote, NAMES[number], SIZE)
        time.sleep(0.02)
    assert copies(tmp_path) == [f"{NAMES[number]}.copy" for number in (0, 2, 3)]


def test_a_copy_that_is_removed_can_be_read_to_the_end(remote, tmp_path):
    cache = ShardCache(tmp_path, SIZE)
    first = cache.open(remote, NAMES[0], SIZE)
    cache.open(remote, NAMES[1], SIZE)
    assert copies(tmp_path) == [f"{NAMES[1]}.copy"]
    assert first.read(0, SIZE) == content_of(NAMES[0])


HAMMER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from infra.filesystems import Folder
from preprocessing.shard_cache import ShardCache

place, folder, size, seed = sys.argv[1:]
cache, remote = ShardCache(Path(folder), 3 * int(size)), Folder(place)

def use(number):
    expected = np.random.default_rng(number).bytes(int(size))
    assert cache.open(remote, f"train-{number}.tar", int(size)).read(0, int(size)) == expected

with ThreadPoolExecutor(2) as pool:
    list(pool.map(use, np.random.default_rng(int(seed)).integers(6, size=25).tolist()))
"""


def test_many_processes_and_threads_keep_to_the_limit(remote, tmp_path):
    commands = [[sys.executable, "-c", HAMMER, remote.url, str(tmp_path), str(SIZE), str(seed)] for seed in range(3)]
    workers = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for command in commands]
    most = 0
    while any(worker.poll() is None for worker in workers):
        most = max(most, bytes_used(tmp_path))
        time.sleep(0.01)
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert SIZE < most <= 3 * SIZE
    assert {path.suffix for path in tmp_path.iterdir()} == {".copy", ".lock"}


def test_what_a_dead_process_left_is_overwritten_or_makes_room(remote, tmp_path):
    cache = ShardCache(tmp_path, 2 * SIZE)
    cache.open(remote, NAMES[0], SIZE)
    path = next(tmp_path.glob("*.copy"))
    path.rename(path.with_suffix(".part"))
    assert cache.open(remote, NAMES[0], SIZE).read(0, SIZE) == content_of(NAMES[0])
    orphan = path.with_name(path.name.replace("train-0", "train-1")).with_suffix(".part")
    orphan.write_bytes(bytes(SIZE))
    cache.open(remote, NAMES[2], SIZE)
    cache.open(remote, NAMES[3], SIZE)
    assert not orphan.exists()
    assert copies(tmp_path) == [f"{NAMES[2]}.copy", f"{NAMES[3]}.copy"]


def test_a_fetch_waits_until_others_leave_room(remote, tmp_path):
    cache = ShardCache(tmp_path, SIZE)
    other = tmp_path / "x-other.part"
    with FileLock(other.with_suffix(".lock")):
        other.write_bytes(bytes(10))
        waiting = threading.Thread(target=lambda: cache.open(remote, NAMES[0], SIZE))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert copies(tmp_path) == []
    waiting.join(30)
    assert copies(tmp_path) == [f"{NAMES[0]}.copy"]


def test_a_fetch_that_fails_leaves_nothing(remote, tmp_path):
    cache = ShardCache(tmp_path, 10 * SIZE)
    with pytest.raises(ValueError, match=f"found a shard of {SIZE} bytes, expected {SIZE + 1}"):
        cache.open(remote, NAMES[0], SIZE + 1)
    with pytest.raises(FileNotFoundError):
        cache.open(remote, "none.tar", SIZE)
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}


def test_a_shard_that_does_not_fit_is_an_error(remote, tmp_path):
    with pytest.raises(ConfigError, match=rf"shard s3://.*train-0.tar has {SIZE} bytes, the shard cache in .* at most 99999; "):
        ShardCache(tmp_path, SIZE - 1).open(remote, NAMES[0], SIZE)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")  # noqa: PTH110
def test_a_full_disk_is_named(remote, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path, SIZE)
    monkeypatch.setattr(ShardCache, "_reserve", lambda _, part, num_bytes: part.symlink_to("/dev/full"))
    with pytest.raises(OSError, match=f"the disk of the shard cache is full; make it smaller: '{tmp_path}'"):
        cache.open(remote, NAMES[0], SIZE)
    assert copies(tmp_path) == []


def damage(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "zeroed":
        path.write_bytes(bytes(len(data)))
    else:
        path.write_bytes(bytes(byte ^ 1 for byte in data))


@pytest.mark.parametrize("how", ["cut", "zeroed", "flipped"])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_damaged_copy_is_noticed_and_fetched_again(remote_shards, tmp_path, s3_reads, how, is_open):
    cache = ShardCache(tmp_path, 1 << 20)
    video = remote_shards.video(4)
    expected = FrameReader(remote_shards).read_frames(video, [0, 2])
    reader = FrameReader(remote_shards, cache)
    reader.read_frames(video, [0, 2])
    before = s3_reads(video.shard)
    damage(next(tmp_path.glob(f"*{video.shard}.copy")), how)
    if not is_open:
        reader = FrameReader(remote_shards, cache)
    assert all(np.array_equal(*pair) for pair in zip(reader.read_frames(video, [0, 2]), expected, strict=True))
    assert s3_reads(video.shard) == before + 1
    assert reader.read_sample(video) == FrameReader(remote_shards).read_sample(video)


def test_a_damaged_remote_shard_is_still_an_error(s3_url, tiny_shard_dir, tmp_path):
    remote = Folder(f"{s3_url}/damaged")
    for path in tiny_shard_dir.iterdir():
        remote.write_bytes(path.name, path.read_bytes())
    shards = open_shards(remote, "train")
    video = shards.video(2)
    data = bytearray(remote.read_bytes(video.shard))
    data[int(video.frame_offsets[1]) + 30] ^= 1
    remote.write_bytes(video.shard, data)
    with pytest.raises(DataError, match=rf"frame 1 of video {video.key} in {remote}/{video.shard} cannot be read: .*checksum"):
        FrameReader(shards, ShardCache(tmp_path, 1 << 20)).read_frames(video, [0, 1])


def test_a_loader_with_a_cache_shows_the_same_and_asks_for_each_shard_once(remote_shards, tmp_path, s3_reads):
    options = {"num_segments": 3, "batch_size": 4, "train": True, "seed": 1, "pixels": 16, "num_workers": 3}
    limit = 3 * max(end.num_bytes for end in remote_shards.ends.values())
    names = sorted(remote_shards.ends)
    expected = list(make_loader(remote_shards, **options, shuffle_shards=1))
    before = [s3_reads(name) for name in names]
    assert sum(before) >= 23, "a request a video, at least"
    loader = make_loader(remote_shards, **options, shuffle_shards=1, cache=ShardCache(tmp_path, limit))
    for batch, other in zip(loader, expected, strict=True):
        assert batch.keys == other.keys
        assert bool((batch.clips == other.clips).all())
    assert [s3_reads(name) - count for name, count in zip(names, before, strict=True)] == [1, 1, 1]
    assert sum(1 for _ in loader) == len(loader)
    assert [s3_reads(name) - count for name, count in zip(names, before, strict=True)] == [1, 1, 1], "the second epoch is here"


def test_a_cache_must_hold_the_shards_in_use(remote_shards, tiny_shard_dir, tmp_path):
    options = {"num_segments": 3, "batch_size": 4, "train": True, "seed": 1, "pixels": 16}
    largest = max(end.num_bytes for end in remote_shards.ends.values())
    cache = ShardCache(tmp_path, 2 * largest)
    make_loader(remote_shards, **options, cache=cache, shuffle_shards=1, subset=9)
    make_loader(open_shards(tiny_shard_dir, "train"), **options, cache=ShardCache(tmp_path, 1))
    message = (
        rf"the shard cache holds {2 * largest} bytes; expected at least {3 * largest}, since 3 shards are in use at a time: "
    )
    with pytest.raises(ConfigError, match=message):
        make_loader(remote_shards, **options, cache=cache)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_epochs_through_a_cache_are_whole_and_fetch_each_shard_once(remote_shards, tmp_path, s3_reads, num_workers, world_size):
    options = {"num_segments": 2, "batch_size": 2, "train": True, "seed": 3, "pixels": 8, "num_workers": num_workers}
    cache = ShardCache(tmp_path, 3 * max(end.num_bytes for end in remote_shards.ends.values()))
    loaders = [
        make_loader(remote_shards, **options, shuffle_shards=1, cache=cache, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    before = sum(map(s3_reads, remote_shards.ends))
    shown = [batch.keys for step in zip(*loaders, strict=True) for batch in step]
    assert sorted(itertools.chain(*shown)) == sorted(remote_shards.keys)
    assert sum(map(s3_reads, remote_shards.ends)) - before == 3
    assert bytes_used(tmp_path) <= cache.max_bytes
    assert [thread for thread in threading.enumerate() if thread.name.startswith("loader")] == []
