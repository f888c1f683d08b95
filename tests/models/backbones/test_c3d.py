import pytest
import torch

from models.backbones.c3d import C3D


@pytest.mark.slow
def test_at_the_published_size_the_parts_added_here_do_nothing():
    """Figure 3 of the paper written out: after five poolings 16 x 112 x 112 is 1 x 4 x 4."""
    backbone = C3D().eval()
    x = clips = torch.randn(1, 3, 16, 112, 112)
    pool = torch.nn.functional.max_pool3d
    with torch.inference_mode():
        x = pool(backbone.conv1(x).relu(), (1, 2, 2))
        x = pool(backbone.conv2(x).relu(), 2)
        x = pool(backbone.conv3b(backbone.conv3a(x).relu()).relu(), 2)
        x = pool(backbone.conv4b(backbone.conv4a(x).relu()).relu(), 2)
        x = pool(backbone.conv5b(backbone.conv5a(x).relu()).relu(), 2, padding=(0, 1, 1))
        assert x.shape == (1, 512, 1, 4, 4)
        expected = backbone.fc7(backbone.fc6(x.flatten(1)).relu()).relu()
        torch.testing.assert_close(backbone(clips), expected)


def test_the_published_number_of_parameters():
    """78.41 million with the 101 classes of UCF-101, whose layer (4,096 x 101 + 101) is not here."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in C3D().parameters())
    assert count + 4097 * 101 == 78_409_573


@pytest.mark.parametrize("shape", [(1, 3, 1, 32, 32), (1, 3, 5, 33, 47), (1, 3, 20, 40, 64)])
def test_any_length_and_any_size_from_32_pixels_on(shape):
    with torch.inference_mode():
        features = C3D().eval()(torch.randn(shape))
    assert features.shape == (1, 4096)
    assert features.isfinite().all()


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"dropout is -1; it is a probability in \[0, 1\)"):
        C3D(dropout=-1)
