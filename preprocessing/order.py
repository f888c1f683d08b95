"""The order of an epoch's clips: a pure function of (seed, epoch), each clip once.

Local shards are shuffled as a whole. Remote ones are fetched whole into a bounded cache, so their clips are shuffled with
locality: the shards get a random order, a clip of the shard at place p stands at a random point in [p, p + window), and the
clips follow these points. At any point, clips of just `window` shards are to be met; a shard comes, stays for a while and never
comes again.
"""

import numpy as np
import numpy.typing as npt

from preprocessing.transforms import clip_rng


def shuffled_rows(shards: npt.NDArray[np.int64], seed: int, epoch: int, window: int) -> npt.NDArray[np.int64]:
    """A random order of the rows 0 to N - 1.

    Args:
        shards: the number of each row's shard, from 0. Shape: [N].
        seed: of all draws.
        epoch: from 0.
        window: how many shards the clips that are near each other come from; that many or more shards than there are make the
            order fully random.

    Returns:
        A permutation of the rows. Shape: [N].
    """
    rng = clip_rng(seed, epoch, "order of clips")
    num_shards = int(shards.max()) + 1
    if window >= num_shards:
        return rng.permutation(len(shards))
    places = rng.permutation(num_shards)
    return np.argsort(places[shards] + window * rng.random(len(shards)), kind="stable")
