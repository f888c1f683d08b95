"""ImageNet weights for a backbone, from a local file or over HTTPS, checked by the first digits of their SHA-256.

The published code fetches them over connections whose certificates nobody verified, and loads them with `strict=False`, so that
a wrong file leaves a network silently random (PAPER_NOTES.md, D36). Here a server must prove who it is, the bytes must have the
expected hash, nothing in the file is run, and every name must have its place.
"""

import hashlib
import logging
import ssl
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor, nn

from models.classifier import VideoClassifier
from models.temporal.gate_shift import GateShift
from models.weights import named_tensors, read_weights

_log = logging.getLogger(__name__)

_YJXIONG = "https://yjxiong.blob.core.windows.net/models"
_PYTORCH = "https://download.pytorch.org/models"

BACKBONE_SOURCES = {
    "bn_inception": (f"{_YJXIONG}/bn_inception-9f5701afb96c8044.pth", "9f5701afb96c8044"),
    "inception_v3": (f"{_YJXIONG}/inceptionv3-cuhk-0e09b300b493bc74c.pth", "0e09b300b493bc74c"),
    "resnet18": (f"{_PYTORCH}/resnet18-f37072fd.pth", "f37072fd"),
    "resnet50": (f"{_PYTORCH}/resnet50-0676ba61.pth", "0676ba61"),
    "resnet50_v2": (f"{_PYTORCH}/resnet50-11ad3fa6.pth", "11ad3fa6"),
    "resnet101": (f"{_PYTORCH}/resnet101-63fe2227.pth", "63fe2227"),
    "resnet101_v2": (f"{_PYTORCH}/resnet101-cd907fc2.pth", "cd907fc2"),
}
"""Backbone -> where its published ImageNet weights lie, and the prefix of their SHA-256.

`bn_inception` and `inception_v3` are those of GSM's code (frames in "caffe_bgr"); the others are torchvision's IMAGENET1K_V1
and V2 (frames in "unit_rgb"). torchvision's `inception_v3_google-0cc3c7bd.pth` is absent: it is another network (see
`models.backbones.inception_v3`)."""

_HEADS = ("fc.", "top_cls_fc.", "last_linear.", "classif.")
"""What the classifier of 1,000 classes is called; a backbone has none."""


class LoadedNames(NamedTuple):
    """Names without counterpart: of the network (gates and attention keep their values), and of the file (its head)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_backbone_weights(model: VideoClassifier, path_or_url: str | Path, *, sha256_prefix: str | None = None) -> LoadedNames:
    """Fill the backbone of a network with ImageNet weights; gates, attention and the classifier keep their values.

    A download is kept in torch.hub's folder (`$TORCH_HOME/hub/checkpoints`), and its hash is checked at each use.

    Args:
        model: a network of `create_model`; its backbone is changed in place, and not at all if an error is raised.
        path_or_url: a local file, an https URL, or a name of `BACKBONE_SOURCES`.
        sha256_prefix: the first digits of the file's SHA-256, at least 8. None takes that of the entry in `BACKBONE_SOURCES`
            that has this name, URL or file name.

    Returns:
        The names that were missing and unexpected and may be; they are logged, too.

    Raises:
        ValueError: if no prefix is known or it is none; if the URL is not https or leads elsewhere; if the hash differs; or if
            the file holds no weights, or not those of this backbone (all names in one message).
        OSError: if the file cannot be read, or the server cannot be reached or does not prove who it is.
    """
    text = str(path_or_url)
    url, known_prefix = _known_source(text)
    prefix = (sha256_prefix or known_prefix or "").lower()
    if len(prefix) < 8 or not set(prefix) <= set("0123456789abcdef"):
        raise ValueError(
            f"{text} needs the first digits of its SHA-256, at least 8 of them, but sha256_prefix is {sha256_prefix!r}; "
            f"known without it are: {', '.join(BACKBONE_SOURCES)}"
        )
    path = _download(url, prefix) if "://" in url else Path(url)
    _check_hash(path, prefix)
    given = named_tensors(read_weights(path), text)
    names = _fill(model.base_model, given, text)
    _log.info(
        "backbone from %s: kept %d of its own, left %s unused", text, len(names.missing), ", ".join(names.unexpected) or "none"
    )
    return names


def _known_source(text: str) -> tuple[str, str | None]:
    """The path or URL that is meant, and the known prefix of its hash."""
    for name, (url, prefix) in BACKBONE_SOURCES.items():
        if text == name:
            return url, prefix
        if text == url or Path(text).name == Path(url).name:
            return text, prefix
    return text, None


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to https only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]  # as in the base class
        _require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_https(url: str) -> None:
    if not url.lower().startswith("https://"):
        raise ValueError(
            f"weights are fetched over https only, not from {url}; fetch the file by other means and name its path"
        )


def _download(url: str, prefix: str) -> Path:
    """The file of an https URL, from torch.hub's folder or the network; only a file with the right hash gets there."""
    _require_https(url)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / f"{prefix}-{Path(urllib.request.url2pathname(url.partition('?')[0])).name}"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # A context of its own: a process may have switched verification off for urllib's default one.
    https = urllib.request.HTTPSHandler(context=ssl.create_default_context())
    opener = urllib.request.build_opener(https, _HttpsOnly())
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
        try:
            with opener.open(url, timeout=60) as answer:
                _copy(answer, part)
            part.close()
            _check_hash(Path(part.name), prefix, url)
            Path(part.name).replace(path)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise
    return path


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    while block := source.read(1 << 20):
        target.write(block)


def _check_hash(path: Path, prefix: str, source: str | None = None) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(prefix):
        raise ValueError(
            f"{source or path} has the SHA-256 {found}, which does not begin with {prefix}; it is another file or damaged"
        )


def _fill(backbone: nn.Module, given: dict[str, Tensor], source: str) -> LoadedNames:
    """Load all that is the backbone's own; the published BN-Inception has batch norms of shape [1, C], read as [C]."""
    expected = backbone.state_dict()
    slots = tuple(f"{name}." for name, module in backbone.named_modules() if isinstance(module, GateShift))
    missing = [name for name in expected if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in expected]
    fitting = {
        name: tensor.squeeze(0) if tensor.shape == (1, *expected[name].shape) else tensor
        for name, tensor in given.items()
        if name in expected
    }
    problems = [f"  missing: {name} {list(expected[name].shape)}" for name in missing if not name.startswith(slots)]
    problems += [f"  unexpected: {name} {list(given[name].shape)}" for name in unexpected if not name.startswith(_HEADS)]
    problems += [
        f"  shape: {name} is {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in fitting.items()
        if tensor.shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit the backbone {type(backbone).__name__}:\n" + "\n".join(problems))
    backbone.load_state_dict(fitting, strict=False)  # strict by the check above
    return LoadedNames(tuple(missing), tuple(unexpected))
