"""What an experiment asks of every node of a cluster."""

from collections.abc import Collection
from pathlib import Path

from infra.cluster_findings import Question
from infra.filesystems import Folder
from infra.tracking import tracking_uri
from pipelines.config import ExperimentConfig

_FFMPEG = "preprocessing.decode:ffmpeg_version"


def node_needs(config: ExperimentConfig | None, workdir: Path) -> Question:
    """All that `sagsm cluster check` asks.

    Args:
        config: of the experiment; None leaves out its raw videos and the folders that it names.
        workdir: absolute folder of the store.
    """
    folders = {"store": str(workdir / "store")}
    raw = None
    if config is not None:
        folders |= {} if config.shards.output is None else {"shards.output": Folder(config.shards.output).url}
        folders |= {} if config.train.checkpoints is None else {"train.checkpoints": Folder(config.train.checkpoints).url}
        raw = None if config.dataset.root is None else Folder(config.dataset.root).url
    return Question(folders=folders, raw=raw, tracking_uri=tracking_uri(workdir), ffmpeg=_FFMPEG)


def stage_needs(config: ExperimentConfig, workdir: Path, stages: Collection[str]) -> Question:
    """What `sagsm run` asks before it starts these stages: MLflow it knows, and raw videos only shards need."""
    whole = node_needs(config, workdir)
    decodes = "shards" in stages
    return Question(folders=whole.folders, raw=whole.raw if decodes else None, ffmpeg=whole.ffmpeg if decodes else None)
