"""What the search may change: dimensions over dotted settings, as data.

A point of the space is a flat dict of Optuna parameters. `overrides_of` turns it into the dotted settings that `--set` takes,
so that every trial can be run again by hand. Ten switches (`model.placement.3a` and so on) fold into one `model.placement`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.placement import SLOTS, parse_placement
from tuning.settings import Choice, Dimension, SearchSettings

if TYPE_CHECKING:
    import optuna

PLACEMENT = "model.placement"
LEARNING_RATE = "train.learning_rate"

FAMILIES = ("none", "all", "stage3", "stage4", "stage5", "stage4,stage5", "5b", "3c,4e,5b", "3b,4a,4c,4e,5b")
"""Named placements for a small budget: whole stages, the last slot, the last of each stage, every other slot."""

_BASELINES = ("none", "all")


def search_space(settings: SearchSettings) -> dict[str, Dimension]:
    """The dimensions that the settings span, by name, in the order in which they are asked for."""
    placement: dict[str, Dimension] = {}
    if settings.placement == "families":
        placement = {PLACEMENT: Choice(values=FAMILIES)}
    elif settings.placement == "booleans":
        placement = {_switch(slot): Choice(values=(False, True)) for slot in SLOTS}
    return placement | settings.space


def suggest_params(trial: "optuna.Trial", settings: SearchSettings) -> dict[str, Any]:
    """Ask Optuna for one point of the space: the define-by-run function of the search."""
    return {name: _suggest(trial, name, dimension) for name, dimension in search_space(settings).items()}


def _suggest(trial: "optuna.Trial", name: str, dimension: Dimension) -> Any:
    if isinstance(dimension, Choice):
        return trial.suggest_categorical(name, dimension.values)
    if dimension.is_whole:
        return trial.suggest_int(name, int(dimension.low), int(dimension.high), log=dimension.log)
    return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)


def baseline_points(settings: SearchSettings) -> list[dict[str, Any]]:
    """The points tried before the sampler may choose: attention nowhere, then everywhere; none without `baselines`."""
    if not settings.baselines:
        return []
    others = {name: dimension.middle for name, dimension in settings.space.items()}
    points = []
    for name in _BASELINES:
        placement = parse_placement(name)
        where = {PLACEMENT: name} if settings.placement == "families" else {_switch(slot): slot in placement for slot in SLOTS}
        points.append({**where, **others})
    return points


def overrides_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted settings of a point.

    Numbers are rounded to three significant digits: what is trained is what is printed.

    Args:
        params: a point of the space; names that are no dotted settings are left out.

    Example:
        >>> overrides_of({"model.placement.3a": True, "model.placement.4e": True, "train.learning_rate": 0.031234})
        {'model.placement': '3a,4e', 'train.learning_rate': 0.0312}
    """
    switches = {_switch(slot): slot for slot in SLOTS}
    overrides: dict[str, Any] = {}
    if PLACEMENT in params:
        overrides[PLACEMENT] = str(parse_placement(params[PLACEMENT]))
    elif switches.keys() & params.keys():
        overrides[PLACEMENT] = ",".join(slot for name, slot in switches.items() if params.get(name)) or "none"
        overrides[PLACEMENT] = str(parse_placement(overrides[PLACEMENT]))
    for name, value in params.items():
        if "." in name and name != PLACEMENT and name not in switches:
            overrides[name] = float(f"{value:.3g}") if isinstance(value, float) else value
    return overrides


def _switch(slot: str) -> str:
    return f"{PLACEMENT}.{slot}"
