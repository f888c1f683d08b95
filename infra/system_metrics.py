"""How busy this machine is while a run lasts, for MLflow's tab "System metrics"."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from infra.tracking_client import machine_sampler
from infra.tracking_run import TrackedRun

_FIRST_SECONDS = 1.0
_SECONDS_BETWEEN_SAMPLES = 10.0

_log = logging.getLogger(__name__)


@contextmanager
def watch_machine(run: TrackedRun, seconds: float = _SECONDS_BETWEEN_SAMPLES) -> Iterator[None]:
    """Log CPU, memory, disk, network and GPUs of this machine to `run` while the block runs, one sample each `seconds`.

    A step is a second of Unix time, so that a resumed run goes on to the right of where it was. Whatever goes wrong ends the
    watching, not the work.
    """
    ended = threading.Event()

    def watch() -> None:
        try:
            sample = machine_sampler()
            pause = min(_FIRST_SECONDS, seconds)
            while not ended.wait(pause):
                run.log_metrics(sample(), step=int(time.time()))
                pause = seconds
        except Exception as error:
            _log.warning("this machine is not watched any more: %s: %s", type(error).__name__, error)

    thread = threading.Thread(target=watch, name="watch-machine", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
