"""Raw videos -> shards -> batches.

`open_shards` and `make_loader` are loaded when they are first asked for: the tasks that write shards need no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preprocessing.loader import make_loader
    from preprocessing.reader import open_shards

__all__ = ["make_loader", "open_shards"]


def __getattr__(name: str) -> Any:
    if name == "make_loader":
        from preprocessing.loader import make_loader

        return make_loader
    if name == "open_shards":
        from preprocessing.reader import open_shards

        return open_shards
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
