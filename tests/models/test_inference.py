import copy

import pytest
import torch
from torch import nn

from models import create_model, list_models
from models.inference import fold_batch_norms


def used(name, **options):
    """A network whose batch norms, gates and gammas have seen something, so that every part of it counts."""
    model = create_model(name, num_classes=5, num_segments=4, **options)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("conv3D.weight"):
            nn.init.normal_(parameter, std=0.05)
        elif parameter_name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
        elif "query_conv" in parameter_name or "key_conv" in parameter_name:
            nn.init.normal_(parameter, std=0.003)  # far from saturation, so that rounding stays rounding
        elif parameter_name.endswith(("bn.weight", "bn.bias")):
            nn.init.uniform_(parameter, 0.5, 1.5)
    nn.init.normal_(model.new_fc.weight)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics are those of the next pass, so that maps keep their size
    with torch.no_grad():
        model(torch.randn(2, 4, 3, 64, 64))
    return model


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def relative_error(folded, model):
    clips = torch.randn(2, 4, 3, 64, 64, dtype=next(model.parameters()).dtype)
    with torch.inference_mode():
        logits, expected = folded(clips), model.eval()(clips)
    return ((logits - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name, remaining", [("tsn_bn_inception", 0), ("gsm_bn_inception", 20), ("sa_gsm_bn_inception", 20)])
def test_logits_stay_and_norms_go(name, remaining):
    """With gates, the ten norms inside them and the ten behind them stay."""
    model = used(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = fold_batch_norms(model)
    assert model.training
    assert not folded.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert len(norms(folded)) == remaining
    in_double = model.double()
    errors = {
        "float32": relative_error(folded, copy.deepcopy(model).float()),
        "float64": relative_error(fold_batch_norms(in_double), in_double),
    }
    print(name, errors)
    assert errors["float32"] < 1e-5
    assert errors["float64"] < 1e-12


@pytest.mark.parametrize("name", list_models())
def test_every_network_says_the_same_folded(name):
    model = create_model(name, num_classes=3, num_segments=4).double().eval()
    nn.init.normal_(model.new_fc.weight)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif buffer_name.endswith("running_var"):
            buffer.uniform_(0.8, 1.2)
    clips = torch.randn(1, 4, 3, 112, 112, dtype=torch.float64)
    with torch.inference_mode():
        logits, expected = fold_batch_norms(model)(clips), model(clips)
    assert expected.std() > 0
    assert ((logits - expected).norm() / expected.norm()).item() < 1e-10


def test_a_filled_slot_keeps_the_norms_of_its_gate_and_the_one_behind_it():
    kept = set(norms(fold_batch_norms(used("gsm_bn_inception"))))
    assert {"base_model.gsm_inception_3a_1x1.bn", "base_model.inception_3a_1x1_bn"} <= kept
    assert "base_model.inception_3a_3x3_bn" not in kept


def test_kernels_lie_channels_last():
    folded = fold_batch_norms(create_model("sa_gsm_bn_inception", num_classes=5, num_segments=2))
    kernels = [module.weight for module in folded.modules() if isinstance(module, nn.Conv2d)]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_another_module_is_refused():
    with pytest.raises(ValueError, match="Linear does not say num_segments, so it is no network of create_model"):
        fold_batch_norms(nn.Linear(2, 2))


def test_bfloat16_kernels_give_what_autocast_gives():
    model = used("sa_gsm_bn_inception")
    clips = torch.randn(2, 4, 3, 64, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = fold_batch_norms(model, kernel_dtype=torch.bfloat16)(clips)
        expected = fold_batch_norms(model)(clips)
    assert ((logits - expected).norm() / expected.norm()).item() < 0.02


def test_another_type_of_kernels_is_refused():
    with pytest.raises(ValueError, match=r"kernel_dtype is torch.int8, but must be torch.float32, torch.bfloat16 or None"):
        fold_batch_norms(nn.Linear(2, 2), kernel_dtype=torch.int8)
