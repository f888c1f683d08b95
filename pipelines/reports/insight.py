"""The page of the stage `insight`: sections, each with its sentence, pictures, clips and tables."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.insight.section import Section
from pipelines.reports.audit_figures import picture_uri
from pipelines.reports.page import data_uri, markdown_text, write_csv, write_page

FILE_NAME = "index.html"


def write_insight(output_dir: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write `index.html`, one file without scripts which loads nothing, and `tables/<name>.csv` of each table.

    Args:
        output_dir: an existing folder.
        title: of the page.
        sections: at least one; the sentence of the first opens the page.

    Returns:
        the page.
    """
    (output_dir / "tables").mkdir(exist_ok=True)
    for table in [table for section in sections for table in section.tables]:
        write_csv(output_dir / "tables" / f"{table.name}.csv", [column.name for column in table.columns], table.rows)
    values = {
        "title": title,
        "sections": sections,
        "numbers": [number for section in sections for number in section.numbers],
        "doubts": [doubt for section in sections for doubt in section.doubts],
        "data_uri": data_uri,
        "picture_uri": picture_uri,
    }
    return write_page(output_dir / FILE_NAME, "insight.html", values)


def describe_insight(sections: Sequence[Section], run_id: str) -> str:
    """The description of the MLflow run: the first sentence first, since only three lines show; then every picture.

    Args:
        sections: as `write_insight` takes them.
        run_id: of the run that holds the pictures in `figures`.
    """
    parts = [markdown_text(sections[0].sentence)]
    for section in sections:
        parts.append(f"**{section.title}**" + ("" if section is sections[0] else f": {markdown_text(section.sentence)}"))
        parts += [
            f"![{picture.path.stem}](get-artifact?path=figures/{picture.path.name}&run_uuid={run_id})"
            for picture in section.pictures
        ]
        parts += [f"![{film.gif.stem}](get-artifact?path=figures/{film.gif.name}&run_uuid={run_id})" for film in section.films]
    parts.append("The page: Artifacts, report/index.html; all clips: tables/.")
    return "\n\n".join(parts)
