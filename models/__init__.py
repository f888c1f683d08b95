"""Networks for video classification: TSN, TSM, TRN, GSM and SA-GSM on five backbones, and 3-D baselines.

Imports nothing else of ours.
"""

from models.classifier import VideoClassifier, parameter_roles
from models.factory import create_model, list_models, model_options, model_slots
from models.facts import ModelFacts, describe_model, slot_macs
from models.imagenet import BACKBONE_SOURCES, LoadedNames, load_backbone_weights
from models.insight import AttentionMap, attention_maps, classify_map, gate_activity, last_map
from models.placement import SLOTS, Placement, parse_placement
from models.switch import attend_only, attention_slots
from models.walk import each_placement
from models.weights import load_published_weights

__all__ = [
    "BACKBONE_SOURCES",
    "SLOTS",
    "AttentionMap",
    "LoadedNames",
    "ModelFacts",
    "Placement",
    "VideoClassifier",
    "attend_only",
    "attention_maps",
    "attention_slots",
    "classify_map",
    "create_model",
    "describe_model",
    "each_placement",
    "gate_activity",
    "last_map",
    "list_models",
    "load_backbone_weights",
    "load_published_weights",
    "model_options",
    "model_slots",
    "parameter_roles",
    "parse_placement",
    "slot_macs",
]
