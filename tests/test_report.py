"""long2short/report.py and charts.py: the picture, and a page that hostile model text cannot break.

The page is opened in a headless chromium where one is installed.
"""

from __future__ import annotations

import html
import itertools
import random
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from long2short import charts, report
from long2short.frontier import Arm, frontier
from long2short.report import StageTime, TrainingCurve
from rl.evaluate import summarize
from rl.tasks import tiny
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict

PIECES = (
    "<script>window.hacked=1</script>",
    "<img src=x onerror=\"window.hacked=1\"><svg/onload='window.hacked=1'>",
    "</pre></div><iframe src='https://example.com'></iframe><style>body{display:none}</style>",
    "abc \u202edcba\u202c \u2066x\u2069 NUL \x00 bell \x07 BOM \ufeff lone \ud800 end",
    "{{ 7*7 }}{% raw %} ]]> <!-- &lt;b&gt; مرحبا 你好",
)
HOSTILE = ("\n".join(PIECES), "L" * 100_000)


def make_arm(name, chance, tokens, texts=("1+1=2 </think>02",), label="", problems=30, samples=2):
    rng = random.Random(name)
    groups = []
    for number in range(problems):
        rollouts = []
        for sample in range(samples):
            length = max(1, round(rng.gauss(tokens, tokens / 8)))
            verdict = Verdict(Outcome.RIGHT) if rng.random() < chance else Verdict(Outcome.WRONG, texts[0][:40])
            text = texts[(number + sample) % len(texts)]
            reason = FinishReason.STOP if verdict.right else FinishReason.LENGTH
            rollouts.append(Rollout(Completion(text, tuple(range(length)), (0.0,) * length, reason), verdict))
        problem = Problem(f"p{number}", (TextPart(f"01+01 {texts[number % len(texts)]}"),), "02", level=2)
        groups.append(RolloutGroup(problem, (1,), tuple(rollouts)))
    return Arm(name, tuple(groups), summarize(groups, tiny.TASK), label)


@pytest.fixture(scope="module")
def arms():
    return [
        make_arm("teacher", 0.8, 80, HOSTILE),
        make_arm("brief", 0.78, 30, HOSTILE, "length-rl"),
        make_arm("guess", 0.3, 4, HOSTILE),
    ]


CURVES = (
    TrainingCurve(
        "teacher", tuple({"step": i, "reward": i / 9, "accuracy": 0.5, "tokens_mean": 9.0 + i} for i in range(9))
    ),
    TrainingCurve("brief", ({"step": 1, "reward": 0.5, "accuracy": None, "loss": 1.0},)),
    TrainingCurve("sft", ({"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0})),
)
TIMES = (StageTime("teacher", "grpo", 171.3), StageTime("<b>sft</b>", "sft", 3.2, reused=True))


@pytest.fixture(scope="module")
def folder(arms, tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    report.write_report(
        path,
        frontier(arms, "teacher", [("brief", "guess")]),
        arms,
        title="<script>window.hacked=1</script> & tiny",
        curves=CURVES,
        times=TIMES,
        facts=[("recipe", "<i>tiny</i>")],
    )
    return path


class Tags(HTMLParser):
    """Every tag with its attributes, and whether each opened tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in {"meta", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_well_formed_document_without_anything_active(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert tags.open == []
    assert not {"script", "iframe", "img", "object", "embed", "form", "base"} & set(tags.seen)
    assert page.count("<style") == 1
    for tag, name, value in tags.attributes:
        assert not name.startswith("on")
        assert name not in {"src", "action", "xlink:href"}
        assert name != "href" or (tag, value) == ("link", "data:,")
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert not re.search(r"url\(|@import|https?://(?!example\.com)", page)


def test_hostile_text_is_shown_not_obeyed(folder):
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    assert "<script>window.hacked=1</script>" in page  # unescaped by this test: the page shows it as text
    assert (
        "abc ⟨U+202E⟩dcba⟨U+202C⟩ ⟨U+2066⟩x⟨U+2069⟩ NUL ⟨U+0000⟩ bell ⟨U+0007⟩ BOM ⟨U+FEFF⟩ lone ⟨U+D800⟩ end" in page
    )
    assert "{{ 7*7 }}" in page
    assert "مرحبا 你好" in page
    assert "[… 92,000 characters left out …]" in page
    assert len(page) < 600_000


def test_the_page_holds_what_it_should(folder, arms):
    page = (folder / "report.html").read_text(encoding="utf-8")
    for section in ("frontier", "table", "lengths", "training", "examples", "times"):
        assert f'<section id="{section}">' in page
    assert page.count("<svg") == 1 + len(arms) + 4  # frontier, histograms, reward, accuracy, mean tokens, loss
    assert "brief against guess" in page
    assert "2 min 51 s" in page
    assert "% truncated</span>" in page
    assert "tokens, truncated</span>" in page
    # Loss is drawn for SFT only; a stage with a reward says nothing by its loss.
    assert page.count("<title>sft</title>") == 1
    assert page.count("<title>brief</title>") == 1  # reward: its accuracy is null


def test_files_are_written_and_the_json_is_the_frontier(folder, arms):
    from long2short.frontier import Frontier
    from rl.runs import read_json

    assert sorted(path.name for path in folder.iterdir()) == ["frontier.json", "frontier.png", "report.html"]
    assert Frontier.from_json(read_json(folder / "frontier.json")) == frontier(arms, "teacher", [("brief", "guess")])


def test_the_png_is_a_picture_of_the_points(arms):
    found = frontier(arms, "teacher")
    data = report.draw_png(found, dpi=60)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data == report.draw_png(found, dpi=60)
    import io

    from matplotlib.image import imread

    pixels = imread(io.BytesIO(data))
    assert pixels.shape[:2] == (312, 540)
    # Hollow points keep the colour of their ring; every arm here has a colour of its own, and each is in the picture.
    for colour in report.PALETTE[: len(arms)]:
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels[:, :, :3] - wanted).max(axis=2) < 0.02).sum() > 10


def test_one_arm_alone_has_a_page_and_a_picture():
    arm = make_arm("only", 1.0, 10, samples=1, problems=1)
    found = frontier([arm], "only")
    page = report.render_page(found, [arm], title="one")
    assert '<section id="examples">' not in page
    assert '<section id="training">' not in page
    assert report.draw_png(found, dpi=40)[:4] == b"\x89PNG"


def test_examples_are_the_first_of_each_kind(arms):
    kinds, examples = report.pick_examples(arms[:2])
    assert sum(number for _, number in kinds) == 30
    assert kinds == sorted(kinds, key=lambda kind: -kind[1])
    by_kind = {kind: [one for one in examples if one.kind == kind] for kind, _ in kinds}
    for kind, number in kinds:
        assert len(by_kind[kind]) == min(2, number)
    both = [g.problem.id for g, h in zip(arms[0].groups, arms[1].groups, strict=True) if g.right[0] and h.right[0]]
    assert [one.problem for one in by_kind["both right"]] == both[:2]
    assert set(by_kind) <= {"both right", "only teacher right", "only brief right", "both wrong"}
    first = by_kind["both right"][0]
    group = next(group for group in arms[0].groups if group.problem.id == first.problem)
    assert (first.answers[0].arm, first.answers[0].tokens) == ("teacher", group.rollouts[0].num_tokens)


def test_examples_of_three_arms_and_undecided_ones(arms):
    kinds, _ = report.pick_examples(arms)
    assert {kind for kind, _ in kinds} <= {
        "all right",
        "all wrong",
        *(
            f"only {' and '.join(names)} right"
            for n in (1, 2)
            for names in itertools.combinations(["teacher", "brief", "guess"], n)
        ),
    }
    first = arms[0].groups[0]
    undecided = replace(first.rollouts[0], verdict=Verdict.undecided(JudgeFailure.CRASH))
    groups = (replace(first, rollouts=(undecided, *first.rollouts[1:])), *arms[0].groups[1:])
    kinds, _ = report.pick_examples([replace(arms[0], groups=groups), arms[1]])
    assert sum(number for _, number in kinds) == 29


def test_the_brief_arm_is_short_but_not_much_worse(arms):
    found = frontier(arms, "teacher")
    close = found.row("teacher").summary.accuracy.value - found.row("brief").summary.accuracy.value
    assert report.brief_arm(found, tolerance=close + 1e-9) == "brief"
    assert report.brief_arm(found, tolerance=1.0) == "guess"
    assert report.brief_arm(frontier(arms[::2], "teacher")) == "guess"  # none is close: the most accurate other one
    with pytest.raises(ValueError, match="'nobody' is not an arm of the report"):
        report.render_page(found, arms, title="t", shown=["teacher", "nobody"])


@given(st.text(max_size=200))
def test_visible_text_has_nothing_hidden_and_is_utf8(text):
    shown = report.visible(text)
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", shown
    )
    shown.encode("utf-8")
    assert report.visible(shown) == shown


def test_shortened_and_duration():
    assert report.shortened("x" * 8, 8) == "x" * 8
    assert report.shortened("abcdefghij", 8) == "abcdef\n[… 2 characters left out …]\nij"
    assert [report.duration(s) for s in (3.2, 171.3, 4000)] == ["3.2 s", "2 min 51 s", "1 h 06 min"]


def test_ticks_and_bins():
    assert charts.ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert charts.tick_texts([0.9, 0.95]) == ["0.90", "0.95"]
    assert charts.tick_texts([0, 1500]) == ["0", "1,500"]
    assert charts.bins(10, 4) == [0, 3, 6, 9, 12]
    assert charts.Scale(0, 10, 100, 200)(5) == 150


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 12))
def test_ticks_lie_within_and_are_few(low, size, most):
    found = charts.ticks(low, low + size, most)
    assert 1 <= len(found) <= most + 1
    assert all(low - 1e-6 * size <= tick <= low + size * (1 + 1e-6) for tick in found)


@given(st.integers(0, 5_000), st.integers(2, 40))
def test_bins_hold_the_longest(longest, most):
    edges = charts.bins(longest, most)
    assert edges[0] == 0
    assert edges[-1] > longest
    assert len(edges) <= most + 2


def test_labels_keep_apart_where_there_is_room():
    points = [(100.0, 100.0), (108.0, 104.0), (104.0, 96.0), (300.0, 200.0)]
    sizes = [(60.0, 15.0)] * 4
    places = charts.place_labels(points, sizes, [], (0, 0, 400, 300))
    boxes = [(x - 30, y - 7.5, x + 30, y + 7.5) for x, y in places]
    for one, other in itertools.combinations(boxes, 2):
        assert charts._overlap(one, other) == 0
    for box in boxes:
        assert box[0] >= 0
        assert box[2] <= 400
        assert all(not (box[0] < x < box[2] and box[1] < y < box[3]) for x, y in points)


# --- in a browser -------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="not run: no chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_chromium(folder, scheme):
    """Opened as a file: no console message, no request, no script from model text, nothing wider than the window."""
    from playwright.sync_api import sync_playwright

    messages, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((folder / "report.html").as_uri())
        page.wait_for_load_state("networkidle")
        assert messages == []
        assert requests == [(folder / "report.html").as_uri()]
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.scripts.length + document.images.length + frames.length") == 0
        assert page.locator("h1").inner_text() == "<script>window.hacked=1</script> & tiny"
        assert page.locator("article.example pre").count() >= 4
        for width in (1280, 480):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
        browser.close()
