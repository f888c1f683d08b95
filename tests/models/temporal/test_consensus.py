import torch

from models.temporal.consensus import MeanConsensus


def test_the_consensus_is_the_mean_over_segments():
    logits = torch.randn(2, 3, 5)
    consensus = MeanConsensus(5)
    torch.testing.assert_close(consensus(logits), (logits[:, 0] + logits[:, 1] + logits[:, 2]) / 3)
    assert consensus.frame_features == 5
    assert list(consensus.parameters()) == []
