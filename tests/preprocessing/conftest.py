import logging

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg

from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.finish import finish_shard_set
from preprocessing.planning import plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource


@pytest.fixture(scope="session")
def tiny_shard_dir(tmp_path_factory):
    """A shard set of 23 labelled training videos in 3 shards and 5 unlabelled test videos; not to be changed.

    Video vNN has label NN % 4 and 3 + NN % 10 frames of 28 x 20 pixels. Red grows from left to right, green is 8 NN, blue is 20
    times the frame's index.
    """
    root, output_dir = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("shards")
    rows = []
    for video in range(28):
        video_id, split, label = f"v{video:02d}", "train" if video < 23 else "test", video % 4 if video < 23 else None
        rows.append({"video_id": video_id, "path": video_id, "kind": "frames", "split": split, "label": label})
        (root / video_id).mkdir()
        for frame_index in range(3 + video % 10):
            frame = np.empty((20, 28, 3), np.uint8)
            frame[..., 0] = np.linspace(0, 250, 28)
            frame[..., 1:] = 8 * video, 20 * frame_index
            data = simplejpeg.encode_jpeg(frame, quality=98, colorsubsampling="444")
            (root / video_id / f"{frame_index + 1:05d}.jpg").write_bytes(data)
    label_names = ["moving left", "moving right", "moving up", "turning left"]
    index = VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), label_names)
    settings = ShardSettings(videos_per_shard=8)
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    for plan in plans:
        write_shard(plan, FolderSource(root), output_dir, settings)
    finish_shard_set(output_dir, index, plans, settings, "something_v1")
    return output_dir


@pytest.fixture
def s3_reads(caplog):
    """Counts the requests for the bytes of a file that the server of `s3_url` has answered: `s3_reads("name")`."""
    caplog.set_level(logging.INFO, logger="werkzeug")

    def count(name):
        return sum("GET /" in record.getMessage() and f"{name} " in record.getMessage() for record in caplog.records)

    return count
