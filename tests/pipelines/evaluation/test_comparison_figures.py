from pathlib import Path

import pytest
from PIL import Image

from pipelines.evaluation.comparison_figures import draw_top1, draw_variant_curves


def facts(top1: float, expected: list[float] | None = None, published: float | None = None) -> dict[str, object]:
    return {
        "top1": top1,
        "top1_interval": [max(0.0, top1 - 0.1), min(1.0, top1 + 0.1)],
        "seeds": {"0": {"top1": top1}, "1": {"top1": top1}},
        "expected_top1": expected,
        "published_top1": published,
    }


def epochs(num_epochs: int) -> list[dict[str, object]]:
    return [{"epoch": epoch, "train_loss": 1.0, "val_loss": None, "val_top1": 0.1 * epoch} for epoch in range(num_epochs)]


@pytest.mark.parametrize("num_variants", [2, 4, 12])
def test_any_number_of_variants_can_be_drawn_in_the_same_bytes(tmp_path: Path, num_variants: int) -> None:
    names = [f"variant{number}" for number in range(num_variants)]
    variants = {name: facts(0.5, [0.4, 1.0], 0.3) if number else facts(0.0) for number, name in enumerate(names)}
    curves = {name: [epochs(4), epochs(1), []] for name in names}
    for number in range(2):
        draw_top1(tmp_path / f"top1-{number}.png", variants, chance=0.125)
        draw_variant_curves(tmp_path / f"curves-{number}.png", curves)
    for name in ("top1", "curves"):
        first, second = (tmp_path / f"{name}-{number}.png" for number in range(2))
        assert first.read_bytes() == second.read_bytes()
        with Image.open(first) as picture:
            assert picture.width == 900


def test_other_numbers_give_another_picture(tmp_path: Path) -> None:
    pictures = [
        draw_top1(tmp_path / f"{top1}.png", {"a": facts(top1), "b": facts(0.5)}, chance=0.1).read_bytes() for top1 in (0.2, 0.8)
    ]
    assert pictures[0] != pictures[1]
