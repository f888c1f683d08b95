import torch
from torch import nn

from models import create_model
from pipelines.training.precision import autocast, for_inference, make_scaler, resolve_precision

CPU = torch.device("cpu")


def test_auto_precision_follows_the_hardware():
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("fp16", CPU) == "fp16"
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert resolve_precision("auto", CPU) == ("bf16" if has_bf16 else "fp32")


def test_matrices_are_multiplied_in_that_type_and_only_fp16_scales():
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        with autocast(precision, CPU):
            found[precision] = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype, make_scaler(precision, CPU).is_enabled()
    assert found == {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "fp16": (torch.float16, True)}


def test_what_is_asked_is_folded_and_has_kernels_of_the_type_that_multiplies():
    model = create_model("gsm_resnet18", num_classes=3, num_segments=2)
    kernels = {}
    for precision in ("fp32", "bf16", "fp16"):
        asked = for_inference(model, precision)
        kernels[precision] = {module.weight.dtype for module in asked.modules() if isinstance(module, nn.Conv2d)}
        num_norms = [sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) for network in (asked, model)]
        assert num_norms[0] < num_norms[1]
    assert kernels == {"fp32": {torch.float32}, "bf16": {torch.bfloat16}, "fp16": {torch.float32}}
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
