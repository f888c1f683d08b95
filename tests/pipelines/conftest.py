"""A tiny shard set of real frames and an untrained network of it; a store with finished evaluations, made in milliseconds: no
network was trained; five videos of different formats with the shard set made of them and a small network, as files; and a
judged network to explain.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch
from safetensors.torch import save_file

from infra.settings import apply_overrides
from models.switch import slot_attentions, slot_gates
from pipelines.artifacts import Store
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.evaluation.scores import read_scores
from pipelines.experiments import find_experiment
from pipelines.graph import plan, run_graph, select
from pipelines.insight.settings import InsightSettings
from pipelines.insight.subject import Subject
from pipelines.stages import STAGES
from pipelines.training.job import TrainJob, save_model, score_model
from pipelines.training.settings import ModelSettings, TrainSettings, build_model
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.decode import ffmpeg_path
from preprocessing.finish import finish_shard_set
from preprocessing.planning import plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.synthetic import LABEL_NAMES, SyntheticSettings, draw_scene, render

CLASSES = 4


class MadeUp:
    """Commits what each stage would leave behind; `share` of the clips is right."""

    def __init__(self, store, experiment, variant, share, num_clips, shards, search):
        self.store, self.experiment, self.variant, self.share, self.num_clips = store, experiment, variant, share, num_clips
        self.shards = {"dataset": "something_v1", "label_passport": "5ca1ab1e", "place": None} | shards
        self.shards |= {"by_split": {"train": {"kept": 80}, "validation": {"kept": num_clips}}}
        self.search = {"overrides": {}, "trials": []} | search

    def __call__(self, item, inputs):
        name = item.stage.name
        summary = {"shards": self.shards, "search": self.search}.get(name, {})
        with self.store.work_on(name, item.fingerprint) as folder:
            if name == "train":
                history = [{"epoch": 0, "train_loss": 1.0, "val_loss": 1.0, "val_top1": self.share, "gammas": {"3a": -0.25}}]
                (folder / "history.json").write_text(json.dumps(history))
                summary = {"best_epoch": 0, "best_val_top1": self.share, "epochs": 1}
            if name == "evaluate":
                summary = self._scores(folder, item.config.train.seed)
            extra = {"experiment": self.experiment, "variant": self.variant, "summary": summary, "seconds": 2.0}
            extra["mlflow_run_id"] = f"{name}-{item.fingerprint}"
            return self.store.commit(folder, item.provenance, item.fingerprint, extra)

    def _scores(self, folder, seed):
        order = np.random.default_rng(seed).permutation(self.num_clips)
        labels = order % CLASSES
        right = order < round(self.share * self.num_clips)
        scores = np.eye(CLASSES, dtype=np.float32)[np.where(right, labels, (labels + 1) % CLASSES)]
        columns = {"key": [f"v{number:03d}" for number in order], "label": pa.array(labels, pa.int32()), "scores": list(scores)}
        pq.write_table(pa.table(columns), folder / "scores.parquet")
        metrics = {"top1": float(right.mean()), "top5": 1.0, "mean_class_accuracy": float(right.mean()), "loss": 1.0}
        (folder / "evaluation.json").write_text(json.dumps({"num_classes": CLASSES}))
        return {"metrics": metrics, "num_clips": self.num_clips, "split": "validation", "text": f"top-1 {right.mean():.1%}"}


@pytest.fixture
def made_up():
    """The class of runners of a graph that make up what stages leave behind."""
    return MadeUp


@pytest.fixture
def finish(tmp_path):
    """Puts a finished evaluation of the experiment `demo` into the store of `tmp_path` and returns its artifact."""

    def finish(overrides=None, *, share=0.5, num_clips=40, experiment="demo", variant="", shards=None, search=None):
        store = Store(tmp_path / "store")
        config = apply_overrides(find_experiment("demo")(), {"search.num_trials": 0, **(overrides or {})})
        planned = select(plan(STAGES, config, experiment, store), "evaluate")
        made_up = MadeUp(store, experiment, variant, share, num_clips, shards or {}, search or {})
        results = {result.name: result for result in run_graph(planned, made_up, lambda result: None)}
        assert results["evaluate"].artifact, results
        return results["evaluate"].artifact

    return finish


@pytest.fixture(scope="session")
def shards_dir(tmp_path_factory):
    """A shard set of 24 training and 8 validation videos of two classes: brighter and darker from frame to frame."""
    root, output_dir = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("shards")
    rows = []
    for video in range(32):
        video_id, split = f"v{video:02d}", "train" if video < 24 else "validation"
        rows.append({"video_id": video_id, "path": video_id, "kind": "frames", "split": split, "label": video % 2})
        (root / video_id).mkdir()
        noise = np.random.default_rng(video).integers(0, 40, (40, 48, 3))
        for frame_index in range(6):
            light = 30 * (frame_index if video % 2 else 5 - frame_index)
            data = simplejpeg.encode_jpeg((noise + light).astype(np.uint8), quality=90)
            (root / video_id / f"{frame_index + 1:05d}.jpg").write_bytes(data)
    index = VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), ["getting darker", "getting brighter"])
    settings = ShardSettings(videos_per_shard=16)
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    for shard_plan in plans:
        write_shard(shard_plan, FolderSource(root), output_dir, settings)
    finish_shard_set(output_dir, index, plans, settings, "something_v1")
    return output_dir


@pytest.fixture(scope="session")
def model_dir(shards_dir, tmp_path_factory):
    """A network that was not trained, but answers differently for each clip of `shards_dir`; not to be changed."""
    folder = tmp_path_factory.mktemp("untrained")
    train = TrainSettings(pixels=32, num_segments=2, seed=3, precision="fp32")
    job = TrainJob("test", str(shards_dir), ModelSettings(name="sa_gsm_resnet18"), train)
    torch.manual_seed(1)
    network = build_model(job.model, num_classes=2, num_segments=train.num_segments)
    torch.nn.init.normal_(network.new_fc.weight, std=0.3)
    save_file(network.state_dict(), folder / "weights.safetensors")
    save_model(folder / "model", job, folder / "weights.safetensors")
    return folder / "model"


CODECS = {"mp4": "libx264", "webm": "libvpx", "avi": "mpeg4", "mov": "mjpeg"}


@dataclass(frozen=True)
class Asked:
    """Attributes: `raw` is the folder of the videos, whose names are `names`; `artifact` holds the folder `model`."""

    raw: Path
    names: list[str]
    shards_dir: Path
    artifact: Path


def write_film(path, number):
    """A generated video; its format goes by the suffix, and without one it is a folder of JPEG frames."""
    frames = render(draw_scene(SyntheticSettings(min_frames=5, max_frames=9), number, number), 72)
    if not path.suffix:
        path.mkdir()
        for index, frame in enumerate(frames, start=1):
            (path / f"{index:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(frame, quality=95))
        return
    source = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{frames.shape[2]}x{frames.shape[1]}", r=25)
    codec = CODECS[path.suffix[1:]]
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    target = source.output(str(path), vcodec=codec, pix_fmt=pixels, threads=1)
    target.run(cmd=ffmpeg_path(), input=frames.tobytes(), quiet=True)


@pytest.fixture(scope="session")
def asked(tmp_path_factory):
    """Not to be changed. The shards' frames are smaller than the videos, so that it matters how they are decoded."""
    raw, shards_dir, artifact = (tmp_path_factory.mktemp(name) for name in ("films", "film-shards", "film-model"))
    names = [*(f"film.{suffix}" for suffix in CODECS), "frames"]
    rows = []
    for number, name in enumerate(names):
        write_film(raw / name, number)
        kind = "video" if "." in name else "frames"
        rows.append({"video_id": name, "path": name, "kind": kind, "split": "train", "label": number})
    index = VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), list(LABEL_NAMES))
    settings = ShardSettings(short_side=40, jpeg_quality=5)
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    for shard_plan in plans:
        write_shard(shard_plan, FolderSource(raw), shards_dir, settings)
    finish_shard_set(shards_dir, index, plans, settings, "folder")
    train = TrainSettings(pixels=32, num_segments=4, precision="fp32")
    job = TrainJob("films", str(shards_dir), ModelSettings(name="gsm_resnet18"), train, val_split="train")
    torch.manual_seed(3)
    network = build_model(job.model, num_classes=len(LABEL_NAMES), num_segments=train.num_segments)
    save_file(network.state_dict(), artifact / "weights.safetensors")
    save_model(artifact / "model", job, artifact / "weights.safetensors")
    return Asked(raw, names, shards_dir, artifact)


@pytest.fixture(scope="session")
def attending(asked, tmp_path_factory):
    """`asked` with another network, which has attention in two slots, of gamma 0.4 and 0. Not to be changed."""
    artifact = tmp_path_factory.mktemp("attending")
    train = TrainSettings(pixels=32, num_segments=4, precision="fp32")
    model = ModelSettings(name="sa_gsm_resnet18", placement="layer1.0,layer2.0")
    job = TrainJob("films", str(asked.shards_dir), model, train, val_split="train")
    torch.manual_seed(3)
    network = build_model(model, num_classes=len(LABEL_NAMES), num_segments=train.num_segments)
    torch.nn.init.constant_(slot_attentions(network)["layer1.0"].gamma, 0.4)
    torch.nn.init.normal_(network.new_fc.weight)
    save_file(network.state_dict(), artifact / "weights.safetensors")
    save_model(artifact / "model", job, artifact / "weights.safetensors")
    return replace(asked, artifact=artifact)


@dataclass(frozen=True)
class Judged:
    """A network with random weights and what it said of the 24 training clips: folders as `train` and `evaluate` leave them."""

    train: Path
    evaluate: Path
    shards_dir: Path
    settings: EvaluateSettings


@pytest.fixture(scope="session")
def judged(shards_dir, tmp_path_factory):
    """Not to be changed."""
    train_dir, evaluate_dir = (tmp_path_factory.mktemp(name) for name in ("judged-train", "judged-evaluate"))
    train = TrainSettings(pixels=32, num_segments=4, precision="fp32")
    model = ModelSettings(name="sa_gsm_resnet18", placement="layer1.0,layer2.0")
    job = TrainJob("tiny", str(shards_dir), model, train)
    torch.manual_seed(3)
    network = build_model(job.model, num_classes=2, num_segments=train.num_segments)
    torch.nn.init.constant_(slot_attentions(network)["layer1.0"].gamma, 0.4)
    torch.nn.init.normal_(slot_gates(network)["layer1.1"].conv3D.weight, std=0.1)
    save_file(network.state_dict(), train_dir / "weights.safetensors")
    save_model(train_dir / "model", job, train_dir / "weights.safetensors")
    settings = EvaluateSettings(split="train", loader_threads=0)
    score_model(train_dir / "model", str(shards_dir), settings, evaluate_dir / "scores.parquet")
    return Judged(train_dir, evaluate_dir, shards_dir, settings)


@pytest.fixture
def make_subject(judged, tmp_path):
    """Makes a subject of the stage `insight` that writes into `tmp_path`, by settings of the stage."""

    def make(**chosen):
        settings, scores = InsightSettings.model_validate(chosen), read_scores(judged.evaluate / "scores.parquet")
        return Subject(judged.train / "model", str(judged.shards_dir), judged.settings, scores, settings, tmp_path)

    return make
