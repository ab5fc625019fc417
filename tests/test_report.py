"""long2short/report.py, report_data.py, report_examples.py, report_text.py: what the page holds, and that hostile model
text cannot break it. In a browser: test_report_page.py. The pictures: test_report_pictures.py."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from long2short import charts, report, report_data
from long2short.frontier import Column, Frontier, frontier, table_columns
from long2short.report import plotly_js
from long2short.report_data import (
    accuracy_under,
    difficulty_of,
    head_of,
    histogram,
    length_bins,
    level_ranges,
    plot_budgets,
    round_width,
    thinned,
    training_panels,
)
from long2short.report_examples import BYTES, evenly_within, examples
from long2short.report_text import json_text, shortened, typeset, visible
from rl.budget_curve import truncated_accuracy
from rl.runs import read_json
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict
from tests.report_world import CURVES, HOSTILE, TIMES, make_arm


@pytest.fixture(scope="module")
def arms():
    return [
        make_arm("teacher", 0.8, 80, HOSTILE),
        make_arm("brief", 0.78, 30, HOSTILE, "length-rl"),
        make_arm("guess", 0.3, 4, HOSTILE),
    ]


@pytest.fixture(scope="module")
def collapsed(arms):
    """Two more: no right answer in two tokens, which nothing dominates."""
    return [*arms, make_arm("nothing", 0.0, 2)]


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
        provenance={"brief": [("parents", "teacher <0a1b>"), ("weights", "sha256 9f86")]},
    )
    return path


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every tag with its attributes, the text of each script, and whether each opened tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes, self.scripts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in {"meta", "link"}:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)


@pytest.fixture(scope="module")
def tags(page):
    return Tags(page)


@pytest.fixture(scope="module")
def data(tags):
    return json.loads(tags.scripts[0][1])


def test_the_page_is_one_well_formed_document_that_loads_nothing(page, tags):
    assert tags.open == []
    assert not {"iframe", "img", "object", "embed", "form", "base"} & set(tags.seen)
    assert tags.seen.count("style") == 1
    for tag, name, value in tags.attributes:
        assert not name.startswith("on")
        assert name not in {"src", "action", "xlink:href"}
        assert name != "href" or (tag, value) == ("link", "data:,") or (tag == "a" and re.fullmatch(r"#[a-z]+", value))
    # Outside the scripts: plotly.js names the map services that a map would ask, the data quote whatever was said.
    shown = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"url\(|@import|https?://", shown)


def test_the_policy_allows_the_two_scripts_by_hash_and_nothing_else(tags):
    (policy,) = [value for tag, name, value in tags.attributes if name == "content" and "default-src" in (value or "")]
    kinds = [attributes for attributes, _ in tags.scripts]
    assert kinds == [{"type": "application/json", "id": "data"}, {}, {}]
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for _, text in tags.scripts[1:]
    ]
    assert policy == (
        f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def without_plotly(page):
    return page.replace(plotly_js(), "")


def test_hostile_text_is_data_and_shown_by_code(page, data):
    assert page.count("window.hacked") == page.count("window.hacked=1")
    inside = page[page.index('id="data">') + 10 : page.index("</script>", page.index('id="data">'))]
    assert not re.search("[<>&\u2028\u2029]", inside)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", without_plotly(page))
    text = data["problems"]["rows"][0]["samples"][0][0][3]
    assert text.startswith("<script>window.hacked=1</script>\n<img src=x onerror=")
    assert "abc ⟨U+202E⟩dcba⟨U+202C⟩ ⟨U+2066⟩x⟨U+2069⟩ NUL ⟨U+0000⟩ bell ⟨U+0007⟩ BOM ⟨U+FEFF⟩ lone ⟨U+D800⟩" in text
    assert "{{ 7*7 }}{% raw %}" in text
    assert "مرحبا 你好" in text
    assert "[… 92,000 characters left out …]" in data["problems"]["rows"][0]["samples"][0][1][3]


def test_the_page_holds_what_it_should(page, data):
    for section in (
        "frontier",
        "table",
        "budget",
        "limits",
        "lengths",
        "difficulty",
        "training",
        "problems",
        "provenance",
        "times",
    ):
        assert re.search(f'<section id="{section}"', page), section
        assert f'href="#{section}"' in page
    assert page.count('<svg viewBox="0 0 980 500"') == 1  # the picture without JavaScript
    tables = page.count('<table class="arms">')
    # By chance brief is the more accurate one of the two here; the parent may be as accurate.
    for standing, mark, name in (("noise", "~", "teacher"), ("front", "*", "brief"), ("front", "*", "guess")):
        row = rf'<tr data-arm="\d" class="{standing}">.*<span class="mark">{re.escape(mark)}</span>{name}<'
        assert len(re.findall(row, page)) == tables
    assert "All arms" in page and "joined: non-dominated" in page and "dominated, within noise (~)" in page
    assert "dominated beyond noise</span>" not in page and "cross: collapsed" not in page  # there is no such arm
    # Accuracy and, below it, the difference from the parent under the same limit.
    limits = page[page.index('<section id="limits"') :].partition("</section>")[0]
    assert limits.count('<th scope="col"') == 5
    assert "a longer one is wrong, and nobody is asked for an answer there" in limits
    assert "The limits are 0.25, 0.5, 1 and 2 times teacher's mean tokens" in limits
    assert re.search(r"<td>0\.833\n\+0\.833 \[\+0\.739, \+0\.928\]</td>", limits)
    assert "The area under the curve in the table is over 13 limits: 2, 3, 4, 5, 7," in page
    assert "brief against guess" in page
    assert "2 min 51 s" in page
    assert "&lt;i&gt;tiny&lt;/i&gt;" in page
    assert "<dt>parents</dt><dd>teacher &lt;0a1b&gt;</dd>" in page
    assert "All 30 problems." in page
    assert [arm["name"] for arm in data["arms"]] == ["teacher", "brief", "guess"]
    assert (data["parent"], data["brief"]) == (0, 1)
    assert [(arm["standing"], arm["style"]) for arm in data["arms"]] == [("noise", 0), ("front", 1), ("front", 2)]
    assert data["styles"] == [asdict(style) for style in charts.STYLES]
    assert data["arms"][1]["hover"][0][0] == "accuracy, 95% interval"
    # Loss is drawn for SFT only; a stage with a reward says nothing by its loss. A null accuracy is no point.
    panels = {panel["label"]: [line["name"] for line in panel["lines"]] for panel in data["panels"]}
    assert panels == {
        "reward": ["teacher", "brief"],
        "accuracy": ["teacher"],
        "mean tokens": ["teacher"],
        "loss": ["sft"],
    }
    assert [line["arms"] for line in data["panels"][0]["lines"]] == [[0], [1]]


def test_files_are_written_and_the_json_is_the_frontier(folder, arms):
    names = ["frontier.csv", "frontier.json", "frontier.md", "frontier.png", "frontier.svg", "report.html"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert Frontier.from_json(read_json(folder / "frontier.json")) == frontier(arms, "teacher", [("brief", "guess")])


def test_the_numbers_of_an_arm_are_those_of_its_groups(data, arms):
    for shown, arm in zip(data["arms"], arms, strict=True):
        rollouts = [rollout for group in arm.groups for rollout in group.rollouts]
        assert sum(shown["right"]) == sum(rollout.right for rollout in rollouts)
        assert sum(shown["right"]) + sum(shown["others"]) == len(rollouts)
        assert shown["accuracy"][0] == pytest.approx(arm.summary.accuracy.value, abs=1e-4)
        assert shown["budget"][-1] == pytest.approx(arm.summary.accuracy.value, abs=1e-4)
        assert shown["budget"] == sorted(shown["budget"])


def test_one_arm_alone_has_a_page():
    arm = make_arm("only", 1.0, 10, samples=1, problems=1)
    found = frontier([arm], "only")
    page = report.render_page(found, [arm], title="one")
    assert '<section id="training"' not in page
    assert '<section id="provenance"' not in page
    assert (
        f"only alone: right in 100.0% of its answers, with {arm.groups[0].num_tokens[0]}.0 tokens on average." in page
    )
    assert '<section id="limits"' not in page
    with pytest.raises(ValueError, match="provenance: 'nobody' is not an arm of the report; the arms are only"):
        report.render_page(found, [arm], title="one", provenance={"nobody": []})
    with pytest.raises(ValueError, match="training curves: 'nobody' is not an arm of the report"):
        report.render_page(found, [arm], title="one", curves=[report.TrainingCurve("rl", (), ("nobody",))])


def test_the_brief_arm_is_short_but_not_much_worse(arms):
    found = frontier(arms, "teacher")
    close = found.row("teacher").summary.accuracy.value - found.row("brief").summary.accuracy.value
    assert report.brief_arm(found, tolerance=close + 1e-9) == "brief"
    assert report.brief_arm(found, tolerance=1.0) == "guess"
    assert report.brief_arm(frontier(arms[::2], "teacher")) == "guess"  # none is close: the most accurate other one
    assert (
        report.headline(found, "guess", 1.0)[0]
        == "guess is the briefest of 2 arms at most 1.0 less accurate than teacher."
    )
    assert report.headline(frontier(arms[::2], "teacher"), "guess") == [
        "No arm is at most 0.03 less accurate than teacher; guess is the most accurate other one.",
        "Non-dominated, from brief to long: guess, teacher.",
    ]
    assert [what for _, what, _ in report.tiles(found, "guess")] == ["tokens", "accuracy", "mean tokens", "right"]


def test_a_collapsed_arm_is_named_and_never_the_brief_one(collapsed):
    found = frontier(collapsed, "teacher")
    row = found.row("nothing")
    assert (row.non_dominated, row.collapsed, row.joined) == (True, True, False)
    assert report.brief_arm(found, tolerance=1.0) == "guess"
    said = report.headline(found, "guess", 1.0)
    assert said[0] == "guess is the briefest of 2 arms at most 1.0 less accurate than teacher."
    assert said[2] == "Collapsed, less than half as right as teacher: nothing."
    assert "nothing" not in said[1]
    # The only other one: nothing to be brief about, and no large figures.
    alone = frontier(collapsed[::3], "teacher")
    assert report.brief_arm(alone, tolerance=1.0) is None
    assert report.headline(alone, None)[0].startswith("teacher alone: right in ")
    assert report.tiles(alone, None) == []
    page = report.render_page(found, collapsed, title="t")
    assert 'class="collapsed"><th scope="row"><span class="swatch"></span><span class="mark">*</span>nothing' in page
    assert "cross: collapsed, less than half as right as the parent" in page
    # Its answers of two tokens stretch no axis.
    axes = []
    for some in (collapsed[:2], [*collapsed[:2], collapsed[3]]):
        shown = report_data.figures(frontier(some, "teacher"), some, difficulty_of(some, "teacher"))
        axes.append((shown["budgets"], shown["edges"]))
    assert axes[0] == axes[1]


def test_listed_budgets():
    assert report.listed_budgets([8, 16, 32]) == "3 limits: 8, 16, 32 tokens"
    assert report.listed_budgets([16]) == "one limit: 16 tokens"
    assert report.listed_budgets(range(8, 48)) == "40 limits from 8 to 47 tokens"


def test_the_page_says_which_limits_the_recipe_chose(arms):
    page = report.render_page(frontier(arms, "teacher", budgets=[10, 1_000]), arms, title="t")
    assert "The area under the curve in the table is over 2 limits: 10, 1,000 tokens." in page


def test_bins_of_few_problems_say_so():
    arm = make_arm("one", 0.8, 20, problems=30, levels=(2, 3, 3))
    page = report.render_page(frontier([arm], "one"), [arm], title="t")
    assert '<strong class="warn">' not in page  # 10 and 20
    arm = make_arm("one", 0.8, 20, problems=30, levels=(2, 2, 2, 2, 3, 4))
    assert difficulty_of([arm], "one").few == [("3", 5), ("4", 5)]
    page = report.render_page(frontier([arm], "one"), [arm], title="t")
    assert "Few problems: 5 in level 3, 5 in level 4. What is drawn there is mostly chance." in page


# --- numbers --------------------------------------------------------------------------------------------------------


def group_of(*samples, problem="p", level=None):
    """A group of (right, tokens); right None: undecided."""
    rollouts = []
    for right, tokens in samples:
        verdict = (
            Verdict.undecided(JudgeFailure.CRASH)
            if right is None
            else Verdict(Outcome.RIGHT if right else Outcome.WRONG)
        )
        rollouts.append(Rollout(Completion("x", (0,) * tokens, (0.0,) * tokens, FinishReason.STOP), verdict))
    return RolloutGroup(Problem(problem, (TextPart("?"),), "1", level=level), (1,), tuple(rollouts))


def test_accuracy_under_a_budget():
    assert accuracy_under([group_of((True, 10), (True, 30))], [9, 10, 29, 30]) == [0, 0.5, 0.5, 1]
    # Undecided samples leave the average; a problem without a decided one leaves it too.
    groups = [group_of((True, 5), (None, 1), problem="a"), group_of((None, 1), problem="b")]
    assert accuracy_under(groups, [4, 5]) == [0, 1]


def test_accuracy_under_a_budget_is_that_of_the_budget_curve(arms):
    budgets = [3, 20, 70, 90]
    for arm in arms:
        curve = truncated_accuracy(arm.groups, budgets)
        assert accuracy_under(arm.groups, budgets) == pytest.approx([point.accuracy.value for point in curve.points])


def test_plot_budgets():
    assert plot_budgets(1, 64, 4) == [1, 4, 16, 64]
    assert plot_budgets(0, 3) == [1, 2, 3]
    assert plot_budgets(5, 5) == [5]
    assert len(plot_budgets(16, 32_768)) == report_data.BUDGETS


def test_length_bins():
    assert length_bins([[3, 9]], 6, 4) == [0, 5, 10]
    assert [round_width(width) for width in (0.3, 1, 1.1, 13, 21, 100)] == [1, 1, 2, 20, 50, 100]
    wide = length_bins([[8, 9, 12], [4000, 8000]], 9)
    assert wide[0] == 8 and wide[-1] > 8000
    assert sum(edge < 100 for edge in wide) > 12  # in equal bins all brief ones would be in the first
    assert histogram([0, 2, 3], [0, 3, 6]) == [2, 1]


@given(st.lists(st.lists(st.integers(0, 40_000), min_size=1), min_size=1, max_size=4), st.integers(0, 4_000))
def test_every_length_has_a_bin(lengths, brief):
    edges = length_bins(lengths, brief)
    assert edges == sorted(set(edges))
    assert len(edges) <= report_data.BINS + 3
    for own in lengths:
        assert sum(histogram(own, edges)) == len(own)


def test_difficulty_is_the_level_or_how_often_the_parent_is_right():
    groups = [group_of((True, 1), problem=str(level), level=level) for level in (3, 1, 2)]
    arm = make_arm("a", 1.0, 5)
    found = difficulty_of([replace(arm, groups=tuple(groups))], "a")
    assert (found.by, found.labels, found.of_parent) == ("level", ("1", "2", "3"), False)
    assert found.bin_of == {"1": 0, "2": 1, "3": 2}
    # One level is none. 2 of 3 and 1 of 3 are both in the middle; an undecided sample is no sample.
    rows = {"all": (1, 1, 1), "most": (1, 1, 0), "few": (1, 0, 0), "none": (0, None, 0), "unknown": (None, None, None)}
    made = [
        group_of(*((None if one is None else bool(one), 9) for one in row), problem=name, level=7)
        for name, row in rows.items()
    ]
    found = difficulty_of([replace(arm, groups=tuple(made))], "a")
    assert (found.by, found.of_parent) == ("how often a is right", True)
    assert found.labels == ("always right", "a third to two thirds", "never right")
    assert found.bin_of == {"all": 0, "most": 1, "few": 1, "none": 2}
    bins = report_data.by_difficulty(made, found)
    assert [None if one is None else one[0] for one in bins] == [1, 0.5, 0]
    assert report_data.by_difficulty(made[:1], found)[1:] == [None, None]


def test_level_ranges_hold_about_as_many_problems_each():
    assert level_ranges([1, 1, 2, 3]) == [(1, 1), (2, 2), (3, 3)]
    assert level_ranges([1, 1, 2, 3], most=2) == [(1, 1), (2, 3)]
    ranges = level_ranges(list(range(100)))
    assert (len(ranges), ranges[0], ranges[-1]) == (10, (0, 9), (90, 99))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=200), st.integers(1, 12))
def test_every_level_is_in_one_range(levels, most):
    ranges = level_ranges(levels, most)
    assert len(ranges) <= most
    for level in levels:
        assert sum(low <= level <= high for low, high in ranges) == 1


def test_long_training_curves_are_thinned():
    assert thinned([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    curve = report.TrainingCurve(
        "a", tuple({"step": i, "reward": float(i), "tokens_mean": float("nan")} for i in range(9_999))
    )
    (panel,) = training_panels([curve], [])
    line = panel["lines"][0]
    assert (len(line["x"]), line["x"][0], line["x"][-1]) == (report_data.CURVE_POINTS, 0, 9_998)


def test_titles_of_columns():
    heads = [("tokens", "median"), ("tokens per", "right answer"), ("trun-", "cated"), ("AES", "")]
    said = [head_of(Column(head, unit, lambda row: "")) for head, unit in heads]
    assert said == ["tokens, median", "tokens per right answer", "truncated", "AES"]


def test_columns_are_in_blocks_that_fit(arms):
    found = frontier(arms, "teacher")
    columns = table_columns(found)[1:]
    parts = report.blocks(columns, found.rows)
    assert [column for part in parts for column in part] == list(columns)
    assert 2 <= len(parts) <= 4
    assert [column.head for column in parts[0]][:4] == ["accuracy", "tokens", "Δ accuracy", "Δ tokens"]
    assert [len(part) for part in report.blocks(columns, found.rows, width=1)] == [1] * len(columns)


# --- the problems ---------------------------------------------------------------------------------------------------


def test_problems_are_left_out_evenly_where_the_page_would_be_too_large(arms):
    assert evenly_within([10, 10, 10, 10], 25) == [1, 3]
    assert evenly_within([10, 10, 10, 10], 40) == [0, 1, 2, 3]
    assert evenly_within([100], 25) == []
    everything = examples(arms, {})
    assert (len(everything.rows), everything.problems, everything.samples) == (30, 30, 2)
    size = len(json_text(everything.rows).encode())
    some = examples(arms, {}, size * 9 // 10)
    assert 24 <= len(some.rows) < 30
    assert len(json_text(some.rows).encode()) <= size * 9 // 10
    assert some == examples(arms, {}, size * 9 // 10)
    few = examples(arms, {}, size // 3)  # too few problems with both samples: the first of each
    assert (few.samples, few.all_samples) == (1, 2)
    assert len(examples(arms, {}, 1).rows) == 1
    page = report.render_page(frontier(arms, "teacher"), arms, title="t", example_bytes=size * 9 // 10)
    assert f"{len(some.rows)} of 30 problems, evenly over the test set" in page
    page = report.render_page(frontier(arms, "teacher"), arms, title="t", example_bytes=size // 3)
    assert "The first 1 of 2 samples of each." in page


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 3_000))
def test_what_is_kept_fits_and_is_in_order(sizes, limit):
    kept = evenly_within(sizes, limit)
    assert kept == sorted(set(kept))
    assert sum(sizes[index] for index in kept) <= limit
    if sum(sizes) <= limit:
        assert len(kept) == len(sizes)


def test_a_row_has_every_arm_in_order_of_the_first(arms):
    turned = replace(arms[1], groups=arms[1].groups[::-1])
    assert examples([arms[0], turned], {"p0": 3}) == examples(arms[:2], {"p0": 3})
    row = examples(arms[:2], {"p0": 3}).rows[0]
    assert (row["id"], row["level"], row["bin"], row["answer"]) == ("p0", 2, 3, "02")
    rollout = arms[1].groups[0].rollouts[1]
    assert row["samples"][1][1][:2] == [0 if rollout.right else 1, rollout.num_tokens]


def test_a_page_of_twenty_arms_and_ten_thousand_completions_is_small_enough():
    """Measured: 10.2 MB with 430 characters a completion. The limit is 15 MB."""
    text = "so we add 07 + 15 and carry; <think> wait: " * 10
    one = make_arm("arm-0", 0.5, 40, (text,), problems=125, samples=4)
    arms = [replace(one, name=f"arm-{number}") for number in range(20)]
    page = report.render_page(frontier(arms, "arm-0"), arms, title="large")
    assert "All 125 problems." in page
    assert 9_000_000 < len(page.encode()) < 12_000_000
    # Texts twenty times as long change only how many problems are shown.
    groups = tuple(with_text(group, text * 20) for group in one.groups)
    some = examples([replace(one, groups=groups)] * 20, {})
    assert (len(some.rows), some.samples, some.problems) == (40, 1, 125)
    assert len(json_text(some.to_json()).encode()) < BYTES + 1_000
    assert len(plotly_js().encode()) + BYTES < 13_000_000  # the rest is table and numbers: 60 kB here


def with_text(group, text):
    rollouts = (replace(one, completion=replace(one.completion, text=text)) for one in group.rollouts)
    return replace(group, rollouts=tuple(rollouts))


# --- text -----------------------------------------------------------------------------------------------------------


@given(st.text(max_size=200))
def test_visible_text_has_nothing_hidden_and_is_utf8(text):
    shown = visible(text)
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", shown
    )
    shown.encode("utf-8")
    assert visible(shown) == shown


@given(st.text(max_size=200))
def test_json_in_the_page_is_the_value_and_has_no_tag(text):
    shown = json_text({"text": text})
    assert json.loads(shown) == {"text": text}
    assert not re.search("[<>&\u2028\u2029]", shown)


def test_texts():
    assert visible("a\u202eb\tc\n\u200d") == "a⟨U+202E⟩b\tc\n\u200d"
    assert json_text({"a": "</script>"}) == '{"a":"\\u003c/script\\u003e"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text(float("nan"))
    assert shortened("x" * 8, 8) == "x" * 8
    assert shortened("abcdefghij", 8) == "abcdef\n[… 2 characters left out …]\nij"
    assert typeset("[-1.5%, 2%] merge-50") == "[−1.5%, 2%] merge-50"
    assert [report.duration(s) for s in (3.2, 171.3, 4000)] == ["3.2 s", "2 min 51 s", "1 h 06 min"]
