"""What the search may change: dimensions over dotted settings, as data.

A point of the space is a flat dict of Optuna parameters. `Space.overrides_of` turns it into the dotted settings that `--set`
takes, so that every trial can be run again by hand. Several parameters can fold into one `model.placement`: a switch for each
slot (`model.placement.3a` and so on), or the first slot and the number of slots of a range.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.errors import ConfigError
from models import SLOTS, Placement, model_options, model_slots, parse_placement
from tuning.settings import Choice, Dimension, Range, Scalar, SearchSettings

if TYPE_CHECKING:
    import optuna

NETWORK = "model.name"
PLACEMENT = "model.placement"
LEARNING_RATE = "train.learning_rate"
SA_GSM = "sa_gsm_bn_inception"

_STAGES = ("stage2", "stage3", "stage4", "stage5")
_FIRST, _LENGTH = f"{PLACEMENT}.first", f"{PLACEMENT}.length"

Params = dict[str, Any]


@dataclass(frozen=True)
class Space:
    """All points that a search may try.

    Attributes:
        dimensions: by name of the parameter, in the order in which they are asked for.
        fixed: dotted settings that all points share.
        network: what trials train where neither a dimension nor `fixed` names a network.
    """

    dimensions: dict[str, Dimension]
    fixed: dict[str, Any]
    network: str

    @property
    def is_finite(self) -> bool:
        """Whether there are so few points that they can be listed: no dimension is a real number."""
        return all(
            isinstance(dimension, Choice) or dimension.is_whole or dimension.low == dimension.high
            for dimension in self.dimensions.values()
        )

    @property
    def has_placement(self) -> bool:
        """Whether the placement is searched."""
        return any(name.startswith(PLACEMENT) for name in self.dimensions)

    def choose(self, pick: Callable[[str, Dimension], Any]) -> Params:
        """A point: `pick` is asked for each dimension whose conditions are met by what was picked before it."""
        params: Params = {}
        for name, dimension in self.dimensions.items():
            if self._is_asked(dimension, params):
                params[name] = pick(name, dimension)
        return params

    def points(self) -> Iterator[Params]:
        """All points of a finite space, in a fixed order: the last dimension changes first."""
        yield from self._extend({}, list(self.dimensions.items()))

    def draw(self, rng: np.random.Generator) -> Params:
        """A random point, uniform in each dimension's scale."""
        return self.choose(lambda _, dimension: _draw(dimension, rng))

    def slots_of(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """The slots of a point's network."""
        return model_slots(self._network_of(params)) or SLOTS  # a network without slots ignores its placement

    def num_slots(self, overrides: Mapping[str, Any]) -> int:
        """How many slots attend; 0 if the search does not choose it."""
        return len(parse_placement(overrides.get(PLACEMENT, "none"), self.slots_of(overrides)))

    def overrides_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The dotted settings of a point, the fixed ones among them.

        Numbers are rounded to three significant digits: what is trained is what is printed.

        Example:
            >>> space = search_space(SearchSettings(placement="booleans", space={}))
            >>> space.overrides_of({"model.placement.3a": True, "model.placement.4e": True})
            {'model.placement': '3a,4e'}
        """
        overrides: dict[str, Any] = dict(self.fixed)
        placement = self._placement_of(params)
        if placement is not None:
            overrides[PLACEMENT] = str(parse_placement(placement, self.slots_of(params)))
        for name, value in params.items():
            if not name.startswith(PLACEMENT):
                overrides[name] = _rounded(value, self.dimensions[name])
        return overrides

    def _network_of(self, params: Mapping[str, Any]) -> str:
        return str(params.get(NETWORK, self.fixed.get(NETWORK, self.network)))

    def _placement_of(self, params: Mapping[str, Any]) -> Any:
        """In any spelling; None if the search does not choose it, or not yet."""
        if PLACEMENT in params:
            return params[PLACEMENT]
        slots = self.slots_of(params)
        if _FIRST in params and _LENGTH in params:
            return ",".join(slots[params[_FIRST] :][: params[_LENGTH]]) or "none"
        switches = {slot: params[_switch(slot)] for slot in slots if _switch(slot) in params}
        if switches:
            return ",".join(slot for slot, is_on in switches.items() if is_on) or "none"
        if self.has_placement and NETWORK in params and not _has_attention(params[NETWORK]):
            return "none"
        return self.fixed.get(PLACEMENT)

    def _is_asked(self, dimension: Dimension, params: Params) -> bool:
        if not dimension.when and not dimension.unless:
            return True
        overrides = self.overrides_of(params)

        def has(name: str, values: Iterable[Scalar]) -> bool:
            if name == PLACEMENT:
                values = [str(parse_placement(value, self.slots_of(params))) for value in values]  # type: ignore[arg-type]
            return name in overrides and overrides[name] in values

        is_wanted = all(has(name, values) for name, values in dimension.when.items())
        return is_wanted and not any(has(name, values) for name, values in dimension.unless.items())

    def _extend(self, params: Params, dimensions: list[tuple[str, Dimension]]) -> Iterator[Params]:
        if not dimensions:
            yield params
            return
        (name, dimension), *rest = dimensions
        if not self._is_asked(dimension, params):
            yield from self._extend(params, rest)
            return
        for value in _values(dimension):
            yield from self._extend({**params, name: value}, rest)


def search_space(settings: SearchSettings, network: str = SA_GSM) -> Space:
    """The space that the settings span.

    Args:
        settings: the section `search`.
        network: the experiment's `model.name`, whose slots are searched unless the settings name another network.

    Raises:
        ConfigError: if a setting is chosen twice, a condition asks for what is not chosen before it, or the placement cannot
            be searched on these networks.
    """
    searched = {name: dimension for name, dimension in settings.space.items() if name == NETWORK}
    networks = [str(value) for dimension in searched.values() for value in _values(dimension)]
    networks = networks or [str(settings.fixed.get(NETWORK, network))]
    _check_names(settings)
    return Space(searched | _placement_dimensions(settings.placement, networks) | settings.space, settings.fixed, network)


def suggest(trial: "optuna.Trial", space: Space) -> Params:
    """Ask Optuna for one point of the space: the define-by-run function of the search."""

    def ask(name: str, dimension: Dimension) -> Any:
        if isinstance(dimension, Choice):
            return trial.suggest_categorical(name, dimension.values)
        if dimension.is_whole:
            return trial.suggest_int(name, int(dimension.low), int(dimension.high), log=dimension.log)
        return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)

    return space.choose(ask)


def baseline_points(space: Space) -> list[Params]:
    """The points tried before the sampler may choose: attention nowhere, everywhere (the paper), in the last two slots.

    All else is in the middle of its range, and the network is the first that can attend. A space that does not choose the
    placement has none; one that cannot express one of them goes without it.
    """
    if not space.has_placement:
        return []
    networks = _values(space.dimensions[NETWORK]) if NETWORK in space.dimensions else []
    network: Params = dict([(NETWORK, name) for name in networks if _has_attention(name)][:1])
    slots = space.slots_of(network)
    points: list[Params] = []
    for wanted in baseline_placements(slots):
        prescribed = network | _spellings(wanted, space.dimensions.get(PLACEMENT))
        point = space.choose(lambda name, dimension, given=prescribed: given.get(name, dimension.middle))  # type: ignore[misc]
        if space.overrides_of(point)[PLACEMENT] == str(wanted):
            points.append(point)
    return points


def baseline_placements(slots: Sequence[str]) -> tuple[Placement, ...]:
    """Nowhere, everywhere (the paper), and in the last two of the network's slots."""
    return Placement((), slots), Placement(slots, slots), Placement(slots[-2:], slots)


def families(*slots_of_networks: Sequence[str]) -> tuple[str, ...]:
    """Named placements for a small budget, those that all networks have.

    Nowhere, everywhere, each stage, the last two stages, the last slot, the last two, the last of each stage, every other slot.

    Example:
        >>> families(SLOTS)
        ('none', 'all', 'stage3', 'stage4', 'stage5', 'stage4,stage5', '5b', '3c,4e,5b', '3b,4a,4c,4e,5b')
    """
    slots = slots_of_networks[0]
    stages = [name for name in _STAGES if _is_legal(name, slots)]
    last_of_each = ",".join(parse_placement(name, slots).slots[-1] for name in stages)
    names = ["none", "all", *stages, ",".join(stages[-2:])]
    names += [slots[-1], ",".join(slots[-2:]), last_of_each, ",".join(slots[1::2])]
    common = [name for name in names if all(_is_legal(name, others) for others in slots_of_networks)]
    different = {parse_placement(name, slots): name for name in reversed(common)}
    return tuple(sorted(different.values(), key=common.index))


def key_of(overrides: Mapping[str, Any]) -> str:
    """The same for equal settings, in whatever order."""
    return json.dumps(dict(overrides), sort_keys=True, default=str)


def _placement_dimensions(kind: str, networks: Sequence[str]) -> dict[str, Dimension]:
    if kind == "fixed":
        return {}
    attending: tuple[Scalar, ...] = tuple(name for name in networks if _has_attention(name))
    if not attending:
        raise ConfigError(
            f"search.placement is {kind}, but {networks[0]} has no attention to place; set search.placement=fixed"
        )
    when = {} if len(attending) == len(networks) else {NETWORK: attending}
    among = list(dict.fromkeys(model_slots(str(name)) for name in attending))
    if kind == "families":
        return {PLACEMENT: Choice(values=families(*among), when=when)}
    if len(among) > 1:
        raise ConfigError(
            f"search.placement is {kind}, but the networks of search.space.{NETWORK} have different slots "
            f"({', '.join(map(str, attending))}); set search.placement=families, whose stages they all have"
        )
    if kind == "booleans":
        return {_switch(slot): Choice(values=(False, True), when=when) for slot in among[0]}
    most = len(among[0])
    return {_FIRST: Range(low=0, high=most - 1, when=when), _LENGTH: Range(low=0, high=most, when=when)}


def _check_names(settings: SearchSettings) -> None:
    """Each name is chosen once, and after what it depends on."""
    chosen = {*settings.fixed} | {NETWORK} & settings.space.keys()
    if settings.placement != "fixed":
        for part, names in (("space", settings.space), ("fixed", settings.fixed)):
            if PLACEMENT in names:
                raise ConfigError(
                    f"search.{part}.{PLACEMENT} and search.placement={settings.placement} both choose the placement; "
                    f"leave search.{part}.{PLACEMENT} out, or set search.placement=fixed"
                )
        chosen.add(PLACEMENT)
    for name, dimension in settings.space.items():
        if name in settings.fixed:
            raise ConfigError(f"search.space.{name} and search.fixed.{name} both choose it; leave one of them out")
        for other in (*dimension.when, *dimension.unless):
            if other not in chosen:
                raise ConfigError(
                    f"search.space.{name} depends on {other}, which is not chosen before it; "
                    f"put {other} before it into search.space, or into search.fixed"
                )
        chosen.add(name)


def _spellings(wanted: Placement, choice: Dimension | None) -> Params:
    """The parameters that stand for a placement, for every kind of search."""
    slots = wanted.among
    params: Params = {_switch(slot): slot in wanted for slot in slots}
    params |= {_FIRST: len(slots) - len(wanted) if len(wanted) else 0, _LENGTH: len(wanted)}
    names = [name for name in _values(choice) if parse_placement(name, slots) == wanted] if choice else []
    return params | dict([(PLACEMENT, name) for name in names][:1])


def _values(dimension: Dimension) -> list[Any]:
    """All values of a finite dimension."""
    if isinstance(dimension, Choice):
        return list(dimension.values)
    return list(range(int(dimension.low), int(dimension.high) + 1)) if dimension.is_whole else [dimension.low]


def _draw(dimension: Dimension, rng: np.random.Generator) -> Any:
    if isinstance(dimension, Choice):
        return dimension.values[rng.integers(len(dimension.values))]
    if not dimension.log:
        if dimension.is_whole:
            return int(rng.integers(int(dimension.low), int(dimension.high), endpoint=True))
        return float(rng.uniform(dimension.low, dimension.high))
    value = float(np.exp(rng.uniform(np.log(dimension.low), np.log(dimension.high))))
    value = min(max(value, dimension.low), dimension.high)
    return round(value) if dimension.is_whole else value


def _rounded(value: Any, dimension: Dimension) -> Any:
    if isinstance(dimension, Choice) or dimension.is_whole:
        return value
    return min(max(float(f"{value:.3g}"), float(dimension.low)), float(dimension.high))


def _has_attention(network: str) -> bool:
    return "placement" in model_options(network)


def _is_legal(placement: str, slots: Sequence[str]) -> bool:
    try:
        parse_placement(placement, slots)
    except ValueError:
        return False
    return True


def _switch(slot: str) -> str:
    return f"{PLACEMENT}.{slot}"
