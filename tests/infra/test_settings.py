import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from infra.settings import Settings, apply_overrides, changed_settings, nearest, parse_assignments


class Optimiser(Settings):
    learning_rate: float = 0.1
    epochs: int = 3


class Everything(Settings):
    train: Optimiser = Optimiser()
    name: str = "a"


@given(rate=st.floats(1e-6, 10), epochs=st.integers(1, 1000))
def test_overrides_change_what_they_name_and_nothing_else(rate, epochs):
    changed = apply_overrides(Everything(), {"train.learning_rate": rate, "train.epochs": epochs})
    assert changed == Everything(train=Optimiser(learning_rate=rate, epochs=epochs))
    assert Everything() == Everything(train=Optimiser(learning_rate=0.1, epochs=3))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train.learning_rat", "did you mean train.learning_rate?"),
        ("learning_rate", "did you mean train.learning_rate?"),
        ("search.epochs", "did you mean train.epochs?"),
        ("nam", "did you mean name?"),
    ],
)
def test_an_unknown_setting_names_the_nearest(name, hint):
    with pytest.raises(ConfigError, match="is not a setting") as caught:
        apply_overrides(Everything(), {name: 1})
    assert hint in str(caught.value)


def test_a_wrong_value_says_what_was_found_and_expected():
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Everything(), {"train.epochs": "many"})
    assert "train.epochs" in str(caught.value)
    assert "integer" in str(caught.value)
    assert "'many'" in str(caught.value)


def test_assignments_are_yaml():
    got = parse_assignments(["a.b=0.02", "c=3a,4e", "d=true", "e=null", "f=a=b", "g=[1, 2]", "h="])
    assert got == {"a.b": 0.02, "c": "3a,4e", "d": True, "e": None, "f": "a=b", "g": [1, 2], "h": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs", "expected NAME=VALUE"),
        ("=3", "expected NAME=VALUE"),
        ("a=[1", "is not YAML .expected ',' or ']'"),
        ("a=b\x01", "is not YAML .an odd character"),
    ],
)
def test_a_malformed_assignment_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_assignments([text])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["2026", "2026-01-01", "yes"])
def test_a_text_that_yaml_takes_for_something_else_can_be_quoted(value):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Everything(), parse_assignments([f"name={value}"]))
    advice = str(caught.value).rpartition(" ")[2]
    assert advice == """name='"..."'"""
    quoted = advice.replace("...", value).replace("'", "")  # as the shell passes it on
    assert apply_overrides(Everything(), parse_assignments([quoted])).name == value


@given(rate=st.floats(1e-6, 10), epochs=st.integers(1, 1000), name=st.text())
def test_changed_settings_are_the_way_from_one_to_the_other(rate, epochs, name):
    after = Everything(train=Optimiser(learning_rate=rate, epochs=epochs), name=name)
    assert apply_overrides(Everything(), changed_settings(Everything(), after)) == after
    assert changed_settings(after, after) == {}


def test_nearest_falls_back_to_all():
    assert nearest("zzz", ["b", "a"]) == "known are: a, b"


@pytest.mark.parametrize("url", ["s3://KEY:hush@bucket/x", "https://host/x?X-Amz-Signature=hush", "https://me:hush@host/x"])
def test_a_url_with_credentials_is_refused_and_not_shown(url):
    for overrides, place in (
        ({"name": url}, "settings: name"),
        ({"name": ["fine", {"deep": url}]}, "settings: name"),
        ({"train.epochs": url}, "train: epochs"),
    ):
        with pytest.raises(
            ConfigError, match=f"{place} holds a URL with .*; expected SCHEME://PLACE: .* environment"
        ) as caught:
            apply_overrides(Everything(), overrides)
        assert "hush" not in str(caught.value)
