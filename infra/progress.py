"""Progress of long work: a live table on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

OnProgress = Callable[[int, int, str], None]
"""Called as `on_progress(done, total, text)`; `text` is what the stage counts, with its rate ("412 frames/s")."""

_SECONDS_BETWEEN_LINES = 10.0


class StageProgress:
    """Shows what each stage is doing, on standard error so that `--json` owns standard output.

    On a terminal every stage is a bar with its rate and the time left; otherwise a line is printed when a stage starts, ends,
    and at most every ten seconds in between. Safe to call from several threads.
    """

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._last_line: dict[str, float] = {}
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # It gets what is left of a narrow terminal; otherwise Rich would cut the time left as well.
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=self._console,
            expand=True,
        )

    def __enter__(self) -> "StageProgress":
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._console.is_terminal:  # elsewhere it would print an empty line
            self._bars.stop()

    def say(self, text: str) -> None:
        """Print one line of plain text above the bars."""
        with self._lock:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def for_stage(self, stage: str) -> OnProgress:
        """The `on_progress` function of one stage."""

        def on_progress(done: int, total: int, text: str) -> None:
            with self._lock:
                self._show(stage, done, total, text)

        return on_progress

    def close_stage(self, stage: str) -> None:
        """Remove the bar of a stage that has ended."""
        with self._lock:
            task = self._tasks.pop(stage, None)
            if task is not None:
                self._bars.remove_task(task)

    def _show(self, stage: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        started = self._started.setdefault(stage, now)
        if self._console.is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, text=text)
            self._bars.update(self._tasks[stage], completed=done, total=total, text=text)
        elif now - self._last_line.get(stage, now - _SECONDS_BETWEEN_LINES) >= _SECONDS_BETWEEN_LINES:
            self._last_line[stage] = now
            left = f", {(now - started) / done * (total - done):.0f} s left" if 0 < done < total and now > started else ""
            self._console.print(f"{stage}: {done}/{total} {text}{left}", markup=False, highlight=False, soft_wrap=True)
