"""MLflow as a place where people look: `sagsm ui` on a finished demo, in a real browser, page by page.

The pictures that it keeps are those of infra/TRACKING.md; `make pictures` makes them anew.
"""

import re
import shutil
import sqlite3
from io import BytesIO

import pytest

from infra.links import run_url
from infra.tracking import recorded_runs, tracking_uri

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]  # playwright's own pipes

PATIENCE = 120_000  # milliseconds, on a busy machine
# What MLflow's pages themselves complain of, by the text or the address: nothing else is allowed.
NOISE = (
    "/ajax-api/2.0/mlflow/users/current",  # they ask who is logged in, and a server without accounts has no such page
    "ResizeObserver loop completed with undelivered notifications",  # a chart was drawn a frame late
)
CARD = "[data-testid='experiment-view-compare-runs-card']"
SECTION = "[data-testid='experiment-view-compare-runs-section-header']"
NOTE = "[data-testid='note-editor-preview-content']"
LOADED = "async picture => { await picture.decode(); return picture.naturalWidth; }"


class Reviewer:
    """A person who has closed MLflow's assistant once, and looks at one page after another."""

    def __init__(self, page, links, screenshots):
        self.page, self.runs, self.screenshots = page, links[0], screenshots
        self.base = self.runs.partition("/#")[0]
        self.complaints, self.strangers = [], []
        page.set_default_timeout(PATIENCE)
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.context.on("request", self._watch)
        self.open(self.runs)
        page.locator("[data-component-id='mlflow.assistant.chat_panel.close']").click()

    def _hear(self, message):
        told = f"{message.text} ({message.location.get('url', '')})"
        if message.type == "error" and not any(noise in told for noise in NOISE):
            self.complaints.append(told)

    def _watch(self, request):
        if not request.url.startswith((self.base, "blob:", "data:", "about:")):
            self.strangers.append(request.url)

    def open(self, address):
        """In a fresh page: a change behind the # alone does not switch to it."""
        self.page.goto("about:blank")
        self.page.goto(address)
        return self.page

    def open_run(self, run_id, tab=""):
        return self.open(run_url(self.base, "1", run_id).replace(run_id, f"{run_id}{tab}"))

    def keep(self, name):
        """A small picture of what is seen."""
        from PIL import Image

        with Image.open(BytesIO(self.page.screenshot())) as picture:
            picture.convert("RGB").save(self.screenshots / f"{name}.webp", quality=70, method=6)


@pytest.fixture(scope="module")
def links(browser, demo, serve):
    with serve(demo.workdir) as links:
        yield links


@pytest.fixture(scope="module")
def opened(browser, links, screenshots):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    yield Reviewer(context.new_page(), links, screenshots)
    context.close()


@pytest.fixture
def reviewer(opened):
    opened.complaints.clear()
    yield opened
    assert opened.complaints == []
    assert opened.strangers == []


def names(page):
    """Of the runs that the table shows, from top to bottom."""
    return re.findall(r"^(?:[pt]\d+ .+|\w+ p\d+)$", page.locator(".ag-pinned-left-cols-container").inner_text(), re.MULTILINE)


def test_the_link_of_sagsm_ui_opens_the_pipelines_with_their_stages(reviewer, demo):
    page = reviewer.open(reviewer.runs)
    page.get_by_role("link", name="p01 demo").wait_for()
    page.get_by_role("link", name="sagsm-something_v1").first.wait_for()
    page.get_by_role("heading", name="Runs").wait_for()  # of the mode "Model training"; GenAI has "Overview"
    page.get_by_text("each says what came out").wait_for()
    stages = [f"{stage['name']} p01" for stage in demo.document["stages"]]
    page.get_by_text(f"{1 + len(stages)} matching runs").wait_for()
    page.locator(".ag-row button").first.click()
    page.get_by_role("link", name="index p01").wait_for()
    shown = names(page)
    assert shown[0] == "p01 demo"
    assert sorted(shown[1:]) == sorted(stages)
    reviewer.keep("runs")


def test_the_pipeline_says_what_came_out_with_a_picture(reviewer, demo):
    [pipeline] = recorded_runs(tracking_uri(demo.workdir), "pipeline")
    page = reviewer.open_run(pipeline.run_id)
    note = page.locator(NOTE)
    note.get_by_text(re.compile(r"Top-1 is [\d.]+ % on \d+ validation clips of 8 classes; chance is 12.5 %.")).wait_for()
    assert note.locator("table td").first.inner_text() == "top-1"  # the reproduction card
    page.get_by_text("Show more").click()
    assert note.locator("img").evaluate(LOADED) > 0
    for stage in demo.document["stages"]:
        page.get_by_role("link", name=f"{stage['name']} p01").wait_for()
    reviewer.keep("pipeline")


def test_training_has_its_curves_with_what_is_looked_at_first_on_top(reviewer, demo):
    page = reviewer.open_run(demo.run_id_of("train"), "/model-metrics")
    for chart in ("train/loss", "train/lr", "train/top1", "val/loss", "val/top1"):
        page.locator(f"{CARD} h4[title='{chart}']").wait_for()
    page.locator(f"{CARD} .js-line").nth(2).wait_for(state="attached")  # they are drawn
    sections = [text.split()[0] for text in page.locator(SECTION).all_inner_texts()]
    assert sections[:4] == ["train", "val", "weights", "work"]
    reviewer.keep("charts")


def test_pictures_are_shown(reviewer, demo):
    for number, figure in enumerate(("confusion/confusion.png", "curves/curves.png", "search/search.png")):
        page = reviewer.open_run(demo.run_id_of("report"), f"/artifacts/figures/{figure}")
        picture = page.get_by_alt_text(f"figures/{figure}")
        picture.wait_for()
        assert picture.evaluate(LOADED) > 300, figure
        if number == 0:
            reviewer.keep("picture")


def test_the_report_is_a_page_in_mlflow(reviewer, demo):
    page = reviewer.open_run(demo.run_id_of("report"), "/artifacts/report/index.html")
    report = page.frame_locator("iframe")
    report.locator(".verdict").get_by_text("validation clips of 8 classes").wait_for()
    for picture in report.locator("figure img").all():
        assert picture.evaluate(LOADED) > 300
    reviewer.keep("report")


def test_the_registered_model_has_an_alias_and_a_card(reviewer):
    page = reviewer.open(f"{reviewer.base}/#/models/sagsm-demo")
    page.get_by_text("@ newest").wait_for()
    page.get_by_role("link", name="Version 1").click()
    note = page.locator(NOTE)
    note.get_by_text("sagsm predict --model models:/sagsm-demo@newest clip.mp4").wait_for()
    assert {"Data", "Numbers", "Limits"} <= set(note.locator("h2").all_inner_texts())
    page.get_by_text("@ newest").wait_for()
    page.get_by_role("link", name="report p01").wait_for()
    reviewer.keep("model")


def test_the_second_link_lists_the_trials_the_best_first(reviewer, links, demo):
    page = reviewer.open(links[1])
    page.get_by_text("Sort: val/top1").wait_for()
    page.get_by_role("link", name="t000").wait_for()
    found = recorded_runs(tracking_uri(demo.workdir), "trial")
    page.get_by_text(f"{len(found)} matching runs").wait_for()
    assert sorted(names(page)) == sorted(run.name for run in found)
    last = {run.run_id: last_value(demo.workdir / "mlflow.db", run.run_id, "val/top1") for run in found}
    reached = {run.name: last[run.run_id] for run in found}
    assert [reached[name] for name in names(page)] == sorted(reached.values(), reverse=True)
    reviewer.keep("trials")


def test_a_thousand_trials_hide_no_pipeline(browser, demo, serve, tmp_path):
    """MLflow's table shows the newest hundred runs, and trials are the newest while a search is going on."""
    shutil.copy(demo.workdir / "mlflow.db", tmp_path / "mlflow.db")
    add_trials(tmp_path / "mlflow.db", 1000)
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    with serve(tmp_path) as links:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(links[0])
        page.get_by_role("link", name="p01 demo").wait_for()
        page.get_by_text(f"{1 + len(demo.document['stages'])} matching runs").wait_for()
        assert names(page) == ["p01 demo"]
        page.goto("about:blank")
        page.goto(links[1])
        page.get_by_text("100 matching runs").wait_for()  # the first page
        assert names(page)[0] == "t1000 best"
    context.close()


def last_value(database, run_id, metric):
    with sqlite3.connect(database) as connection:
        condition = "run_uuid = ? and key = ?"
        return connection.execute(f"select value from latest_metrics where {condition}", (run_id, metric)).fetchone()[0]


def add_trials(database, count):
    """So many runs more, begun after all others, the last of which is the best; a tracker would take a minute."""
    with sqlite3.connect(database) as connection:
        connection.row_factory = sqlite3.Row
        [first, *_] = connection.execute("select runs.* from runs join tags using (run_uuid) where value = 'trial'").fetchall()
        tables = ("tags", "latest_metrics")
        rows = {
            table: connection.execute(f"select * from {table} where run_uuid = ?", (first["run_uuid"],)) for table in tables
        }
        rows = {table: found.fetchall() for table, found in rows.items()}
        [(newest,)] = connection.execute("select max(start_time) from runs")
        for number in range(1, count + 1):
            name = f"t{number:04d} {'best' if number == count else 'more'}"
            own = {"run_uuid": f"{number:032x}", "name": name, "start_time": newest + number}
            insert(connection, "runs", dict(first) | own)
            for table in tables:
                for row in map(dict, rows[table]):
                    row["run_uuid"] = own["run_uuid"]
                    if row["key"] == "val/top1":
                        row["value"] = 2 * number
                    insert(connection, table, row)


def insert(connection, table, row):
    places = ", ".join("?" * len(row))
    connection.execute(f"insert into {table} ({', '.join(row)}) values ({places})", tuple(row.values()))
