from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import ConfigError
from pipelines.insight.subject import Subject, take_rows


def test_all_clips_are_looked_at_where_they_are_few_enough(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    assert subject.rows == list(range(24))
    assert subject.num_segments == 4
    assert [subject.split.keys[row] for row in map(subject.row_of.get, subject.split.keys)] == subject.split.keys


@pytest.mark.parametrize("max_clips", [1, 7, 23])
def test_else_as_many_as_allowed_spread_over_the_split(make_subject: Callable[..., Subject], max_clips: int) -> None:
    rows = make_subject(max_clips=max_clips).rows
    assert len(set(rows)) == max_clips
    assert rows == sorted(rows)
    gaps = [b - a for a, b in zip([-1, *rows], [*rows, 24], strict=True)]
    assert max(gaps) <= 24 / max_clips + 1


def test_only_the_clips_of_chosen_classes(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(classes=["getting brighter"])
    assert subject.classes == [1]
    assert Counter(subject.split.labels[row] for row in subject.rows) == {1: 12}


def test_a_class_that_is_none_is_refused_with_the_nearest(make_subject: Callable[..., Subject]) -> None:
    with pytest.raises(ConfigError, match=r"insight.classes names 'geting darker', .* did you mean getting darker\?"):
        _ = make_subject(classes=["geting darker"]).rows


def test_some_rows_of_a_split_are_a_split_of_these_videos(make_subject: Callable[..., Subject], shards_dir: Path) -> None:
    split = make_subject().split
    taken = take_rows(split, [5, 2])
    assert taken.keys == [split.keys[5], split.keys[2]]
    assert taken.labels == [split.labels[5], split.labels[2]]
    assert (taken.video(1).frame_offsets == split.video(2).frame_offsets).all()
