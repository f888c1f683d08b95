"""The multi-scale Temporal Relation Network.

Zhou, Andonian, Oliva, Torralba: Temporal Relational Reasoning in Videos, ECCV 2018, https://arxiv.org/abs/1711.08496, equations
1 to 3. Layer names and sizes as in the authors' code (https://github.com/zhoubolei/TRN-pytorch, TRNmodule.py,
`RelationModuleMultiScale`), so published weights load by name.

Legend: B clips, T segments, F features of a frame, K classes. A name such as x_BTF gives the axes.

Against the authors' code: it draws the relations of a scale anew at evaluation too, so that its scores differ from run to run.
Here they are drawn at random in training only; `MultiScaleRelation` says which are taken at evaluation. Its random numbers are
NumPy's, ours are torch's (the CPU generator, as dropout on a CPU).
"""

import itertools
import math

import torch
from torch import Tensor, nn

RELATIONS_PER_SCALE = 3
"""At most so many relations of a scale are added up (`subsample_num` in the authors' code)."""

_BOTTLENECK = 256


class MultiScaleRelation(nn.Module):
    """Logits of a clip from ordered tuples of its frames.

        T_k(V)  = h_k( sum over relations i < j < ... (k frames) of g_k(f_i, f_j, ...) )    equations 1 and 2
        MT_n(V) = T_n(V) + T_(n-1)(V) + ... + T_2(V)                                        equation 3

    As in the authors' code each h_k g_k is one ReLU, linear layer to 256, ReLU and linear layer to K, applied to the frames'
    features side by side, and the sum is over its answers. A scale with more than three relations is sampled:

    - in training three are drawn at random without replacement, for all clips of a batch alike, from torch's CPU generator;
    - at evaluation it is always the same three: the k earliest frames, k frames spread evenly over the clip, the k latest.

    Up to three segments every relation is taken, so both modes compute the same (apart from dropout before this module).

    Args:
        num_segments: T, at least 2: a relation needs two frames.
        num_classes: K, at least 1.
        frame_features: F; 256 as published.

    Shape:
        input: [B, T, F]. Output: logits [B, K].

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(self, num_segments: int, num_classes: int, *, frame_features: int = 256) -> None:
        super().__init__()
        if num_segments < 2:
            raise ValueError(f"MultiScaleRelation got {num_segments} segments, but a relation needs at least 2 frames")
        if num_classes < 1 or frame_features < 1:
            raise ValueError(
                f"MultiScaleRelation got {num_classes} classes and {frame_features} features a frame; both must be at least 1"
            )
        self.num_segments = num_segments
        self.frame_features = frame_features
        self.scales = tuple(range(num_segments, 1, -1))
        self.fc_fusion_scales = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), nn.Linear(scale * frame_features, _BOTTLENECK), nn.ReLU(), nn.Linear(_BOTTLENECK, num_classes)
            )
            for scale in self.scales
        )

    @property
    def class_layers(self) -> tuple[str, ...]:
        """Names of the layers whose rows are classes."""
        return tuple(f"fc_fusion_scales.{index}.3" for index in range(len(self.scales)))

    def relations(self, scale: int) -> list[tuple[int, ...]]:
        """The relations of a scale that the next forward pass adds up: tuples of `scale` frame indices in rising order.

        Random in training where there are more than three, fixed at evaluation; see the class.
        """
        frames = range(self.num_segments)
        if math.comb(self.num_segments, scale) <= RELATIONS_PER_SCALE:
            return list(itertools.combinations(frames, scale))
        if not self.training:
            spread = tuple(position * (self.num_segments - 1) // (scale - 1) for position in range(scale))
            return [tuple(frames[:scale]), spread, tuple(frames[-scale:])]
        drawn: set[tuple[int, ...]] = set()
        while len(drawn) < RELATIONS_PER_SCALE:
            drawn.add(tuple(sorted(torch.randperm(self.num_segments)[:scale].tolist())))
        return sorted(drawn)

    def forward(self, features_BTF: Tensor) -> Tensor:
        """Equation 3; see the class."""
        logits_BK = features_BTF.new_zeros(())
        for scale, relate in zip(self.scales, self.fc_fusion_scales, strict=True):
            for relation in self.relations(scale):
                logits_BK = logits_BK + relate(features_BTF[:, list(relation)].flatten(1))
        return logits_BK
