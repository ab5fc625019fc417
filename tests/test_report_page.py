"""long2short/report.js in a headless chromium, where one is installed: the page opened as a file, as a reader does."""

from __future__ import annotations

import random
import re
import time
from dataclasses import replace

import numpy as np
import pytest

from long2short.frontier import frontier
from long2short.report import TrainingCurve, write_report
from tests.report_world import ARGS, CHROMIUM, CURVES, HOSTILE, TIMES, make_arm, varied_text

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
    """Six arms of two levels, hostile text in all that comes from outside, one name that looks like a tag.

    `guess` collapsed; `<b>long</b>` and `worse` are dominated beyond noise, `near` is within it. The stage of teacher's
    training curve has another name than the arm, and `warmup` made no arm.
    """
    folder = tmp_path_factory.mktemp("page")
    levels = (2,) * 4 + (3,)
    arms = [
        make_arm("teacher", 0.9, 80, HOSTILE, "grpo", levels=levels),
        make_arm("brief", 0.7, 30, HOSTILE, "length_rl", levels=levels),
        make_arm("guess", 0.1, 4, HOSTILE, levels=levels),
        make_arm("<b>long</b>", 0.5, 120, HOSTILE, "<i>sft</i>", levels=levels),
        make_arm("worse", 0.4, 100, ("say 7 </think>7",), levels=levels),
        make_arm("near", 0.86, 82, HOSTILE, "grpo", levels=levels),
    ]
    curves = [replace(CURVES[0], name="long-rl"), *CURVES[1:], TrainingCurve("other", CURVES[0].rows, ("worse",))]
    write_report(
        folder,
        frontier(arms, "teacher", [("brief", "guess")]),
        arms,
        title="<script>window.hacked=1</script> & tiny",
        curves=curves,
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


def draw_all(page, *names):
    for name in names or CHARTS:
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
    assert page.locator("#frontier-chart .errorbar .xerror").count() == 6
    assert page.locator("#frontier-chart .errorbar .yerror").count() == 6
    assert page.locator("#training-chart .subplot").count() == 4
    page.set_viewport_size({"width": 800, "height": 900})
    until(page, "document.querySelector('#frontier-chart .main-svg').clientWidth < 800")
    assert page.evaluate("document.documentElement.scrollWidth") <= 800


def test_without_javascript_the_table_and_a_picture_show(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("#still > svg").is_visible()
    assert page.locator("table.arms").first.is_visible()
    assert page.locator("#limits table").is_visible()
    assert page.locator("#meanings").is_visible()
    assert page.locator("#provenance").is_visible()
    assert not page.locator("#problems").is_visible()
    assert not page.locator("#chooser").is_visible()
    assert "need JavaScript" in page.locator("noscript").inner_text()
    context.close()


def test_a_click_on_a_point_chooses_its_arm(page):
    # At first the parent and those that no arm dominates beyond noise; the others are grey, in the table too.
    assert chosen(page) == ["teacher", "brief", "near"]
    assert page.locator("table.arms").first.locator("tr.dominated").count() == 2
    assert page.locator("table.arms").first.locator("tr.collapsed").count() == 1
    page.locator("#frontier-chart").scroll_into_view_if_needed()
    page.mouse.click(*page.evaluate(SPOTS, 4))
    until(page, "document.querySelectorAll('.chip[aria-pressed=true]').length === 4")
    assert chosen(page) == ["teacher", "brief", "worse", "near"]
    assert page.locator("#lengths-chart .annotation").count() == 4
    assert page.locator("select[data-kind=arms]").nth(1).evaluate("one => one.selectedOptions[0].text") == "worse"
    # The row of the table is a button too, and a second press takes the arm away.
    page.locator("table.arms").first.get_by_role("button", name="worse").press("Enter")
    assert chosen(page) == ["teacher", "brief", "near"]
    assert page.locator("#lengths-chart .annotation").count() == 3
    page.get_by_label("Arm on the right").select_option("1")


def test_points_are_drawn_as_the_arms_stand(page):
    """The line joins what is non-dominated and not collapsed; hollow in colour: within noise; a cross: collapsed."""
    traces = page.evaluate("""document.getElementById("frontier-chart").data.map(
        one => ({x: one.x, at: one.customdata && one.customdata[0], ...one.marker}))""")
    line, points = traces[0], {one["at"]: one for one in traces if one["at"] is not None}
    colours = page.evaluate("""Object.fromEntries(["--paper", "--grey", "--c0", "--c1", "--c2"].map(
        name => [name, getComputedStyle(document.documentElement).getPropertyValue(name).trim()]))""")
    assert line["x"] == [points[1]["x"][0], points[0]["x"][0]]  # brief, teacher
    drawn = [(points[arm]["symbol"], points[arm]["color"], points[arm]["line"]["color"]) for arm in range(6)]
    assert drawn == [
        ("circle", colours["--c0"], colours["--c0"]),
        ("square", colours["--c1"], colours["--c1"]),
        ("x-thin", colours["--paper"], colours["--grey"]),
        ("circle", colours["--paper"], colours["--grey"]),
        ("circle", colours["--paper"], colours["--grey"]),
        # A second arm of the family grpo, whose own style teacher has.
        ("diamond", colours["--paper"], colours["--c2"]),
    ]
    assert "guess (collapsed)" in page.locator("#frontier-chart .annotation").all_text_contents()
    said = page.locator("#meanings span").all_inner_texts()
    assert [one.split(":")[0] for one in said] == [
        "joined", "hollow, in colour", "hollow, grey", "cross", "ring", "bars",
    ]  # fmt: skip


def test_lines_differ_by_dashes_and_training_curves_find_their_arms(page):
    lines = """name => document.getElementById(name).data.map(
        one => [one.hovertext[0].match(/<b>(.*?)<\\/b>/)[1], one.line.dash, one.line.color])"""
    dashes = {name: dash for name, dash, _ in page.evaluate(lines, "budget-chart")}
    assert dashes["teacher"] == dashes["worse"] == "solid"
    assert len({dashes[name] for name in ("teacher", "brief", "near")}) == 3
    colours = {name: colour for name, _, colour in page.evaluate(lines, "budget-chart")}
    trained = {name: (dash, colour) for name, dash, colour in page.evaluate(lines, "training-chart")}
    # A stage has the style of its arm, whatever either is called; `other` made an arm that is not chosen.
    assert trained["long-rl, teacher"] == ("solid", colours["teacher"])
    assert trained["brief"] == (dashes["brief"], colours["brief"])
    assert trained["other, worse"] == ("solid", colours["worse"])
    assert trained["sft"][1] not in colours.values()


def test_bins_of_few_problems_are_marked(page):
    assert page.locator("#difficulty .warn").inner_text().startswith("Few problems: 6 in level 3.")
    ticks = page.evaluate("document.getElementById('difficulty-chart').layout.xaxis.ticktext")
    assert ticks == ["2", "3<br><b>n = 6</b>"]


def test_sixteen_arms_have_styles_of_their_own(browser, tmp_path):
    """Eighteen families that nothing dominates: eight in colour at first, at most sixteen, each with its own line."""
    arms = [make_arm(f"arm-{at:02d}", 0.9, 20 + at, label=f"family-{at}") for at in range(18)]
    context = browser.new_context()
    page = context.new_page()
    write_report(tmp_path, frontier(arms, "arm-00"), arms, title="many")
    page.goto((tmp_path / "report.html").as_uri())
    draw_all(page, "frontier-chart", "budget-chart")
    assert len(chosen(page)) == 8
    for chip in page.locator(".chip").all():
        if chip.get_attribute("aria-pressed") == "false":
            chip.click()
    assert len(chosen(page)) == 16
    lines = """document.getElementById("budget-chart").data.filter(one => one.opacity === 1).map(
        one => one.line.color + one.line.dash)"""
    assert len(set(page.evaluate(lines))) == 16
    points = """document.getElementById("frontier-chart").data.filter(one => one.customdata).map(
        one => one.marker.symbol + one.marker.line.color)"""
    assert len(set(page.evaluate(points))) == 17  # and those not chosen
    context.close()


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
        return [re.sub(r"^[*~]|(<i>sft</i>|grpo|length_rl|collapsed)$", "", name.strip()).strip() for name in names]

    as_given = ["teacher", "brief", "guess", "<b>long</b>", "worse", "near"]
    by_tokens = ["<b>long</b>", "worse", "near", "teacher", "brief", "guess"]
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
    assert order() == ["<b>long</b>", "brief", "guess", "near", "teacher", "worse"]
    # A cell without a number comes last, whatever the direction; the parent's own difference is nought.
    aes = page.get_by_role("button", name="Sort by AES")
    aes.click()
    assert order()[-1] == "teacher"
    aes.click()
    assert order()[-1] == "teacher"
    # A column of names sorts as text, the first one first; that of a limit by the accuracy that begins its cells.
    by = page.get_by_role("button", name="Sort by dominated by")
    by.click()
    assert order()[:3] == ["guess", "<b>long</b>", "worse"]  # collapsed, teacher and .., teacher and ..
    limit = page.locator("#limits").get_by_role("button", name="Sort by at most").last
    limit.click()
    assert order(-1)[0] == "teacher" and order() == order(-1)
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
    assert page.locator(".pages span").inner_text() == "1 to 6 of 6"
    page.get_by_label("Difficulty", exact=True).select_option("all")
    page.get_by_role("searchbox").fill("17+01")
    until(page, "document.querySelectorAll('#list button[data-problem]').length === 1")
    assert page.locator("#problem h3").inner_text() == "p17 · level 2"
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
    assert page.locator("#problem h3").inner_text() == "p1 · level 2"
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


# --- a large page -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """20 arms with 500 completions each, every text another one: lengths of 200 to 1,500 characters, hostile pieces."""
    folder = tmp_path_factory.mktemp("large")
    rng = random.Random(0)
    arms = []
    for number in range(20):
        arm = make_arm(
            f"arm-{number}", 0.95 - 0.02 * number, 90 - 3 * number, problems=125, samples=4, levels=(2, 3, 4)
        )
        groups = tuple(
            replace(group, rollouts=tuple(varied(one, rng) for one in group.rollouts)) for group in arm.groups
        )
        arms.append(replace(arm, groups=groups))
    write_report(folder, frontier(arms, "arm-0"), arms, title="large", curves=CURVES[2:], times=TIMES)
    return folder / "report.html"


def varied(rollout, rng):
    return replace(rollout, completion=replace(rollout.completion, text=varied_text(rng)))


def seconds_until_drawn(page, path):
    """From the call to the last row of the table and the chart of the frontier."""
    start = time.perf_counter()
    page.goto(path.as_uri(), wait_until="commit")
    page.locator("table.arms tbody tr").last.wait_for()
    page.locator("#frontier-chart .main-svg").first.wait_for()
    return time.perf_counter() - start


@pytest.mark.alone  # it watches the clock
def test_a_large_page_is_small_enough_and_there_in_three_seconds(browser, report, large, tmp_path):
    """Most of the time is plotly.js starting, for which a small page waits as well: on a slow or busy machine the large
    one is held to twice what the small one takes. Best of three."""
    assert large.stat().st_size < 15_000_000
    seconds, messages, requests = {report: [], large: []}, [], []
    for path in 3 * [report, large]:
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        seconds[path].append(seconds_until_drawn(page, path))
        if len(seconds[large]) == 3:
            draw_all(page)
            page.screenshot(path=tmp_path / "page.png", full_page=True)
            assert page.evaluate("window.hacked") is None
            assert page.evaluate("[document.images.length, frames.length, document.scripts.length]") == [0, 0, 3]
        context.close()
    assert min(seconds[large]) <= max(3.0, 2 * min(seconds[report])), seconds
    assert messages == []
    assert requests == 3 * [report.as_uri(), large.as_uri()]
    assert_is_a_picture(tmp_path / "page.png")


def assert_is_a_picture(path):
    """Not empty, not blank: many colours, and less than all of it paper."""
    from matplotlib.image import imread

    assert path.stat().st_size > 200_000
    pixels = (255 * imread(path)[:, :, :3]).round().astype(np.uint32)
    colours, counts = np.unique(pixels @ np.array([65536, 256, 1], dtype=np.uint32), return_counts=True)
    assert len(colours) > 500
    assert counts.max() < 0.97 * counts.sum()
