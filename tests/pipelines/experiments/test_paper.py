"""The rows are what the paper says they are; the experiments themselves need GPUs."""

from models import describe_model
from models.imagenet import BACKBONE_SOURCES
from pipelines.experiments import find_experiment

# Table 2 of the paper: network, frames, top-1 in percent.
TABLE_2 = {
    "tsn": ("tsn_bn_inception", 16, 17.52),
    "trn": ("trn_bn_inception", 8, 34.44),
    "tsm": ("tsm_resnet50", 16, 47.20),
    "gsm": ("gsm_bn_inception", 16, 49.56),
    "gsm_inception_v3": ("gsm_inception_v3", 16, 50.63),
    "sa_gsm": ("sa_gsm_bn_inception", 8, 14.2),
}


def test_table_2_has_the_papers_rows_with_their_frames_and_numbers():
    made = find_experiment("table2")()
    found = {
        name: (config.model.name, config.train.num_segments, round(100 * made.published[name].top1, 2))
        for name, config in made.variants.items()
    }
    assert found == TABLE_2
    for name, (_, frames, _) in TABLE_2.items():
        assert made.published[name].source.startswith(f"{frames} frames; ")


def test_every_row_begins_with_the_weights_of_its_own_backbone():
    for config in find_experiment("table2")().variants.values():
        weights = config.model.backbone_weights
        assert weights in BACKBONE_SOURCES
        assert config.model.name.endswith(weights)
        assert config.model.input_format == ("unit_rgb" if weights == "resnet50" else "caffe_bgr")  # as the weights were made
        assert config.train.pixels == (229 if weights == "inception_v3" else 224)


def test_sa_gsm_is_that_of_the_papers_text_and_the_others_have_gsms_recipe():
    made = find_experiment("table2")()
    ours = made.variants["sa_gsm"]
    assert (ours.preset, ours.model.scope, ours.model.value, ours.train.epochs) == ("paper", "joint", "bottleneck", 15)
    assert {(config.preset, config.train.epochs) for name, config in made.variants.items() if name != "sa_gsm"} == {("gsm", 60)}
    same = made.with_overrides({"preset": "gsm"})
    assert {config.train.epochs for config in same.variants.values()} == {60}


def test_where_a_network_has_one_number_it_is_that_of_the_table():
    """TSM has another: its own paper's, with 8 frames."""
    for name, (network, _, top1) in TABLE_2.items():
        known = describe_model(network, num_classes=2, num_segments=2, pixels=75).published_top1
        assert known is None or name == "tsm" or round(100 * known, 2) == top1


def test_test_time_judges_one_network_in_several_ways():
    made = find_experiment("test_time")()
    for changes in made.differences().values():
        assert {setting.partition(".")[0] for setting in changes} <= {"evaluate"}
    config = made.config
    assert (config.preset, config.train.subset, config.train.compat.freeze_gamma) == ("seed_code", 40_000, True)
    (expected,) = made.expected.values()
    assert [round((band.low + band.high) / 2, 4) for band in expected] == [0.32, 0.62, 0.2923]
