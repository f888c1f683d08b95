"""Settings: frozen pydantic models, and the one way to override them (dotted names, `train.learning_rate=0.02`).

Every package declares its own settings beside the code that they configure; `pipelines/config.py` puts them together. The
shell's `--set`, an experiment's variants and a trial of the search all go through `apply_overrides`, so each trial can be rerun
by hand.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from infra.errors import ConfigError
from infra.secrets import credentials_in, redact


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown name is an error, as is a URL with credentials.

    Settings are printed, hashed, kept in the store and recorded in MLflow.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _has_no_credentials(cls, data: Any) -> Any:
        """Before, since a path made of a URL no longer looks like one."""
        for name, value in data.items() if isinstance(data, dict) else ():
            if not (isinstance(value, dict) and _is_section(cls, name)) and credentials_in(value):
                raise ValueError(
                    f"{name} holds a URL with a user name, a password or a query, which would be printed and recorded; "
                    "expected SCHEME://PLACE: put credentials into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                    "...), and fetch what has a signed URL by other means"
                )
        return data


def _is_section(settings: type[Settings], name: str) -> bool:
    """Whether a member is settings again, which look at themselves."""
    field = settings.model_fields.get(name)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Settings)


S = TypeVar("S", bound=Settings)

_ABOUT_AS_NEAR = 0.05  # of difflib's ratio, from 0 to 1


def near(name: str, choices: Iterable[str]) -> list[str]:
    """Those of `choices` that an unknown `name` may mean, the nearest first; at most three."""
    close = difflib.get_close_matches(name, sorted(set(choices)), n=3, cutoff=0.5)
    likeness = [difflib.SequenceMatcher(None, name, choice).ratio() for choice in close]
    return [choice for choice, ratio in zip(close, likeness, strict=True) if ratio > likeness[0] - _ABOUT_AS_NEAR]


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: the nearest of `choices`, or all of them.

    Example:
        >>> nearest("lr_rate", ["learning_rate", "epochs"])
        'did you mean learning_rate?'
    """
    known = sorted(set(choices))
    close = near(name, known)
    return f"did you mean {' or '.join(close)}?" if close else f"known are: {', '.join(known)}"


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn `["train.epochs=3"]` into `{"train.epochs": 3}`; values are read as YAML.

    Raises:
        ConfigError: if an item has no `=`, an empty name, or a value that is not YAML.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set got {assignment!r}; expected NAME=VALUE, for example --set train.epochs=3")
        try:
            overrides[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or "an odd character"  # the whole message takes many lines
            raise ConfigError(
                f"--set {assignment!r} has a value that is not YAML ({reason}); put it in quotes: --set '{name}=\"...\"'"
            ) from error
    return overrides


def setting_names(settings: Settings, prefix: str = "") -> list[str]:
    """All dotted names below `settings`, sections before their members."""
    names = []
    for name in type(settings).model_fields:
        names.append(prefix + name)
        value = getattr(settings, name)
        if isinstance(value, Settings):
            names += setting_names(value, f"{prefix}{name}.")
    return names


def apply_overrides(settings: S, overrides: Mapping[str, Any]) -> S:
    """A copy of `settings` in which each dotted name of `overrides` has its new value.

    Raises:
        ConfigError: if a name is no setting (the nearest ones are named) or a value is not allowed.
    """
    tree = settings.model_dump()
    names = setting_names(settings)
    for dotted, value in overrides.items():
        if dotted not in names:
            raise ConfigError(f"{dotted} is not a setting; {_nearest_setting(dotted, names)}")
        *sections, last = dotted.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[last] = value
    try:
        return type(settings).model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain_validation_error(error)) from error


def changed_settings(before: Settings, after: Settings) -> dict[str, Any]:
    """The dotted overrides with which `apply_overrides` turns `before` into `after`."""
    changed: dict[str, Any] = {}
    for name in type(after).model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(old, Settings) and isinstance(new, Settings):
            changed |= {f"{name}.{inner}": value for inner, value in changed_settings(old, new).items()}
        elif old != new:
            changed[name] = after.model_dump(mode="json")[name]
    return changed


def explain_validation_error(error: ValidationError) -> str:
    """One line for each wrong setting: its dotted name, what was found, what was expected."""
    lines = []
    for item in error.errors():
        dotted = ".".join(str(part) for part in item["loc"])
        shown = item["type"] != "missing" and not isinstance(item["input"], dict)
        found = f" (found {redact(repr(item['input']))})" if shown else ""
        # YAML takes 2026, 2026-01-01 and yes for a number, a date and a truth value, and ~ for nothing.
        quotes = f"; if it is meant as text, put it in quotes: {dotted}='\"...\"'" if item["type"] == "string_type" else ""
        lines.append(f"{dotted or 'settings'}: {item['msg'].removeprefix('Value error, ')}{found}{quotes}")
    return "; ".join(lines)


def _nearest_setting(dotted: str, names: list[str]) -> str:
    """Prefer names with the same last part, since a wrong section is the commonest slip."""
    last = dotted.rsplit(".", 1)[-1]
    same_last = [name for name in names if name.rsplit(".", 1)[-1] == last]
    if same_last:
        return f"did you mean {' or '.join(same_last)}?"
    section = dotted.rpartition(".")[0]
    siblings = [name for name in names if name.rpartition(".")[0] == section]
    return nearest(dotted, siblings or names)
