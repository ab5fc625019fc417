"""long2short/report.js in a headless chromium, where one is installed: the page opened as a file, as a reader does."""

from __future__ import annotations

import re

import pytest

from long2short.frontier import frontier
from long2short.report import write_report
from tests.report_world import ARGS, CHROMIUM, CURVES, HOSTILE, TIMES, make_arm

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="not run: no chromium on this machine (apt-get install chromium)"),
]
CHARTS = ("frontier-chart", "budget-chart", "lengths-chart", "difficulty-chart", "training-chart")
# Of the frontier's traces every arm has one with its number; the line and the ring have none.
SPOTS = """arm => {
  const chart = document.getElementById("frontier-chart");
  const at = chart.data.findIndex(trace => trace.customdata && trace.customdata[0] === arm);
  const box = chart.querySelectorAll(".scatterlayer .trace")[at].querySelector(".points path").getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Five arms of two levels, hostile text in all that comes from outside, one name that looks like a tag."""
    folder = tmp_path_factory.mktemp("page")
    levels = (2, 3)
    arms = [
        make_arm("teacher", 0.9, 80, HOSTILE, "grpo", levels=levels),
        make_arm("brief", 0.7, 30, HOSTILE, "length_rl", levels=levels),
        make_arm("guess", 0.3, 4, HOSTILE, levels=levels),
        make_arm("<b>long</b>", 0.5, 120, HOSTILE, "<i>sft</i>", levels=levels),
        make_arm("worse", 0.4, 100, ("say 7 </think>7",), levels=levels),
    ]
    write_report(
        folder,
        frontier(arms, "teacher", [("brief", "guess")]),
        arms,
        title="<script>window.hacked=1</script> & tiny",
        curves=CURVES,
        times=TIMES,
        facts=[("recipe", "<i>tiny</i>")],
        provenance={"<b>long</b>": [("config", '{"a": "</dd><script>window.hacked=1</script>"}')]},
    )
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def visit(browser, report):
    """`visit(width=1280, ..)`: a page of its own; in the end none may have said a word or asked for anything."""
    contexts, messages, requests = [], [], []

    def to(width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        draw_all(page)
        return page

    yield to
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.hacked") is None
            assert page.evaluate("[document.images.length, frames.length, document.scripts.length]") == [0, 0, 3]
        context.close()
    assert messages == []
    assert requests == [report.as_uri()] * len(contexts)


@pytest.fixture(scope="module")
def page(visit):
    """One page for the tests that use it, since most of a test is plotly.js starting. Each leaves it as it was."""
    return visit()


def draw_all(page):
    for name in CHARTS:
        page.locator(f"#{name}").scroll_into_view_if_needed()
        page.locator(f"#{name} .main-svg").first.wait_for()


def until(page, condition):
    """Wait for it. Playwright's own waiting evals in the page, which the page's policy refuses."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"still not: {condition}")


def chosen(page):
    return page.locator(".chip[aria-pressed=true] .name").all_inner_texts()


@pytest.mark.parametrize(("width", "scheme"), [(1400, "dark"), (390, "light")])
def test_every_section_is_drawn_and_nothing_is_wider_than_the_window(visit, width, scheme):
    page = visit(width, scheme)
    assert page.locator("h1").inner_text() == "<script>window.hacked=1</script> & tiny"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#still").count() == 0  # the picture without JavaScript has made room
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    assert page.locator("#frontier-chart .errorbar .xerror").count() == 5
    assert page.locator("#frontier-chart .errorbar .yerror").count() == 5
    assert page.locator("#training-chart .subplot").count() == 4
    page.set_viewport_size({"width": 800, "height": 900})
    until(page, "document.querySelector('#frontier-chart .main-svg').clientWidth < 800")
    assert page.evaluate("document.documentElement.scrollWidth") <= 800


def test_without_javascript_the_table_and_a_picture_show(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("#still svg").is_visible()
    assert page.locator("table.arms").first.is_visible()
    assert page.locator("#provenance").is_visible()
    assert not page.locator("#problems").is_visible()
    assert not page.locator("#chooser").is_visible()
    assert "need JavaScript" in page.locator("noscript").inner_text()
    context.close()


def test_a_click_on_a_point_chooses_its_arm(page):
    # At first the parent and the non-dominated arms; the others are grey, in the table too.
    assert chosen(page) == ["teacher", "brief", "guess"]
    assert page.locator("table.arms").first.locator("tr.dominated").count() == 2
    page.locator("#frontier-chart").scroll_into_view_if_needed()
    page.mouse.click(*page.evaluate(SPOTS, 4))
    until(page, "document.querySelectorAll('.chip[aria-pressed=true]').length === 4")
    assert chosen(page) == ["teacher", "brief", "guess", "worse"]
    assert page.locator("#lengths-chart .annotation").count() == 4
    assert page.locator("select[data-kind=arms]").nth(1).evaluate("one => one.selectedOptions[0].text") == "worse"
    # The row of the table is a button too, and a second press takes the arm away.
    page.locator("table.arms").first.get_by_role("button", name="worse").press("Enter")
    assert chosen(page) == ["teacher", "brief", "guess"]
    assert page.locator("#lengths-chart .annotation").count() == 3
    page.get_by_label("Arm on the right").select_option("1")


def test_hover_shows_the_numbers_of_the_row_as_text(page):
    page.locator("#frontier-chart").scroll_into_view_if_needed()
    page.mouse.move(*page.evaluate(SPOTS, 3))
    page.locator("#frontier-chart .hoverlayer .hovertext").wait_for()
    said = page.locator("#frontier-chart .hoverlayer").text_content()
    assert "<b>long</b>" in said
    cells = page.locator("table.arms").first.locator("tr[data-arm='3'] td").all_inner_texts()
    assert all(cell in said for cell in cells)


def test_the_frontier_zooms_and_goes_back(page):
    chart = page.locator("#frontier-chart")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    span = "document.getElementById('frontier-chart').layout.xaxis.range"
    home = page.evaluate(span)
    page.mouse.move(box["x"] + 200, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 600, box["y"] + 300, steps=4)
    page.mouse.up()
    until(page, f"{span}[1] < {home[1]} / 1.2")
    page.mouse.dblclick(box["x"] + 500, box["y"] + 200)
    until(page, f"{span}[1] > {home[1]} / 1.01")
    assert page.evaluate(span) == home


def test_heads_sort_both_tables(page):

    def order(part=0):
        names = page.locator("table.arms").nth(part).locator("tbody th button").all_inner_texts()
        return [re.sub(r"(<i>sft</i>|grpo|length_rl)$", "", name).strip() for name in names]

    as_given = ["teacher", "brief", "guess", "<b>long</b>", "worse"]
    by_tokens = ["<b>long</b>", "worse", "teacher", "brief", "guess"]
    assert order() == as_given
    head = page.locator("table.arms").first.get_by_role("button", name="Sort by tokens, mean, 95% interval")
    head.click()
    assert all(order(part) == by_tokens for part in range(page.locator("table.arms").count()))
    assert page.locator("th[aria-sort=descending]").count() == 1
    head.press("Enter")
    assert order() == by_tokens[::-1]
    head.click()
    assert order() == as_given
    assert page.locator("th[aria-sort]").count() == 0
    page.locator("table.arms").nth(1).get_by_role("button", name="Sort by arm").click()
    assert order() == ["<b>long</b>", "brief", "guess", "teacher", "worse"]
    # A cell without a number comes last, whatever the direction; the parent's own difference is nought.
    aes = page.get_by_role("button", name="Sort by AES")
    aes.click()
    assert order()[-1] == "teacher"
    aes.click()
    assert order()[-1] == "teacher"
    # A column of names sorts as text, the first one first.
    page.get_by_role("button", name="Sort by dominated by").click()
    assert order()[:2] == ["<b>long</b>", "worse"]
    change = page.get_by_role("button", name="Sort by Δ tokens, paired with parent")
    change.click()
    assert order() == by_tokens
    change.click()
    change.click()
    assert order() == as_given


def test_problems_can_be_filtered_and_read_side_by_side(page):
    page.locator("#problems").scroll_into_view_if_needed()
    rows = page.locator("#list button[data-problem]")
    assert rows.count() == 20  # a page of the 30
    page.get_by_role("button", name="Further problems").click()
    assert rows.count() == 10
    rows.first.press("Enter")
    assert page.locator("#problem h3").inner_text() == "p20 · level 2"
    # Model text is text: nothing of it became an element.
    answer = page.locator("#problem pre").first
    assert answer.inner_text().startswith("<script>window.hacked=1</script>\n<img src=x onerror=")
    assert answer.locator("*").count() == 1  # the span of the thought
    assert "⟨U+202E⟩" in answer.inner_text()
    kinds = page.get_by_label("Who is right")
    options = kinds.locator("option").all_inner_texts()
    numbers = [int(option.rsplit("(", 1)[1][:-1]) for option in options]
    assert options[2].startswith("only teacher right (")
    assert numbers[0] == sum(numbers[1:]) == 30
    kinds.select_option("only left")
    assert page.locator(".pages span").inner_text() == f"1 to {numbers[2]} of {numbers[2]}"
    assert [one.split()[1] for one in page.locator("#problem .verdict b").all_inner_texts()] == ["right", "wrong"]
    kinds.select_option("all")
    page.get_by_label("Difficulty", exact=True).select_option("1")
    assert page.locator(".pages span").inner_text() == "1 to 15 of 15"
    page.get_by_label("Difficulty", exact=True).select_option("all")
    page.get_by_role("searchbox").fill("17+01")
    until(page, "document.querySelectorAll('#list button[data-problem]').length === 1")
    assert page.locator("#problem h3").inner_text() == "p17 · level 3"
    page.get_by_role("searchbox").fill("no such text")
    page.get_by_text("Loosen the filters").wait_for()
    page.get_by_role("searchbox").fill("")
    page.locator("#problem pre").first.wait_for()


def test_any_two_arms_and_samples_stand_side_by_side(page):
    page.locator("#list button[data-problem]").first.click()
    page.get_by_label("Arm on the right").select_option("4")
    page.get_by_label("Sample on the right").select_option("1")
    assert page.locator("#problem pre").nth(1).inner_text() == "say 7 </think>7"
    assert page.locator("#problem pre").nth(1).locator(".thought").inner_text() == "say 7 </think>"
    said = page.locator("#problem .verdict").nth(1).inner_text()
    assert re.fullmatch(r"(✓ right|✗ wrong) ?\d+ tokens \([−+]\d+%\), (ended by itself|cut at the token limit)", said)
    page.get_by_label("Arm on the left").select_option("4")
    assert "only worse #1 right" in page.get_by_label("Who is right").inner_text()
    page.get_by_role("button", name="Problem after").click()
    assert page.locator("#problem h3").inner_text() == "p1 · level 3"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Problem after"
    for side, arm in (("left", "0"), ("right", "1")):
        page.get_by_label(f"Arm on the {side}").select_option(arm)
        page.get_by_label(f"Sample on the {side}").select_option("0")


def test_a_print_has_every_chart_on_white_paper(visit):
    page = visit(scheme="dark")
    page.emulate_media(media="print", color_scheme="light")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    for name in CHARTS:
        assert page.locator(f"#{name} .main-svg").count() > 0
        assert page.evaluate(f"document.querySelector('#{name} .main-svg').clientWidth") == 960
    assert page.locator("#provenance dd").first.is_visible()
    assert not page.locator("nav").is_visible()
    assert page.pdf()[:4] == b"%PDF"
