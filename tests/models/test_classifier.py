import pytest
import torch
from torch import nn

from models import VideoClassifier, create_model, list_models, model_slots, parameter_roles
from models.temporal.relation import MultiScaleRelation


class MeanColour(nn.Module):
    """The smallest backbone: a frame's features are the means of its channels."""

    num_features = 3

    def forward(self, x):
        return x.mean(dim=(2, 3))


def small(**options):
    return VideoClassifier(MeanColour(), **{"num_classes": 5, "num_segments": 4, **options})


def test_logits_are_the_mean_over_segments():
    model = small().eval()
    clips = torch.randn(2, 4, 3, 8, 8)
    frames = torch.stack([model.new_fc(clip.mean(dim=(2, 3))).mean(dim=0) for clip in clips])
    torch.testing.assert_close(model(clips), frames)


def test_a_backbone_of_whole_clips_needs_no_consensus():
    class MeanVolume(nn.Module):
        num_features = 3
        takes_clips = True

        def forward(self, x_BCTHW):
            return x_BCTHW.mean(dim=(2, 3, 4))

    model = VideoClassifier(MeanVolume(), num_classes=5, num_segments=4).eval()
    clips = torch.randn(2, 4, 3, 8, 8)
    torch.testing.assert_close(model(clips), model.new_fc(clips.mean(dim=(1, 3, 4))))


@pytest.mark.parametrize("consensus", [None, MultiScaleRelation(4, 5, frame_features=6)])
def test_logits_keep_float32_under_autocast(consensus):
    """In bfloat16 logits near 200 would be whole numbers, and classes would tie."""
    model = small(consensus=consensus).eval()
    torch.nn.init.constant_(model.get_parameter(model.class_tensors[-1]), 200.3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.rand(1, 4, 3, 8, 8))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_a_relation_head_takes_the_place_of_the_mean():
    head = MultiScaleRelation(4, 5, frame_features=6)
    model = small(consensus=head).eval()
    clips = torch.randn(2, 4, 3, 8, 8)
    torch.testing.assert_close(model(clips), head(model.new_fc(clips.mean(dim=(3, 4)))))
    assert model.new_fc.out_features == 6
    assert small().class_tensors == ["new_fc.weight", "new_fc.bias"]
    layers = [f"consensus.fc_fusion_scales.{scale}.3" for scale in range(3)]
    assert model.class_tensors == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


@pytest.mark.parametrize("shape", [(2, 5, 3, 8, 8), (2, 4, 1, 8, 8), (8, 3, 8, 8)])
def test_clips_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError) as refused:
        small()(torch.randn(shape))
    assert str(refused.value) == f"the network got clips of shape {list(shape)}, but was made for [B, 4, 3, H, W]"


def test_prepare_unit_rgb_standardises_with_the_mean_and_deviation_of_imagenet():
    clips = torch.randint(0, 256, (2, 4, 3, 6, 8), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(small().prepare(clips), (clips / 255 - mean) / std)


def test_prepare_caffe_bgr_subtracts_the_published_means_in_the_published_order():
    clips = torch.randint(0, 256, (2, 4, 3, 6, 8), dtype=torch.uint8)
    red, green, blue = clips.float().unbind(2)
    expected = torch.stack((blue - 104, green - 117, red - 128), dim=2)
    assert torch.equal(small(input_format="caffe_bgr").prepare(clips), expected)


@pytest.mark.parametrize("input_format", ["unit_rgb", "caffe_bgr"])
@pytest.mark.parametrize("layout", ["BT3HW", "BTHW3"])
def test_prepared_frames_lie_channels_last_and_the_bytes_are_untouched(input_format, layout):
    clips = torch.randint(0, 256, (2, 4, 3, 6, 8), dtype=torch.uint8)
    if layout == "BTHW3":
        clips = clips.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    before = clips.clone()
    prepared = small(input_format=input_format).prepare(clips)
    assert prepared.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(clips, before)


def test_prepare_takes_bytes_only():
    with pytest.raises(ValueError, match=r"prepare got clips of torch\.float32, but needs the bytes of RGB frames"):
        small().prepare(torch.zeros(1, 4, 3, 8, 8))


def test_normalisation_is_not_part_of_the_weights():
    assert set(small().state_dict()) == {"new_fc.weight", "new_fc.bias"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_classes": 0}, "num_classes is 0 and num_segments is 4; both must be at least 1"),
        ({"num_segments": 0}, "num_classes is 5 and num_segments is 0; both must be at least 1"),
        ({"dropout": 1.0}, r"dropout is 1.0; it is a probability in \[0, 1\)"),
        ({"input_format": "rgb"}, "input format 'rgb' is not known; known are: unit_rgb, caffe_bgr"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("name", list_models())
def test_every_trainable_parameter_has_exactly_one_role(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=5, num_segments=2)
    roles = parameter_roles(model)
    sorted_names = sorted(parameter for parameters in roles.values() for parameter in parameters)
    assert sorted_names == sorted(parameter for parameter, _ in model.named_parameters())
    assert list(roles) == ["weight", "bias", "norm", "gate", "gamma"]
    assert len(roles["gamma"]) == (len(model_slots(name)) if name.startswith("sa_gsm") else 0)
    assert len(roles["gate"]) == (len(model_slots(name)) if "gsm" in name else 0)


def test_roles_of_sa_gsm():
    model = create_model("sa_gsm_bn_inception", num_classes=5, num_segments=2, placement="3a,5b")
    roles = parameter_roles(model)
    slot = "base_model.gsm_inception_3a_1x1"
    assert len(roles["gate"]) == 10
    assert f"{slot}.conv3D.weight" in roles["gate"]
    assert f"{slot}.conv3D.bias" in roles["bias"]
    assert roles["gamma"] == [f"{slot}.attn.gamma", "base_model.gsm_inception_5b_1x1.attn.gamma"]
    assert {f"{slot}.bn.weight", f"{slot}.bn.bias", "base_model.conv1_7x7_s2_bn.bias"} <= set(roles["norm"])
    assert {f"{slot}.attn.value_conv.weight", "new_fc.weight"} <= set(roles["weight"])
    assert {f"{slot}.attn.value_conv.bias", "new_fc.bias", "base_model.conv1_7x7_s2.bias"} <= set(roles["bias"])


def test_a_frozen_parameter_has_no_role():
    model = small()
    model.new_fc.bias.requires_grad_(False)
    assert parameter_roles(model) == {"weight": ["new_fc.weight"], "bias": [], "norm": [], "gate": [], "gamma": []}


@pytest.mark.parametrize("name", ["gsm_resnet18", "trn_bn_inception", "c3d"])
def test_what_the_classifier_is_given_decides_the_logits(name):
    """The mean over segments, the segments in order, and the features of a whole clip."""
    model = create_model(name, num_classes=5, num_segments=4).double().eval()
    torch.nn.init.normal_(model.new_fc.weight)
    clips = torch.randn(2, 4, 3, 112, 112, dtype=torch.float64)
    with torch.no_grad():
        vectors, logits = model.embed(clips), model(clips)
        if isinstance(model.consensus, MultiScaleRelation):
            found = model.consensus(vectors.view(2, 4, -1))
        else:
            assert vectors.shape == (2, model.base_model.num_features)
            found = model.new_fc(vectors)
    assert logits.std() > 0
    torch.testing.assert_close(found, logits)
