"""Networks for video classification: TSN, GSM and SA-GSM on BN-Inception. Imports nothing else of ours."""

from models.classifier import VideoClassifier, parameter_roles
from models.factory import create_model, list_models, model_options
from models.placement import SLOTS, Placement, parse_placement
from models.weights import load_published_weights

__all__ = [
    "SLOTS",
    "Placement",
    "VideoClassifier",
    "create_model",
    "list_models",
    "load_published_weights",
    "model_options",
    "parameter_roles",
    "parse_placement",
]
