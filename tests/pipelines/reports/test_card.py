import numpy as np
import pytest

from pipelines.evaluation.metrics import summarise
from pipelines.reports.card import model_card
from pipelines.training.settings import ModelSettings, TrainSettings

NAMES = [f"class {number}" for number in range(20)]


def card_of(tmp_path, **facts):
    evaluation = summarise(np.eye(20, dtype=np.float32)[np.arange(40) % 20], np.arange(40) // 2, NAMES)
    made = {
        "model": ModelSettings(name="gsm_resnet18").model_dump(mode="json"),
        "train": TrainSettings(learning_rate=0.02).model_dump(mode="json"),
        "label_names": NAMES,
        "label_passport": "0123456789abcdef",
        "decoding": {"short_side": 256, "fps": None, "jpeg_quality": 3},
    }
    return model_card(
        name="sagsm-demo",
        alias="newest",
        facts=made | facts,
        training={"epochs": 9, "best_epoch": 6},
        evaluation={**evaluation, "split": "validation"},
        dataset={"dataset": "something_v1", "kept": 1234, "rejected": 5},
        num_trials=3,
        command="sagsm run demo --set train.epochs=9",
        folder=tmp_path / "artifact",
    )


@pytest.mark.parametrize(
    "words",
    [
        "# sagsm-demo\n\nTop-1 is ",
        "`gsm_resnet18` that tells 20 actions apart in short videos (no attention), trained for 9 epochs",
        "those of epoch 7",
        "1,234 videos, 5 more were rejected",
        "passport `0123456789abcdef`",
        "class 11 and 8 more.",
        "| clips | 40 of split validation |",
        "- `train.learning_rate`: 0.02",
        "JPEG of quality 3, short side 256 pixels, every frame",
        "`sagsm run demo --set train.epochs=9`",
        "the best of 3 trials and the best epoch were also chosen",
        "names one of its classes, also for a video that shows none of them",
        "    sagsm predict --model models:/sagsm-demo@newest clip.mp4",
        "mlflow models serve -m models:/sagsm-demo@newest --env-manager local",
    ],
)
def test_the_card_says(tmp_path, words):
    assert words in card_of(tmp_path)


def test_the_card_of_attention_and_of_frames_that_came_from_elsewhere(tmp_path):
    network = ModelSettings(name="sa_gsm_resnet18").model_dump(mode="json") | {"placement": "4b,5a"}
    card = card_of(tmp_path, model=network, decoding=None)
    assert "attention at: 4b,5a, scope frame" in card
    assert "Frames: decoded by another program." in card
    assert len(card) < 5000  # what MLflow keeps of a description
