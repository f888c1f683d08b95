"""Training in this process, and what becomes of it when shards or disks fail on the way."""

import resource
import shutil
import subprocess

import pytest

from infra.errors import ConfigError, DataError, PipelineError
from infra.filesystems import Folder
from infra.storage import sha256_file
from pipelines.training.checkpoint import verify
from pipelines.training.job import TrainJob
from pipelines.training.rank import train_locally, train_rank
from pipelines.training.settings import ModelSettings, TrainSettings
from preprocessing.index import dataset_json, read_dataset_info
from preprocessing.labels import label_passport
from preprocessing.reader import open_shards


def job_of(shards_dir, **changes):
    arguments = {"epochs": 2, "batch_size": 8, "warmup_epochs": 0.5, "pixels": 32, "num_segments": 2, "local": True}
    arguments |= {"loader_threads": 1, "flip": "none", "checkpoint_every_steps": 1}
    return TrainJob("test", str(shards_dir), ModelSettings(name="gsm_bn_inception"), TrainSettings(**(arguments | changes)))


def stop_after(storage_dir, step):
    """A `should_stop` for `train_rank`: True once this step's checkpoint is there."""
    return lambda: (storage_dir / "checkpoints" / f"step-{step - 1:08d}").exists()


@pytest.fixture(scope="module")
def undisturbed(shards_dir, tmp_path_factory, tiny):
    tiny.torch.set_num_threads(1)  # as each test here has, but this runs before the fixture that does it
    return train_locally(job_of(shards_dir), storage_dir=tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def own_shards(shards_dir, tmp_path):
    return shutil.copytree(shards_dir, tmp_path / "shards")


def newest(storage_dir):
    return max((storage_dir / "checkpoints").glob("step-*"))


def test_local_training_goes_on_from_the_place_of_the_copies(undisturbed, shards_dir, tmp_path, tiny):
    mirror, device = Folder(tmp_path / "mirror"), tiny.torch.device("cpu")
    job = job_of(shards_dir, checkpoints=str(tmp_path / "mirror"))
    stopped = train_rank(
        job, storage_dir=tmp_path / "one", mirror=mirror, device=device, should_stop=stop_after(tmp_path / "one", 2)
    )
    assert not stopped.completed
    epochs, texts = [], []
    result = train_locally(
        job,
        storage_dir=tmp_path / "two",
        mirror=mirror,
        on_epoch=epochs.append,
        on_progress=lambda done, total, text: texts.append((done, total, text)),
    )
    assert result.resumed_from_step == 2
    assert epochs == result.history
    assert texts[0][:2] == (3, 6)
    assert sha256_file(result.last_weights) == sha256_file(undisturbed.last_weights)


def test_rank_0_on_a_node_without_the_checkpoints_refuses_to_start_anew(shards_dir, tmp_path, tiny):
    with pytest.raises(PipelineError, match=r"test has checkpoints, but not in .*checkpoints on this node.* s3:// URL"):
        train_rank(job_of(shards_dir), storage_dir=tmp_path, mirror=None, device=tiny.torch.device("cpu"), must_resume=True)


def test_a_corrupt_byte_in_a_shard_stops_training_and_training_goes_on_when_it_is_mended(undisturbed, own_shards, tmp_path):
    """One byte in the middle of each frame of one video: frame, video and shard are named."""
    video = open_shards(own_shards, "train").video(5)
    shard = own_shards / video.shard
    intact = shard.read_bytes()
    data = bytearray(intact)
    for offset, size in zip(video.frame_offsets.tolist(), video.frame_sizes.tolist(), strict=True):
        data[offset + size // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=rf"frame \d of video {video.key} in {shard} cannot be read: .*checksum"):
        train_locally(job_of(own_shards), storage_dir=tmp_path)
    shard.write_bytes(intact)
    result = train_locally(job_of(own_shards), storage_dir=tmp_path)
    assert sha256_file(result.last_weights) == sha256_file(undisturbed.last_weights)


def test_a_shard_that_goes_missing_is_named_before_a_step_and_training_goes_on_when_it_is_back(
    undisturbed, own_shards, tmp_path, tiny
):
    device = tiny.torch.device("cpu")
    train_rank(job_of(own_shards), storage_dir=tmp_path, mirror=None, device=device, should_stop=stop_after(tmp_path, 2))
    shard = (own_shards / "train-000000.tar").rename(tmp_path / "hidden.tar")
    with pytest.raises(DataError, match=r"train-000000.tar is missing; .* run the shards stage again"):
        train_locally(job_of(own_shards), storage_dir=tmp_path)
    assert newest(tmp_path).name == "step-00000002"
    shard.rename(own_shards / "train-000000.tar")
    result = train_locally(job_of(own_shards), storage_dir=tmp_path)
    assert sha256_file(result.last_weights) == sha256_file(undisturbed.last_weights)


def test_a_checkpoint_is_not_trained_further_on_shards_of_another_label_passport(own_shards, tmp_path, tiny):
    train_rank(
        job_of(own_shards),
        storage_dir=tmp_path,
        mirror=None,
        device=tiny.torch.device("cpu"),
        should_stop=stop_after(tmp_path, 2),
    )
    info = read_dataset_info(own_shards)
    names = info.label_names[::-1]
    other = info.model_copy(update={"label_names": names, "label_passport": label_passport(names)})
    (own_shards / "dataset.json").write_bytes(dataset_json(other))
    with pytest.raises(ConfigError, match=f"label_passport '{info.label_passport}' there and '{other.label_passport}' now"):
        train_locally(job_of(own_shards), storage_dir=tmp_path)
    assert verify(newest(tmp_path))["label_passport"] == info.label_passport


def test_a_full_disk_is_a_clear_error_and_the_next_run_goes_on(undisturbed, shards_dir, tmp_path):
    """A disk with room for two checkpoints of about 85 MB, on which another file grows."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=220m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        (disk / "others").write_bytes(bytes(70 * 2**20))
        with pytest.raises(PipelineError, match=r"a checkpoint needs \d+ MB in .*, but only \d+ MB are free"):
            train_locally(job_of(shards_dir), storage_dir=disk)
        first = newest(disk)
        verify(first)
        assert not list((disk / "checkpoints").glob(".tmp-*"))
        (disk / "others").unlink()
        subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)
        result = train_locally(job_of(shards_dir), storage_dir=disk)
        assert result.resumed_from_step == int(first.name[5:]) >= 1
        assert sha256_file(result.last_weights) == sha256_file(undisturbed.last_weights)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fails_in_the_middle_of_a_file_leaves_the_checkpoints_before_it(undisturbed, shards_dir, tmp_path, tiny):
    """No file may be longer than 20 MB: writing the weights fails half way, whatever the disk says is free."""
    device, folder = tiny.torch.device("cpu"), tmp_path / "checkpoints"
    train_rank(job_of(shards_dir), storage_dir=tmp_path, mirror=None, device=device, should_stop=stop_after(tmp_path, 2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 10**6, before[1]))
    try:
        with pytest.raises(PipelineError, match=r"step-00000003 cannot be written: .*expected a disk with free space"):
            train_locally(job_of(shards_dir), storage_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    result = train_locally(job_of(shards_dir), storage_dir=tmp_path)
    assert result.resumed_from_step == 2
    assert sha256_file(result.last_weights) == sha256_file(undisturbed.last_weights)
