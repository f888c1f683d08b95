"""SIGTERM in a worker process: noted, so that all ranks can save a checkpoint before the process must go.

Schedulers send it some time before they kill (Kubernetes 30 s, spot instances 30 to 120 s). Ray's own handler ends the process
at once, and the other ranks with it, since they then miss a peer.
"""

import signal
import threading
from types import FrameType

_asked_to_end = threading.Event()


def catch_sigterm() -> None:
    """From now on the first SIGTERM is only noted; a second one does what SIGTERM did before. For the main thread only."""
    before = signal.getsignal(signal.SIGTERM)

    def note(_number: int, _frame: FrameType | None) -> None:
        _asked_to_end.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)


def is_asked_to_end() -> bool:
    """Whether SIGTERM has come since `catch_sigterm`."""
    return _asked_to_end.is_set()
