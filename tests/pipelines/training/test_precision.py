import torch

from pipelines.training.precision import autocast, make_scaler, resolve_precision

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
