"""How the driver hears from the workers, and they from it, without a disk that both see.

The board is an actor on the driver's node (`worker.py` makes it). Rank 0 writes how far training is on it, at most once a
second, and its answer says whether to stop; the driver's `Listener` reads it. No training step ever waits for the board.

This module imports no torch, so that the actor's process starts at once.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infra.progress import OnProgress
    from pipelines.training.metrics import EpochMetrics, StepStatus

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_STATUSES = 1.0


class Board:
    """What rank 0 said last, and whether the driver wants it to stop; holds plain data only."""

    def __init__(self) -> None:
        self._status: dict[str, Any] | None = None
        self._history: list[dict[str, Any]] = []
        self._stop = False

    def write_status(self, status: dict[str, Any]) -> bool:
        """Rank 0: a `StepStatus` as a dict; the answer is whether training shall save a checkpoint and stop."""
        self._status = status
        return self._stop

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Rank 0: all epochs that its newest checkpoint holds, as dicts."""
        self._history = history

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """Driver: the newest status, None before the first, and the epochs."""
        return self._status, self._history

    def begin(self) -> None:
        """Driver: workers are about to start; what earlier ones said of their steps is past."""
        self._status, self._stop = None, False

    def ask_to_stop(self) -> None:
        """Driver: training shall save a checkpoint and stop, so that it can start again with more workers."""
        self._stop = True


def describe_status(status: "StepStatus", last_epoch: "EpochMetrics | None") -> str:
    """One line for the progress bar, with the last epoch's validation if there is one."""
    val = "" if last_epoch is None or last_epoch.val_top1 is None else f", val top-1 {last_epoch.val_top1:.1%}"
    return (
        f"steps, epoch {status.epoch + 1}/{status.epochs}: loss {status.loss:.3f}{val}, {status.clips_per_second:.1f} clips/s, "
        f"{status.data_wait:.0%} of the time waiting for data"
    )


@dataclass
class Listener:
    """On the driver: passes on what training says, each epoch once and in order.

    Attributes:
        epochs: of the whole training, for the bar before the first step.
        on_epoch: called with each epoch's metrics.
        on_progress: called as `on_progress(done, total, text)`, in steps.
        history: the epochs that were passed on.
    """

    epochs: int
    on_epoch: "Callable[[EpochMetrics], None] | None" = None
    on_progress: "OnProgress | None" = None
    history: "list[EpochMetrics]" = field(default_factory=list)
    _place: tuple[int, int] | None = None

    def hear_epochs(self, history: "Sequence[EpochMetrics]") -> None:
        """Pass on those epochs that are new."""
        for metrics in history[len(self.history) :]:
            if self.on_epoch is not None:
                self.on_epoch(metrics)
            self.history.append(metrics)

    def hear_status(self, status: "StepStatus") -> None:
        """Show how far training is."""
        done = status.epoch * status.steps_per_epoch + status.step_in_epoch
        self._place = done, status.epochs * status.steps_per_epoch
        self.say(describe_status(status, self.history[-1] if self.history else None))

    def say(self, text: str) -> None:
        """Show a text where the bar stands."""
        if self.on_progress is not None:
            self.on_progress(*(self._place or (0, self.epochs)), text)


class Reporter:
    """On rank 0: tells after steps, at most once a second, how far training is, and of all epochs when one has ended.

    Args:
        checkpoint_dir: the epochs are those of its newest checkpoint, so that what is told can never be lost again.
        tell_status: told the newest status.
        tell_epochs: told all epochs, also those of earlier runs.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        tell_status: "Callable[[StepStatus], None]",
        tell_epochs: "Callable[[Sequence[EpochMetrics]], None]",
    ) -> None:
        self._checkpoint_dir = checkpoint_dir
        self._tell_status, self._tell_epochs = tell_status, tell_epochs
        self._next = 0.0

    def on_step(self, status: "StepStatus") -> None:
        """For `loop.train`."""
        if not self._next:
            self.on_epoch()
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS_BETWEEN_STATUSES
            self._tell_status(status)

    def on_epoch(self, _metrics: "EpochMetrics | None" = None) -> None:
        """For `loop.train`."""
        from pipelines.training.checkpoint import read_history

        self._tell_epochs(read_history(self._checkpoint_dir))


class Watch:
    """A thread of the driver that reads the board every half second while the `with` block runs, and once more at its end.

    When the listener raises, nothing more is passed on, and the error comes out at the end of the block, unless that has one.

    Args:
        read: gives `Board.read`.
        listener: gets what is new.
        look: called after each reading once the first step is done (workers that only start do not yet hold what they will).
    """

    def __init__(
        self,
        read: Callable[[], tuple[Mapping[str, Any] | None, Sequence[Mapping[str, Any]]]],
        listener: Listener,
        look: Callable[[], None],
    ) -> None:
        self._read, self._listener, self._look = read, listener, look
        self._last: Mapping[str, Any] | None = None
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="board")

    def __enter__(self) -> "Watch":
        self._watching: Future[None] = self._pool.submit(self._watch)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown()
        if kind is None:
            self._watching.result()

    def _watch(self) -> None:
        from pipelines.training.metrics import EpochMetrics, StepStatus

        is_last_look = False
        while not is_last_look:
            is_last_look = self._ended.wait(_SECONDS_BETWEEN_LOOKS)
            status, history = self._read()
            self._listener.hear_epochs([EpochMetrics(**epoch) for epoch in history])
            if status is not None and status != self._last:
                self._last = status
                self._listener.hear_status(StepStatus(**status))
            if self._last is not None:
                self._look()
