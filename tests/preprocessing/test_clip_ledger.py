from hypothesis import given
from hypothesis import strategies as st

from preprocessing.clip_ledger import ClipLedger

KEYS = st.lists(st.text(max_size=8), max_size=20)


@given(KEYS, st.data())
def test_order_and_division_do_not_matter(keys, data):
    shuffled = data.draw(st.permutations(keys))
    cut = data.draw(st.integers(0, len(keys)))
    whole = ClipLedger().add(keys)
    assert ClipLedger().add(shuffled[:cut]) + ClipLedger().add(shuffled[cut:]) == whole
    assert ClipLedger.parse(str(whole)) == whole


@given(KEYS.filter(bool), st.data())
def test_a_lost_doubled_or_exchanged_clip_is_seen(keys, data):
    whole, place = ClipLedger().add(keys), data.draw(st.integers(0, len(keys) - 1))
    assert ClipLedger().add(keys[:place] + keys[place + 1 :]) != whole
    assert ClipLedger().add([*keys, keys[place]]) != whole
    assert ClipLedger().add([*keys[:place], keys[place] + "x", *keys[place + 1 :]]) != whole
