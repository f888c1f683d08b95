"""The shards of coming steps are fetched into the cache while earlier steps are shown."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor


class FetchAhead:
    """One thread that fetches shards in the order in which an epoch needs them, a few steps before it does.

    What cannot be fetched is left to whoever needs it: he fails with the name of the clip.

    Args:
        fetch: gets one shard into the cache.
        shards: of each step that will be shown, in order.
        num_ahead: how many steps to look ahead.
    """

    def __init__(self, fetch: Callable[[str], object], shards: Sequence[set[str]], num_ahead: int) -> None:
        self._fetch = fetch
        self._shards = shards
        self._num_ahead = num_ahead
        self._num_asked = 0
        self._asked: set[str] = set()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader-fetch")

    def reach(self, step: int) -> None:
        """Say that this step, counted in `shards` from 0, is being read: those up to `num_ahead` after it are looked at."""
        stop = step + self._num_ahead + 1
        for shards in self._shards[self._num_asked : stop]:
            for shard in sorted(shards - self._asked):
                self._pool.submit(self._fetch, shard)
            self._asked |= shards
        self._num_asked = max(self._num_asked, stop)

    def close(self) -> None:
        """Ends the thread, after the shard that it is fetching."""
        self._pool.shutdown(wait=True, cancel_futures=True)
