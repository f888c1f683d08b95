"""Asks the nodes of a cluster, by a process on each, whether they can do what a run asks of them."""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra import cluster_probe
from infra.cluster import PACKAGES
from infra.cluster_findings import DISTRIBUTIONS, HERE, Finding, Question, differences, late, problems
from infra.cluster_probe import Asked, Facts, FolderMark, RawSample
from infra.errors import ClusterError
from infra.filesystems import Folder

_ANSWER_SECONDS = 90.0  # the code travels to the node, and a process starts there
_CLOCK_SECONDS = 10.0
_CLOCK_ROUNDS = 5
_RAW_ENTRIES = 5


@dataclass(frozen=True)
class Clock:
    """How far a node's clock is ahead of the driver's, and the bound of the error of that: half a round trip. In seconds."""

    ahead: float
    error: float


@dataclass(frozen=True)
class Node:
    """A node, or the driver, and what it says of itself.

    Attributes:
        name: its name or address; `HERE` for the driver.
        resources: that Ray may give away there: "CPU", "GPU", "memory" in bytes; empty for the driver.
        facts: None if it does not answer.
        clock: None if it does not answer, and for the driver.
        findings: what is wrong there.
    """

    name: str
    resources: Mapping[str, float]
    facts: Facts | None
    clock: Clock | None
    findings: list[Finding]


def check_nodes(question: Question) -> list[Node]:
    """Ask this process and every node of the connected cluster; the driver comes first.

    A process is started on each node, as for a task, that reserves nothing: it also answers where all CPUs are busy.

    Raises:
        ClusterError: if a folder cannot be written, or the raw videos cannot be read, from here.
    """
    raw = None if question.raw is None else _raw_sample(question.raw)
    with _marked(question.folders) as marks:

        def asked(number: int, ray_dir: str | None) -> Asked:
            return {
                "packages": PACKAGES,
                "distributions": DISTRIBUTIONS,
                "ffmpeg": question.ffmpeg,
                "folders": {purpose: mark.for_node(number) for purpose, mark in marks.items()},
                "raw": raw,
                "tracking_uri": question.tracking_uri,
                "ray_dir": ray_dir,
            }

        here = cluster_probe.look(asked(0, None))
        found = [Node(HERE, {}, here, None, problems(HERE, here, question))]
        with _probes() as probes:
            answers = [
                probe.actor.look.remote(asked(number, str(Path(probe.node["RayletSocketName"]).parent)))
                for number, probe in enumerate(probes, start=1)
            ]
            for number, (probe, (facts, reason)) in enumerate(zip(probes, _gathered(answers), strict=True), start=1):
                for purpose, mark in marks.items():
                    if facts and not facts["folders"][purpose] and not mark.has_copy(number):
                        facts["folders"][purpose] = "what it writes does not arrive here"
                clock = _clock(probe.actor) if facts else None
                findings = _judged(probe.name, facts, reason, clock, here, question)
                if facts is None and not _is_alive(probe.node):
                    findings = [Finding(probe.name, "answer", "it died while it was asked; a run goes on without it", False)]
                found.append(_weighed(Node(probe.name, probe.node["Resources"], facts, clock, findings)))
        return found


def require_fit(question: Question, address: str) -> list[Finding]:
    """Refuse to start on a cluster on which a run would break.

    Returns:
        What is wrong and breaks nothing.

    Raises:
        ClusterError: with all that breaks it, a line each.
    """
    found = [finding for node in check_nodes(question) for finding in node.findings]
    broken = [str(finding) for finding in found if finding.breaks]
    if broken:
        lines = "\n".join(f"  {line}" for line in broken)
        raise ClusterError(f"the cluster at {address} is not fit for this run (`sagsm cluster check` shows more):\n{lines}")
    return found


@dataclass(frozen=True)
class _Mark:
    """A file of ours in a folder, that each node copies under a name of its own."""

    folder: Folder
    name: str

    def for_node(self, number: int) -> FolderMark:
        return {"url": self.folder.url, "theirs": self.name, "mine": f"{self.name}-{number}"}

    def has_copy(self, number: int) -> bool:
        try:
            return self.folder.read_bytes(f"{self.name}-{number}") == self.name.encode()
        except OSError:
            return False


@contextmanager
def _marked(folders: Mapping[str, str]) -> Iterator[dict[str, _Mark]]:
    """A mark in each folder for as long as the block; nothing stays, no folder either that was not there."""
    name = f".sagsm-check-{uuid.uuid4().hex[:12]}"
    marks: dict[str, _Mark] = {}
    made: list[Path] = []
    try:
        for purpose, url in folders.items():
            folder = Folder(url)
            if folder.local is not None:
                made += [path for path in (folder.local, *folder.local.parents) if not path.exists()]
            try:
                folder.make()
                folder.write_bytes(name, name.encode())
            except OSError as error:
                raise ClusterError(f"the {purpose} {url} cannot be written from here: {error}; choose another place") from error
            marks[purpose] = _Mark(folder, name)
        yield marks
    finally:
        for mark in marks.values():
            with suppress(OSError):
                for left in [left for left in mark.folder.list() if left.startswith(name)]:
                    mark.folder.delete(left)
        for path in sorted(made, reverse=True):  # the inner ones first
            with suppress(OSError):
                path.rmdir()


def _raw_sample(url: str) -> RawSample:
    """Some of what lies in the folder of the raw videos."""
    try:
        entries = Folder(url).entries()[:_RAW_ENTRIES]
    except OSError as error:
        raise ClusterError(f"the raw videos in {url} cannot be read from here: {error}; set dataset.root") from error
    return {"url": url, "entries": [(entry.name, entry.is_folder, entry.size) for entry in entries]}


@dataclass(frozen=True)
class _Probe:
    name: str
    node: Mapping[str, Any]
    actor: Any


@contextmanager
def _probes() -> Iterator[list[_Probe]]:
    """A process on every node that is alive."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    nodes.sort(key=lambda node: (node["NodeName"], node["NodeID"]))
    ray.cloudpickle.register_pickle_by_value(cluster_probe)  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    try:
        actor: Any = ray.remote(num_cpus=0)(cluster_probe.Probe)
        actors = [
            actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in nodes
        ]
    finally:
        ray.cloudpickle.unregister_pickle_by_value(cluster_probe)  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    try:
        yield [_Probe(*parts) for parts in zip(_names(nodes), nodes, actors, strict=True)]
    finally:
        for handle in actors:
            ray.kill(handle)


def _is_alive(node: Mapping[str, Any]) -> bool:
    import ray

    return node["NodeID"] in {other["NodeID"] for other in ray.nodes() if other["Alive"]}  # type: ignore[no-untyped-call]  # Ray


def _names(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names or addresses, with a part of the id where several nodes are on one machine."""
    names = [str(node["NodeName"] or node["NodeManagerAddress"]) for node in nodes]
    ids = [str(node["NodeID"])[:6] for node in nodes]
    return [name if names.count(name) == 1 else f"{name} ({id_})" for name, id_ in zip(names, ids, strict=True)]


def _gathered(answers: Sequence[Any]) -> Iterator[tuple[Facts | None, str]]:
    """What each node says, or why it says nothing."""
    import ray

    ready, _ = ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWER_SECONDS)
    for answer in answers:
        if answer not in ready:
            yield None, f"it did not answer within {_ANSWER_SECONDS:.0f} s"
            continue
        try:
            yield ray.get(answer), ""
        except ray.exceptions.RayError as error:
            yield None, " ".join(str(error).split())


def _clock(actor: Any) -> Clock | None:
    """The best of a few questions: the shortest round trip says most."""
    import ray

    rounds = []
    try:
        for _ in range(_CLOCK_ROUNDS):
            began, started = time.perf_counter(), time.time()
            theirs = ray.get(actor.time.remote(), timeout=_CLOCK_SECONDS)
            half = (time.perf_counter() - began) / 2
            rounds.append((half, theirs - (started + half)))
    except ray.exceptions.RayError:  # GetTimeoutError too
        return None
    error, ahead = min(rounds)
    return Clock(ahead, error)


def _judged(name: str, facts: Facts | None, reason: str, clock: Clock | None, here: Facts, question: Question) -> list[Finding]:
    if facts is None or clock is None:
        text = f"no task can run there: {reason or 'it fell silent'}; its logs are in /tmp/ray/session_latest/logs"
        return [Finding(name, "answer", text, True)]
    return [*problems(name, facts, question), *differences(name, facts, here), *late(name, clock.ahead, clock.error)]


def _weighed(node: Node) -> Node:
    """A node that has nothing to give gets no work, so that nothing breaks there."""
    if node.resources.get("CPU") or node.resources.get("GPU"):
        return node
    return replace(node, findings=[replace(finding, breaks=False) for finding in node.findings])
