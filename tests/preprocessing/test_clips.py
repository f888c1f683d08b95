import numpy as np

from preprocessing.clips import centre_clip, write_views
from preprocessing.decode import DecodedVideo
from preprocessing.loader import make_loader
from preprocessing.reader import FrameReader, open_shards
from preprocessing.views import FrameSampling, spread_views


def test_the_centre_clip_of_frames_in_memory_is_that_of_the_loader(tiny_shard_dir):
    shards = open_shards(tiny_shard_dir, "test")
    reader = FrameReader(shards)
    sampling = FrameSampling(4)
    for pixels in (8, 32):  # frames are decoded at reduced size for the first
        loader = make_loader(shards, num_segments=4, batch_size=5, train=False, seed=0, pixels=pixels, num_workers=0)
        (batch,) = loader
        for row, clip in enumerate(batch.clips):
            stored = shards.video(row)
            video = DecodedVideo(reader.read_sample(stored), None, stored.height, stored.width, 0, "")
            assert np.array_equal(centre_clip(video, sampling, pixels), clip.permute(0, 2, 3, 1).numpy())


def test_each_frame_is_read_once_in_order():
    asked = []

    def read_frames(indices, size):
        asked.append((list(indices), size))
        return [np.full((20, 30, 3), index, np.uint8) for index in indices]

    views = spread_views(3, 20, 30, FrameSampling(4), 16, num_clips=2, num_crops=3)
    out = np.zeros((6, 4, 16, 16, 3), np.uint8)
    write_views(views, 20, 30, read_frames, out)
    ((indices, _),) = asked
    assert indices == sorted(set(indices)) == [0, 1, 2]
    assert [clip[:, 0, 0, 0].tolist() for clip in out] == [view.frame_indices for view in views]


def test_people_see_the_same_window_at_another_size(tiny_shard_dir):
    shards = open_shards(tiny_shard_dir, "test")
    stored = shards.video(0)
    video = DecodedVideo(FrameReader(shards).read_sample(stored), None, stored.height, stored.width, 0, "")
    seen, shown = centre_clip(video, FrameSampling(4), 16), centre_clip(video, FrameSampling(4), 16, side=64)
    assert shown.shape == (4, 64, 64, 3)
    means = shown.reshape(4, 16, 4, 16, 4, 3).mean(axis=(2, 4))
    assert np.abs(means - seen).mean() < 4
