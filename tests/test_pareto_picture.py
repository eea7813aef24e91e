"""The picture of a front shows every point, and nothing else is taken for one."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.pareto.drawing import ticks
from search.pareto.front import Front, FrontPoint
from search.pareto.svg import HEIGHT, WIDTH, front_svg

SVG = "{http://www.w3.org/2000/svg}"


def front(values: list[tuple[float, ...]]) -> Front:
    names = tuple(f"m{k}" for k in range(len(values[0])))
    points = [FrontPoint(k, "search", v, dict(zip(names, v, strict=True))) for k, v in enumerate(values)]
    return Front("search", names, tuple(points))


def shapes(document: str) -> int:
    """Marks of points, those of the legend included."""
    tree = ElementTree.fromstring(document)
    triangles = [p for p in tree.iter(f"{SVG}path") if p.get("fill")]
    squares = [r for r in tree.iter(f"{SVG}rect") if r.get("width") == "8"]
    circles = [c for c in tree.iter(f"{SVG}circle") if c.get("r") == "4.5"]
    return len(triangles) + len(squares) + len(circles)


number = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 3).flatmap(lambda n: st.lists(st.tuples(*[number] * n), min_size=1, max_size=30)))
def test_every_point_is_drawn_once_and_inside_the_picture(values: list[tuple[float, ...]]) -> None:
    document = front_svg(front(values), title="a <b> & c")
    tree = ElementTree.fromstring(document)
    kinds = 0 if len(values[0]) == 2 else len([t for t in tree.iter(f"{SVG}text") if (t.text or "").endswith(")")])
    assert shapes(document) == len(values) + kinds
    for circle in tree.iter(f"{SVG}circle"):
        assert 0 < float(circle.get("cx", "nan")) < WIDTH
        assert 0 < float(circle.get("cy", "nan")) < HEIGHT


def test_the_legend_counts_the_points_of_every_size_and_marks_carry_their_labels() -> None:
    document = front_svg(front([(1.0, 3.0, 4.0), (2.0, 2.0, 4.0), (3.0, 3.5, 2.0)]), marked={1: "knee"})
    texts = [text.text for text in ElementTree.fromstring(document).iter(f"{SVG}text")]
    assert {"2 (1)", "4 (2)", "knee", "m0", "m1", "m2"} <= set(texts)


def test_other_points_far_from_the_front_are_left_out() -> None:
    near, far = ((1.5, 2.5), (1.5, 90.0))
    others = [FrontPoint(9, "search", v, {"m0": v[0], "m1": v[1]}) for v in (near, far)]
    document = front_svg(front([(1.0, 3.0), (2.0, 2.0)]), others=others)
    assert document.count('r="2"') == 1


@pytest.mark.parametrize("values", [[(1.0,)], [(1.0, 2.0, 3.0, 4.0)]])
def test_what_has_no_two_or_three_terms_cannot_be_drawn(values: list[tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match="needs 2 or 3 terms"):
        front_svg(front(values))


@pytest.mark.parametrize(
    ("low", "high", "wanted"), [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3.6, 4.7, [3.6, 4.0, 4.6])]
)
def test_ticks_are_round_numbers_inside(low: float, high: float, wanted: list[float]) -> None:
    found = ticks(low, high)
    assert set(wanted) <= set(found)
    assert all(low <= value <= high for value in found)
