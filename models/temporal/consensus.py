"""Segment consensus: from what a network says of each segment to what it says of the clip.

Wang et al.: Temporal Segment Networks, ECCV 2016, https://arxiv.org/abs/1608.00859, equation 1: the function G, in its best
form (section 3.1 there) the mean over segments of the class scores before the softmax.

Legend: B clips, T segments, K classes.
"""

from torch import Tensor, nn


class MeanConsensus(nn.Module):
    """The mean over segments. What is averaged are logits, as in the code that TSN, TSM and GSM share.

    Args:
        num_classes: K, the width of a frame's logits.

    Shape:
        input: [B, T, K]. Output: [B, K].
    """

    class_layers = ()
    """Names of own layers whose rows are classes: none; those of the frame classifier are the classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.frame_features = num_classes

    def forward(self, logits_BTK: Tensor) -> Tensor:
        """Logits of clips."""
        return logits_BTK.mean(dim=1)
