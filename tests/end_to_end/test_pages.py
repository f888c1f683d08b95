"""Our own pages as people open them: from the disk, in a browser, at a desk and on a telephone, with the keyboard."""

import json
import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]  # playwright's own pipes

PAGES = ["report", "audit", "search", "interactive", "insight", "comparison", "gap"]
REACHABLE = "a[href], button, input, select, summary, [tabindex='0']"


@pytest.fixture(scope="module")
def pages(browser, demo, tmp_path_factory):
    """Every kind of page that a user gets; two evaluations of one network are compared, one of them by its name in MLflow."""
    workdir = tmp_path_factory.mktemp("judged")
    shutil.copytree(demo.workdir / "store", workdir / "store", copy_function=os.link)
    demo.call("run", "evaluate.protocol=2clips", workdir=workdir, only="evaluate")
    first = demo.stage("evaluate")["fingerprint"]
    made = {}
    for command in (["compare", first, "p01 demo"], ["gap", first]):
        asked = [demo.command("run")[0], *command, "--workdir", str(workdir), "--json"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr
        made[command[0]] = Path(json.loads(done.stdout)["page"])
    return {
        "report": demo.path_of("report") / "index.html",
        "audit": demo.path_of("audit") / "page.html",
        "search": demo.path_of("search") / "index.html",
        "interactive": demo.path_of("search") / "interactive.html",
        "insight": demo.path_of("insight") / "index.html",
        "comparison": made["compare"],
        "gap": made["gap"],
    }


@pytest.fixture
def opened(browser, pages, request):
    """Opens a page, and gives it with all that it asked for and complained of."""
    contexts = []

    def opened(name, width, scheme):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page, asked, complaints = context.new_page(), [], []
        context.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(pages[name].as_uri())
        return page, asked, complaints

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_readable_and_asks_for_nothing(opened, pages, screenshots, name, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page, asked, complaints = opened(name, width, scheme)
    page.screenshot(path=screenshots / f"page-{name}-{width}.png", full_page=True)
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").count() == 1
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(heading => Number(heading.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for picture in page.locator("img").all():
        assert (picture.get_attribute("alt") or "").strip()
        assert picture.evaluate("async picture => { await picture.decode(); return picture.naturalWidth; }") > 0
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert [address for address in asked if not address.startswith(("data:", "blob:"))] == [pages[name].as_uri()]
    assert complaints == []


@pytest.mark.parametrize("name", PAGES)
def test_the_keyboard_reaches_all_that_can_be_opened_or_scrolled(opened, name):
    page, _, _ = opened(name, 390, "light")
    wanted = page.evaluate(f"[...document.querySelectorAll(`{REACHABLE}`)].filter(item => item.checkVisibility()).length")
    reached = []
    for _ in range(wanted):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                """() => {
                    const [item, style] = [document.activeElement, getComputedStyle(document.activeElement)];
                    const number = [...document.querySelectorAll('*')].indexOf(item);
                    return [item.tagName, number, style.outlineStyle, parseFloat(style.outlineWidth)];
                }"""
            )
        )
    assert all(tag != "BODY" and style != "none" and width >= 1 for tag, _, style, width in reached), reached
    numbers = [number for _, number, _, _ in reached]
    assert numbers == sorted(set(numbers))  # in the order of the page, each once
    closed = page.locator("details:not([open]) > summary")
    if closed.count():
        before = closed.count()
        closed.first.focus()
        page.keyboard.press("Enter")
        assert closed.count() == before - 1
