"""What the stage `insight` does: explain a trained network with pictures, each section the answer to one question.

<output>/index.html      the page
<output>/figures/        its pictures, and contact sheets
<output>/tables/         its tables, as CSV
"""

from collections.abc import Sequence
from typing import Any

from pipelines.artifacts import Artifact, shards_place
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.evaluation.scores import read_scores
from pipelines.graph import StageContext
from pipelines.insight.examples import examples_sections
from pipelines.insight.feature_map import map_section
from pipelines.insight.features import embed_on_cluster
from pipelines.insight.inside import look_inside_on_cluster
from pipelines.insight.inside_sections import inside_sections
from pipelines.insight.section import Section
from pipelines.insight.settings import InsightSettings
from pipelines.insight.subject import Subject
from pipelines.reports.insight import describe_insight, write_insight


def explain(
    context: StageContext, shards: Artifact, train: Artifact, evaluate: Artifact, settings: InsightSettings
) -> dict[str, Any]:
    """Look at a trained network from several sides, and show what is seen as a page and in MLflow.

    Returns:
        the stage's summary: `sentences` by the titles of sections, `metrics`, and `text`, the first sentence.
    """
    subject = Subject(
        model_dir=train.path / "model",
        shards_place=shards_place(shards),
        judged=EvaluateSettings.model_validate(evaluate.manifest["config"]["evaluate"]),
        scores=read_scores(evaluate.path / "scores.parquet"),
        settings=settings,
        output_dir=context.output_dir,
    )
    sections = look(context, subject)
    write_insight(context.output_dir, f"sagsm: {context.experiment}: insight", sections)
    _record(context, sections)
    metrics = {name: value for section in sections for name, value in section.metrics.items()}
    sentences = {section.title: section.sentence for section in sections}
    return {"sentences": sentences, "metrics": metrics, "text": sections[0].sentence}


def look(context: StageContext, subject: Subject) -> list[Section]:
    """The sections of the page, in its order."""
    context.on_progress(0, len(subject.rows), "clips looked at")
    features = embed_on_cluster(subject)
    inside = look_inside_on_cluster(subject)
    context.on_progress(len(subject.rows), len(subject.rows), "clips looked at")
    return [map_section(subject, features), *examples_sections(subject), *inside_sections(subject, inside)]


def _record(context: StageContext, sections: Sequence[Section]) -> None:
    """Page, pictures, tables and numbers into the stage's MLflow run."""
    run, folder = context.run, context.output_dir
    run.log_file(folder / "index.html", "report")
    for section in sections:
        run.log_metrics(section.metrics)
        for picture in section.pictures:
            run.log_file(picture.path, "figures")
            run.log_image(picture.path, picture.key)
        for film in section.films:
            run.log_file(film.gif, "figures")
            run.log_file(film.mp4, "figures")
        for table in section.tables:
            run.log_file(folder / "tables" / f"{table.name}.csv", "tables")
    run.describe(describe_insight(sections, run.run_id))
