"""Attention switched on and off by slot at run time: one set of weights, every placement within the one of its making."""

from models.classifier import VideoClassifier
from models.placement import Placement, parse_placement
from models.temporal.attention import SelfAttention
from models.temporal.gate_shift import GateShift


def attend_only(model: VideoClassifier, placement: str | int | Placement) -> Placement:
    """Let attention work in the slots of `placement` and nowhere else, until the next call; no weight changes.

    A slot that is left out passes its map on as it is: what gammas of 0 give there, bit for bit, at no cost. Its attention gets
    no gradient. Modes, state dict and parameter roles stay as they are.

    Args:
        model: an SA-GSM network of `create_model`; changed in place.
        placement: slots that the network has attention in, in any spelling; "none" makes it GSM.

    Returns:
        The placement that attention now has.

    Raises:
        ValueError: if a slot of `placement` is none, or has no attention.

    Example:
        >>> from models.factory import build_model
        >>> str(attend_only(build_model("sa_gsm_bn_inception", num_classes=2, num_segments=2), "5b+4e"))
        '4e,5b'
    """
    attentions = slot_attentions(model)
    chosen = parse_placement(placement, tuple(model.base_model.SLOTS))  # type: ignore[arg-type]  # "Tensor | Module"
    lacking = [slot for slot in chosen if slot not in attentions]
    if lacking:
        made_with = ", ".join(attentions) or "no slot"
        raise ValueError(f"there is no attention in {', '.join(lacking)}; the network was made with it in {made_with}")
    for slot, attention in attentions.items():
        attention.bypassed = slot not in chosen
    return chosen


def attention_slots(model: VideoClassifier) -> tuple[str, ...]:
    """The slots that the network was made with attention in, switched on or off, in the order in which a frame passes them.

    Example:
        >>> from models.factory import build_model
        >>> attention_slots(build_model("sa_gsm_bn_inception", num_classes=2, num_segments=2, placement="5b,3c"))
        ('3c', '5b')
    """
    return tuple(slot_attentions(model))


def slot_gates(model: VideoClassifier) -> dict[str, GateShift]:
    """The gate of each slot, in the order in which a frame passes them; of a network without gates none."""
    gates = [module for module in model.modules() if isinstance(module, GateShift)]
    slots = tuple(model.base_model.SLOTS) if gates else ()  # type: ignore[arg-type]  # "Tensor | Module"
    return dict(zip(slots, gates, strict=True))


def slot_attentions(model: VideoClassifier) -> dict[str, SelfAttention]:
    """The attention of each slot that has one, switched on or off, in the order in which a frame passes them."""
    return {slot: gate.attn for slot, gate in slot_gates(model).items() if isinstance(gate.attn, SelfAttention)}
