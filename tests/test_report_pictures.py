"""long2short/pictures.py and charts.py: the frontier as PNG and SVG, and where ticks and labels go."""

from __future__ import annotations

import io
import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from long2short import charts, pictures
from long2short.charts import Standing
from long2short.frontier import frontier
from long2short.report import asset
from tests.report_world import make_arm


@pytest.fixture(scope="module")
def found():
    """`long` costs more tokens than `teacher` and is worse: dominated. `near` is so within noise; `guess` collapsed."""
    arms = [
        make_arm("teacher", 0.95, 80, label="grpo"),
        make_arm("brief", 0.7, 30, label="length_rl"),
        make_arm("guess", 0.3, 4, label="start"),
        make_arm("long", 0.4, 120, label="sft"),
        make_arm("near", 0.9, 82, label="dpo"),
    ]
    return frontier(arms, "teacher")


def test_styles_are_families_and_grey_arms_have_none(found):
    assert [row.non_dominated for row in found.rows] == [True, True, True, False, False]
    points = pictures.points_of(found)
    assert [point.standing for point in points] == ["front", "front", "collapsed", "dominated", "noise"]
    assert [point.joined for point in points] == [True, True, False, False, False]
    assert [point.parent for point in points] == [True, False, False, False, False]
    assert [point.label for point in points] == ["teacher", "brief", "guess (collapsed)", "long", "near"]
    assert pictures.families(found) == {"grpo": 0, "length_rl": 1, "dpo": 2}
    assert [point.style for point in points if point.standing.coloured] == list(charts.STYLES[:3])
    assert [one for one, _ in pictures.meanings(found)] == list(Standing)


def test_sixteen_families_have_styles_of_their_own():
    for drawn in ("symbol", "marker", "dash"):
        pairs = {(style.colour, getattr(style, drawn)) for style in charts.STYLES}
        assert len(pairs) == len(charts.STYLES) == 16
    assert [style.colour for style in charts.STYLES] == 2 * list(range(8))
    assert charts._polygon(4, 0, 1.0) == "M1.00 0.00L0.00 1.00L-1.00 0.00L-0.00 -1.00Z"


# Machado, Oliveira and Fernandes 2009, whole severity: what is left of linear RGB without the red or the green cones.
BLIND = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
}
RGB_TO_XYZ = np.array(
    ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.072175), (0.0193339, 0.119192, 0.9503041))
)


def linear(colours):
    values = np.array([[int(one[i : i + 2], 16) for i in (1, 3, 5)] for one in colours]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    ratio = rgb @ RGB_TO_XYZ.T / RGB_TO_XYZ.sum(axis=1)
    root = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], axis=1)


def themes():
    """The eight colours and the paper of the light and of the dark page."""
    light, dark = asset("report.css").split("prefers-color-scheme: dark", 1)
    return [(re.findall(r"--c\d: (#\w{6})", part), re.findall(r"--paper: (#\w+)", part)[0]) for part in (light, dark)]


def test_colours_stay_apart_for_the_colour_blind():
    """The ones before were 2.8 apart (light, protanopia) and 5.3 (dark, deuteranopia)."""
    assert themes()[0][0] == list(pictures.PALETTE)
    for colours, paper in themes():
        assert len(colours) == charts.COLOURS
        for matrix in (*BLIND.values(), np.eye(3)):
            seen = lab(np.clip(linear(colours) @ np.array(matrix).T, 0, 1))
            apart = np.linalg.norm(seen[:, None] - seen[None], axis=2)
            assert apart[np.triu_indices(len(colours), 1)].min() > 23
        light, background = (
            linear(colours) @ RGB_TO_XYZ[1],
            linear([{"#fff": "#ffffff"}.get(paper, paper)]) @ RGB_TO_XYZ[1],
        )
        contrast = (np.maximum(light, background) + 0.05) / (np.minimum(light, background) + 0.05)
        assert contrast.min() > 3  # WCAG's least for graphics


def test_titles_are_wrapped_between_their_parts():
    assert pictures.wrapped(["ab", "cd", "e"], 8) == ["ab    cd", "e"]
    assert pictures.wrapped(["a" * 9], 8) == ["a" * 9]


def test_the_png_is_a_picture_of_the_points(found):
    from matplotlib.image import imread

    data = pictures.draw_png(found, dpi=60)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data == pictures.draw_png(found, dpi=60)
    pixels = imread(io.BytesIO(data))
    assert pixels.shape[:2] == (312, 540)
    # Each family in colour is in the picture, the dominated and the collapsed arm in grey, no other colour of them.
    for colour, there in [
        *((c, True) for c in pictures.PALETTE[:3]),
        (pictures.GREY, True),
        (pictures.PALETTE[3], False),
    ]:
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        near = int((abs(pixels[:, :, :3] - wanted).max(axis=2) < 0.02).sum())
        assert (near > 10) == there, colour


def test_the_svg_is_the_same_picture(found):
    data = pictures.draw_svg(found)
    assert data == pictures.draw_svg(found)
    root = ET.fromstring(data)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = data.decode()
    for colour in (*pictures.PALETTE[:3], pictures.GREY):
        assert colour in text
    assert pictures.PALETTE[3] not in text
    assert "<script" not in text


def test_names_are_no_formulas_and_no_tags():
    strange = "a$b_{c}$ --> <b>"
    found = frontier([make_arm("teacher", 0.8, 80), make_arm(strange, 0.7, 30)], "teacher")
    assert pictures.draw_png(found, dpi=40)[:4] == b"\x89PNG"
    ET.fromstring(pictures.draw_svg(found))
    assert "a$b_{c}$ --&gt; &lt;b&gt;" in charts.scatter(pictures.points_of(found))


def test_the_picture_without_javascript_greys_the_dominated_and_crosses_the_collapsed(found):
    drawn = charts.scatter(pictures.points_of(found))
    assert drawn.count("--c:var(--grey)") == 2
    for standing, count in (("front", 2), ("noise", 1), ("dominated", 1), ("collapsed", 1)):
        assert drawn.count(f'class="dot {standing}"') == count
    assert drawn.count(f'd="{charts.CROSS}"') == 1
    assert ">guess (collapsed)</text>" in drawn
    assert drawn.count('class="ring"') == 1
    (path,) = re.findall(r'class="path" points="([^"]*)"', drawn)
    assert len(path.split()) == 2  # teacher and brief
    ET.fromstring(charts.key(charts.STYLES[1], Standing.NOISE))
    ET.fromstring(drawn)


def test_ticks_and_scales():
    assert charts.ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert charts.tick_texts([0.9, 0.95]) == ["0.90", "0.95"]
    assert charts.tick_texts([0, 1500]) == ["0", "1,500"]
    assert charts.Scale(0, 10, 100, 200)(5) == 150


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 12))
def test_ticks_lie_within_and_are_few(low, size, most):
    found = charts.ticks(low, low + size, most)
    assert 1 <= len(found) <= most + 1
    assert all(low - 1e-6 * size <= tick <= low + size * (1 + 1e-6) for tick in found)


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
