"""long2short/pictures.py and charts.py: the frontier as PNG and SVG, and where ticks and labels go."""

from __future__ import annotations

import io
import itertools
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from long2short import charts, pictures
from long2short.frontier import frontier
from tests.report_world import make_arm


@pytest.fixture(scope="module")
def found():
    """`long` costs more tokens than `teacher` and is worse: dominated."""
    arms = [
        make_arm("teacher", 0.95, 80, label="grpo"),
        make_arm("brief", 0.7, 30, label="length_rl"),
        make_arm("guess", 0.3, 4, label="start"),
        make_arm("long", 0.4, 120, label="sft"),
    ]
    return frontier(arms, "teacher")


def test_colours_are_families_and_the_dominated_have_none(found):
    assert [row.non_dominated for row in found.rows] == [True, True, True, False]
    assert pictures.families(found) == {"grpo": 0, "length_rl": 1, "start": 2}
    assert [(point.joined, point.parent) for point in pictures.points_of(found)] == [
        (True, True),
        (True, False),
        (True, False),
        (False, False),
    ]


def test_the_png_is_a_picture_of_the_points(found):
    from matplotlib.image import imread

    data = pictures.draw_png(found, dpi=60)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data == pictures.draw_png(found, dpi=60)
    pixels = imread(io.BytesIO(data))
    assert pixels.shape[:2] == (312, 540)
    # Each family of the frontier is in the picture in its colour, the dominated arm in grey, no other colour of them.
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


def test_the_picture_without_javascript_greys_the_dominated(found):
    drawn = charts.scatter(pictures.points_of(found))
    assert drawn.count("--c:var(--grey)") == 1
    assert drawn.count('class="dot off"') == 1
    assert drawn.count('class="dot"') == 3
    assert drawn.count('class="ring"') == 1
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
