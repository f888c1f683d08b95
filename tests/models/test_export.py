import pytest
import torch
from torch import nn

from models import create_model
from models.export import export_onnx, export_program
from models.inference import fold_batch_norms

PIXELS = 64
NETWORKS = [
    ("tsn_bn_inception", {}),
    ("sa_gsm_bn_inception", {"scope": "joint", "placement": "3a", "num_heads": 2, "num_segments": 5}),  # one group of 320
    ("sa_gsm_bn_inception", {"scope": "divided", "value": "bottleneck", "placement": "3a,5b"}),
]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what torch's and onnxscript's own code says
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def used(name, **options):
    """A network whose gates and gammas are not zero."""
    model = create_model(name, **{"num_classes": 5, "num_segments": 3, **options})
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("conv3D.weight"):
            nn.init.normal_(parameter, std=0.05)
        elif parameter_name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
        elif "query_conv" in parameter_name or "key_conv" in parameter_name:
            nn.init.normal_(parameter, std=0.003)  # far from saturation, so that rounding stays rounding
    nn.init.normal_(model.new_fc.weight)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics are those of the next pass, so that maps keep their size
    with torch.no_grad():
        model(torch.randn(2, model.num_segments, 3, PIXELS, PIXELS))
    return model


def relative_error(logits, model, clips):
    with torch.inference_mode():
        expected = model.eval()(clips)
    return ((torch.as_tensor(logits) - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("name, options", NETWORKS)
def test_a_program_gives_the_logits_for_any_number_of_clips(name, options, tmp_path):
    model = used(name, **options)
    export_program(model, tmp_path / "model.pt2", pixels=PIXELS)
    assert model.training
    program = torch.export.load(tmp_path / "model.pt2").module()
    for num_clips in (1, 3):
        clips = torch.randn(num_clips, model.num_segments, 3, PIXELS, PIXELS)
        assert relative_error(program(clips), model, clips) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name, options", NETWORKS)
def test_onnx_gives_the_logits_for_any_number_of_clips(name, options, fold, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = used(name, **options)
    export_onnx(fold_batch_norms(model) if fold else model, tmp_path / "model.onnx", pixels=PIXELS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for num_clips in (1, 3):
        clips = torch.randn(num_clips, model.num_segments, 3, PIXELS, PIXELS)
        (logits,) = session.run(["logits"], {"clips": clips.numpy()})
        error = relative_error(logits, model, clips)
        print(f"{name}, {num_clips} clips: relative error of the logits {error:.1e}")
        assert error < 1e-4


@pytest.mark.parametrize("export", [export_program, export_onnx])
def test_wrong_arguments_are_refused(export, tmp_path):
    with pytest.raises(ValueError, match="frames of 64 x 16 pixels are too small; give at least 32 x 32"):
        export(create_model("tsn_bn_inception", num_classes=5, num_segments=3), tmp_path / "model", pixels=(64, 16))
    with pytest.raises(ValueError, match="Linear does not say num_segments, so it is no network of create_model"):
        export(nn.Linear(2, 2), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
