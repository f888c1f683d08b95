import itertools
import shutil
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError, DataError
from preprocessing.augment import Augmentation
from preprocessing.clip_ledger import ClipLedger
from preprocessing.loader import make_loader, open_shards
from preprocessing.views import FrameSampling, spread_views

NUM_TRAIN = 23
AUGMENTED = Augmentation(num_ops=2, erase_probability=0.5)


def video_of(key):
    return int(key[1:3])


@pytest.fixture(scope="module")
def train_split(tiny_shard_dir):
    return open_shards(tiny_shard_dir, "train")


def loader_of(shards, **changes):
    arguments = {"num_segments": 4, "batch_size": 4, "train": True, "seed": 0, "num_workers": 0, "pixels": 16}
    return make_loader(shards, **(arguments | changes))


def epoch_of(loader):
    return [(batch.clips, batch.labels, batch.keys, batch.num_global) for batch in loader]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch[0], other[0])
        assert torch.equal(batch[1], other[1])
        assert batch[2:] == other[2:]


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_batches_have_the_promised_form(train_split):
    batch = next(iter(loader_of(train_split)))
    assert batch.clips.shape == (4, 4, 3, 16, 16)
    assert batch.clips.dtype == torch.uint8
    assert batch.clips.permute(0, 1, 3, 4, 2).is_contiguous()
    assert batch.clips.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert batch.clips.flatten(0, 1).data_ptr() == batch.clips.data_ptr()
    assert batch.labels.dtype == torch.int64
    assert batch.num_global == len(batch.keys) == len(batch.labels) == 4


def test_clips_show_the_centres_of_the_segments_of_the_right_video(train_split):
    for batch in loader_of(train_split, train=False, num_workers=2):
        for clip, label, key in zip(batch.clips.float(), batch.labels.tolist(), batch.keys, strict=True):
            video = video_of(key)
            num_frames = 3 + video % 10
            assert label == video % 4
            assert (clip[:, 1] - 8 * video).abs().max() <= 3
            centres = torch.tensor([int((i + 0.5) * num_frames / 4) for i in range(4)])
            assert (clip[:, 2].mean(dim=(1, 2)) - 20 * centres).abs().max() <= 3


def test_testing_takes_the_order_of_the_index_and_does_not_change(train_split):
    loader = loader_of(train_split, train=False)
    first = epoch_of(loader)
    assert [key for _, _, keys, _ in first for key in keys] == train_split.keys == loader.epoch_keys(5)
    assert_same(epoch_of(loader), first)


@settings(max_examples=60)
@given(num_clips=st.integers(1, NUM_TRAIN), batch_size=st.integers(1, 9), world_size=st.integers(1, 4), train=st.booleans())
def test_an_epoch_shows_each_clip_once_at_any_world_size(train_split, num_clips, batch_size, world_size, train):
    arguments = {"subset": num_clips, "batch_size": batch_size, "train": train, "num_segments": 1, "pixels": 4}
    try:
        loaders = [loader_of(train_split, **arguments, rank=rank, world_size=world_size) for rank in range(world_size)]
    except ConfigError as error:
        assert num_clips < world_size or (batch_size == 1 and num_clips % world_size)
        assert "use fewer workers" in str(error)  # noqa: PT017
        return
    epochs = [epoch_of(loader) for loader in loaders]
    assert (
        {len(epoch) for epoch in epochs} == {len(loader) for loader in loaders} == {-(-num_clips // (batch_size * world_size))}
    )
    shown = []
    for step in zip(*epochs, strict=True):
        sizes = [len(keys) for _, _, keys, _ in step]
        assert {num_global for _, _, _, num_global in step} == {sum(sizes)}
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= batch_size
        shown += [key for _, _, keys, _ in step for key in keys]
    assert Counter(shown) == Counter(train_split.keys[:num_clips])
    assert shown == loaders[0].epoch_keys(0)


def test_the_order_does_not_depend_on_world_size_and_clips_do_not_either(train_split):
    def clips_by_key(world_size):
        loaders = [loader_of(train_split, rank=rank, world_size=world_size) for rank in range(world_size)]
        return {
            key: clip
            for loader in loaders
            for clips, _, keys, _ in epoch_of(loader)
            for key, clip in zip(keys, clips, strict=True)
        }

    alone, together = clips_by_key(1), clips_by_key(3)
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[key], together[key]) for key in alone)
    orders = [loader_of(train_split, world_size=world_size).epoch_keys(1) for world_size in (1, 2, 3)]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("num_steps", [1, 4, 6])
def test_steps_that_others_began_have_the_same_clips_at_any_world_size(train_split, world_size, num_steps):
    def steps(world_size):
        loaders = [loader_of(train_split, rank=rank, world_size=world_size) for rank in range(world_size)]
        for loader in loaders:
            loader.divide(num_steps)
            loader.seek(1)
        assert {len(loader) for loader in loaders} == {num_steps}
        parts = [[batch.keys for batch in loader] for loader in loaders]
        return [[key for keys in step for key in keys] for step in zip(*parts, strict=True)]

    assert steps(world_size) == steps(1)
    with pytest.raises(ConfigError, match=f"23 clips in 12 steps do not give each of {world_size} workers a clip"):
        loader_of(train_split, world_size=world_size).divide(12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("changes", [{}, {"augmentation": AUGMENTED, "shuffle_shards": 1}, {"train": False, "num_crops": 3}])
def test_every_epoch_shows_the_split_exactly(train_split, world_size, num_workers, changes):
    settings = {
        "num_segments": 2,
        "pixels": 8,
        "batch_size": 3,
        "num_workers": num_workers,
        "world_size": world_size,
        **changes,
    }
    loaders = [loader_of(train_split, rank=rank, **settings) for rank in range(world_size)]
    for _ in range(2):
        epochs = [epoch_of(loader) for loader in loaders]
        assert Counter(key for epoch in epochs for batch in epoch for key in batch[2]) == Counter(train_split.keys)
        ledgers = [ClipLedger().add(key for batch in epoch for key in batch[2]) for epoch in epochs]
        assert sum(ledgers, start=ClipLedger()) == ClipLedger().add(train_split.keys)


def test_locality_is_the_same_at_any_world_size_and_keeps_neighbours_together(train_split):
    shard_of = {train_split.video(row).key: train_split.video(row).shard for row in range(len(train_split))}
    orders = [loader_of(train_split, shuffle_shards=1, world_size=size).epoch_keys(2) for size in (1, 2, 3)]
    assert orders[0] == orders[1] == orders[2]
    shards = [shard_of[key] for key in orders[0]]
    assert sum(shard != other for shard, other in itertools.pairwise(shards)) == 2, "one of three after another"
    assert orders[0] != loader_of(train_split).epoch_keys(2)
    assert loader_of(train_split).epoch_keys(2) == loader_of(train_split, shuffle_shards=3).epoch_keys(2), "local: all of them"


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("changes", [{}, {"augmentation": AUGMENTED, "shuffle_shards": 2, "sampling": "dense", "stride": 2}])
def test_threads_do_not_change_the_batches(train_split, num_workers, changes):
    alone, threaded = loader_of(train_split, **changes), loader_of(train_split, **changes, num_workers=num_workers)
    for _ in range(2):
        assert_same(epoch_of(threaded), epoch_of(alone))


def test_seek_goes_on_at_any_step(train_split):
    loader = loader_of(train_split, num_workers=2)
    epochs = [epoch_of(loader) for _ in range(2)]
    for epoch, batches in enumerate(epochs):
        for step in range(len(loader) + 1):
            resumed = loader_of(train_split)
            resumed.seek(epoch, step)
            assert_same(epoch_of(resumed), batches[step:])
            if epoch == 0:
                assert_same(epoch_of(resumed), epochs[1])


def test_epochs_and_seeds_differ(train_split):
    loader = loader_of(train_split, flip="none", num_segments=1)
    orders = [loader.epoch_keys(epoch) for epoch in range(3)] + [loader_of(train_split, seed=1).epoch_keys(0)]
    assert len({tuple(order) for order in orders}) == 4
    clips = [{key: clip for c, _, keys, _ in epoch_of(loader) for key, clip in zip(keys, c, strict=True)} for _ in range(2)]
    assert sum(torch.equal(clips[0][key], clips[1][key]) for key in clips[0]) < NUM_TRAIN / 2


@pytest.mark.parametrize("flip", ["swap", "none", "naive"])
def test_flips_go_with_their_labels(train_split, flip):
    """Red grows to the right, so its slope tells whether a clip was mirrored."""
    seen = {label: set() for label in range(4)}
    loader = loader_of(train_split, flip=flip)
    for _ in range(4):
        for batch in loader:
            for clip, label, key in zip(batch.clips.float(), batch.labels.tolist(), batch.keys, strict=True):
                mirrored = bool(clip[:, 0, :, -1].mean() < clip[:, 0, :, 0].mean())
                seen[video_of(key) % 4].add((mirrored, label))
    expected = {
        "none": {label: {(False, label)} for label in range(4)},
        "naive": {label: {(False, label), (True, label)} for label in range(4)},
        "swap": {0: {(False, 0), (True, 1)}, 1: {(False, 1), (True, 0)}, 2: {(False, 2), (True, 2)}, 3: {(False, 3)}},
    }
    assert seen == expected[flip]


def test_leaving_early_ends_the_threads(train_split):
    loader = loader_of(train_split, num_workers=3)
    for _ in range(2):
        for batch in loader:
            assert len(batch.keys) == 4
            assert loader_threads()
            break
        assert loader_threads() == []
    with pytest.raises(RuntimeError, match="the caller's own"):
        raise_after_a_batch(loader)
    assert loader_threads() == []


def raise_after_a_batch(loader):
    for _ in loader:
        raise RuntimeError("the caller's own")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_frame_that_cannot_be_read_stops_the_epoch_with_its_name(tiny_shard_dir, tmp_path, num_workers):
    shutil.copytree(tiny_shard_dir, tmp_path, dirs_exist_ok=True)
    split = open_shards(tmp_path, "train")
    video = split.video(5)
    with (tmp_path / video.shard).open("r+b") as file:
        file.seek(int(video.frame_offsets[1]))
        file.write(b"GIF89a")
    loader = loader_of(split, train=False, num_workers=num_workers, num_segments=len(video.frame_sizes))
    with pytest.raises(
        DataError, match=rf"frame 1 of video {video.key} in {tmp_path / video.shard} cannot be read: found bytes "
    ):
        epoch_of(loader)
    assert loader_threads() == []


def test_training_needs_labels_and_testing_does_not(tiny_shard_dir):
    shards = open_shards(tiny_shard_dir, "test")
    with pytest.raises(
        DataError, match=r"5 of 5 videos in split test of .* have no label, the first is v\d\d-\w+; training needs labels"
    ):
        loader_of(shards)
    assert [batch.labels.tolist() for batch in loader_of(shards, train=False)] == [[-1, -1, -1], [-1, -1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_segments": 0}, "num_segments is 0; expected at least 1"),
        ({"num_workers": -1}, "num_workers is -1; expected at least 0"),
        ({"world_size": 2, "rank": 2}, "rank is 2; expected below 2, which is world_size"),
        ({"flip": "both"}, "flip is 'both'; expected one of swap, none, naive"),
        ({"subset": 24}, "subset is 24; expected 1 to 23, the videos in split train of"),
        ({"subset": 0}, "subset is 0; expected 1 to 23"),
        ({"shuffle_shards": 0}, "shuffle_shards is 0; expected at least 1"),
        ({"sampling": "sparse"}, "sampling is 'sparse'; expected one of segments, dense"),
        ({"num_clips": 3, "train": False}, "num_clips is 3; expected one of 1, 2, 10"),
        ({"num_crops": 2, "train": False}, "num_crops is 2; expected one of 1, 3, 5, 10"),
        ({"num_clips": 2}, "2 views of a video are for testing; train with num_clips=1 and num_crops=1"),
        ({"whole_frames": True, "train": False}, "whole_frames is for testing, with num_crops=1 and batch_size=1"),
        ({"whole_frames": True, "batch_size": 1}, "whole_frames is for testing"),
        (
            {"num_crops": 10, "train": False},
            "num_crops is 10, but the mirror image of 'moving left' has another label; use 5, or flip='naive'",
        ),
        (
            {"subset": 3, "world_size": 4},
            "3 clips in 1 steps do not give each of 4 workers a clip in each step; use fewer workers",
        ),
    ],
)
def test_wrong_settings_are_named(train_split, changes, message):
    with pytest.raises(ConfigError, match=message):
        loader_of(train_split, **changes)


def test_seeking_past_the_end_is_an_error(train_split):
    with pytest.raises(ConfigError, match="cannot go to epoch 0, step 7; expected epoch >= 0 and step 0 to 6"):
        loader_of(train_split).seek(0, 7)


@pytest.mark.parametrize(("num_clips", "num_crops"), [(1, 3), (2, 1), (2, 5), (10, 10)])
@pytest.mark.parametrize("sampling", ["segments", "dense"])
def test_views_of_a_video_are_adjacent_and_in_order(train_split, num_clips, num_crops, sampling):
    """Blue tells the frame, the slope of red the place of the window and whether it is mirrored."""
    settings = {"train": False, "flip": "naive", "sampling": sampling, "stride": 2, "num_workers": 2}
    loader = loader_of(train_split, **settings, num_clips=num_clips, num_crops=num_crops)
    num_views = num_clips * num_crops
    shown = []
    for batch in loader:
        assert batch.num_views == num_views
        assert batch.clips.shape == (len(batch.keys) * num_views, 4, 3, 16, 16)
        assert batch.clips.permute(0, 1, 3, 4, 2).is_contiguous()
        assert len(batch.labels) == len(batch.keys) <= 4
        assert batch.num_global == len(batch.keys)
        shown += batch.keys
        for key, views in zip(batch.keys, batch.clips.float().split(num_views), strict=True):
            num_frames = 3 + video_of(key) % 10
            plan = spread_views(num_frames, 20, 28, FrameSampling(4, sampling, 2), 16, num_clips, num_crops)
            for view, clip in zip(plan, views, strict=True):
                assert (clip[:, 1] - 8 * video_of(key)).abs().max() <= 3
                assert (clip[:, 2].mean(dim=(1, 2)) - 20 * torch.tensor(view.frame_indices)).abs().max() <= 3
                red = (view.crop.left + view.crop.width / 2 - 0.5) / 27 * 250
                assert (clip[:, 0].mean() - red).abs() <= 4
                assert bool(clip[0, 0, :, -1].mean() < clip[0, 0, :, 0].mean()) == view.mirrored
    assert shown == train_split.keys


def test_whole_frames_are_shown_from_edge_to_edge(train_split):
    """Red rises from 0 at the left edge to 250 at the right one."""
    loader = loader_of(train_split, train=False, batch_size=1, whole_frames=True, num_clips=2, num_workers=2)
    shown = []
    for batch in loader:
        shown += batch.keys
        assert batch.clips.shape == (2, 4, 3, 18, 25)  # frames of 20 x 28 at 16 pixels, which are cropped from 18
        assert batch.clips.permute(0, 1, 3, 4, 2).is_contiguous()
        red, green = batch.clips.float().mean(dim=(0, 1, 3))[:2]
        assert red[0] < 12
        assert red[-1] > 238
        assert (green - 8 * video_of(batch.keys[0])).abs().max() <= 3
    assert shown == train_split.keys


def test_one_view_is_what_it_always_was(train_split):
    plain, named = loader_of(train_split, train=False), loader_of(train_split, train=False, num_clips=1, num_crops=1)
    assert_same(epoch_of(plain), epoch_of(named))
    assert next(iter(plain)).num_views == 1


def test_dense_training_clips_are_windows_inside_the_video(train_split):
    starts = set()
    loader = loader_of(train_split, sampling="dense", stride=2, flip="none", num_segments=3)
    for _ in range(6):
        for batch in loader:
            for clip, key in zip(batch.clips.float(), batch.keys, strict=True):
                num_frames = 3 + video_of(key) % 10
                indices = (clip[:, 2].mean(dim=(1, 2)) / 20).round().int().tolist()
                assert 0 <= indices[0] <= indices[1] <= indices[2] < num_frames
                if num_frames >= 6:
                    assert indices == [indices[0], indices[0] + 2, indices[0] + 4]
                    starts.add(indices[0])
    assert starts >= set(range(6))


def test_augmentation_changes_clips_and_nothing_else(train_split):
    plain, augmented = (epoch_of(loader_of(train_split, augmentation=a)) for a in (Augmentation(), AUGMENTED))
    assert [batch[2] for batch in plain] == [batch[2] for batch in augmented]
    assert all(torch.equal(batch[1], other[1]) for batch, other in zip(plain, augmented, strict=True))
    changed = [
        not torch.equal(clip, other)
        for batch, others in zip(plain, augmented, strict=True)
        for clip, other in zip(batch[0], others[0], strict=True)
    ]
    assert sum(changed) > NUM_TRAIN / 2
    tested = [epoch_of(loader_of(train_split, augmentation=a, train=False)) for a in (Augmentation(), AUGMENTED)]
    assert_same(*tested)
