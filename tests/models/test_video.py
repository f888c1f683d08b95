import pytest
import torch
import torchvision
from torch import nn

from models.video import S3D, VideoResNet


@pytest.mark.parametrize("name", ["r2plus1d_18", "mc3_18", "r3d_18"])
def test_video_resnets_have_torchvisions_names_and_function(name):
    published = getattr(torchvision.models.video, name)(weights=None).eval()
    published.fc = nn.Identity()
    backbone = VideoResNet(name).eval()
    backbone.load_state_dict(published.state_dict())
    clips = torch.randn(1, 3, 5, 40, 32)
    with torch.inference_mode():
        assert torch.equal(backbone(clips), published(clips))
        assert backbone(clips).shape == (1, 512)


@pytest.mark.slow
def test_s3d_has_torchvisions_names_and_at_the_published_size_its_function():
    published = torchvision.models.video.s3d(weights=None, num_classes=7).eval()
    backbone = S3D().eval()
    fitting = {name: tensor for name, tensor in published.state_dict().items() if name.startswith("features.")}
    backbone.load_state_dict(fitting)
    clips = torch.randn(1, 3, 16, 224, 224)
    with torch.inference_mode():
        features = backbone(clips)
        head = published.classifier[1]
        logits = nn.functional.linear(features, head.weight.flatten(1), head.bias)
        torch.testing.assert_close(logits, published(clips), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 1, 32, 32), (1, 3, 9, 33, 50)])
def test_s3d_takes_short_clips_and_small_frames(shape):
    with torch.inference_mode():
        features = S3D().eval()(torch.randn(shape))
    assert features.shape == (1, 1024)
    assert features.isfinite().all()


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="there is no video ResNet named 'r3d'; known are: r2plus1d_18, mc3_18, r3d_18"):
        VideoResNet("r3d")
