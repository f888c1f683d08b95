import threading

from preprocessing.fetch_ahead import FetchAhead

SHARDS = [{"a"}, {"a", "b"}, {"b"}, {"c", "b"}, {"d"}]


def test_shards_are_fetched_once_in_order_and_not_too_early():
    fetched = []
    ahead = FetchAhead(fetched.append, SHARDS, 1)
    seen = []
    for step in range(len(SHARDS)):
        ahead.reach(step)
        ahead._pool.submit(lambda: None).result()
        seen.append("".join(fetched))
    ahead.close()
    assert seen == ["ab", "ab", "abc", "abcd", "abcd"]


def test_what_cannot_be_fetched_is_left_alone():
    fetched = []

    def fetch(shard):
        if shard == "b":
            raise OSError("the line broke")
        fetched.append(shard)

    ahead = FetchAhead(fetch, SHARDS, 10)
    ahead.reach(0)
    ahead._pool.submit(lambda: None).result()
    ahead.close()
    assert fetched == ["a", "c", "d"]


def test_closing_ends_the_thread_after_the_shard_at_hand():
    started, go_on, fetched = threading.Event(), threading.Event(), []

    def fetch(shard):
        started.set()
        assert go_on.wait(10)
        fetched.append(shard)

    ahead = FetchAhead(fetch, SHARDS, 10)
    ahead.reach(0)
    assert started.wait(10)
    threading.Timer(0.1, go_on.set).start()
    ahead.close()
    assert fetched in (["a"], ["a", "b"]), "the first, or also the next if it began before the rest was called off"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader-fetch")]
