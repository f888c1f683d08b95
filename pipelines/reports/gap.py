"""The page of the accuracy gap: how far one network's accuracy depends on how it is judged, and which step does it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.storage import write_json
from pipelines.evaluation.gap_figures import draw_waterfall
from pipelines.reports.page import data_uri, percent, write_page

FILE_NAME = "index.html"
_FEW_CLIPS = 1000


def gap_verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """The outcome in two sentences.

    Args:
        rows: as `measure_gap` gives them.
    """
    first, last = rows[0], rows[-1]
    largest = max(rows[1:], key=lambda row: abs(row["gain"]["top1"]))
    if not largest["gain"]["top1"]:
        return f"Top-1 of one network is {percent(first['top1'])} in every step: the way of judging changes nothing."
    apart = [row["name"] for row in rows[1:] if row["gain"]["separable"]]
    moved = "stays at" if first["top1"] == last["top1"] else f"goes from {percent(first['top1'])} to"
    return (
        f"Top-1 of one network {moved} {percent(last['top1'])} by the way of judging alone; the largest step is "
        f"{largest['name']} ({100 * largest['gain']['top1']:+.1f} points). Separable from the noise of clips: "
        f"{', '.join(apart) or 'no step'}."
    )


def write_gap(output_dir: Path, title: str, rows: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> Path:
    """Write the page `index.html`, `gap.json` and `waterfall.png` into an existing folder.

    Args:
        output_dir: the folder.
        title: of the page.
        rows: as `measure_gap` gives them.
        about: what was judged, by names.

    Returns:
        the page.
    """
    picture = draw_waterfall(output_dir / "waterfall.png", rows)
    write_json(output_dir / "gap.json", {"steps": list(rows), **about})
    values = {
        "title": title,
        "verdict": gap_verdict(rows),
        "doubts": list(_doubts(rows)),
        "rows": rows,
        "picture": data_uri(picture),
        "about": about,
    }
    return write_page(output_dir / FILE_NAME, "gap.html", values)


def _doubts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    num_clips = rows[0]["num_clips"]
    yield "One network, and one draw of the random views: another seed changes both ends somewhat."
    if num_clips < _FEW_CLIPS:
        yield f"Only {num_clips} clips: small steps are noise."
    yield "Steps are taken in one order; in another order each would show another share of the whole."
