"""The picture of the benchmark of search quality shows the medians of the curves, and where the target is."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from quality.curves import Step  # noqa: E402
from quality.methods import METHODS, PEER  # noqa: E402
from quality.picture import curves_svg  # noqa: E402
from quality.runs import Curve  # noqa: E402
from quality.target import peer_target  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"


def curve(method: str, seed: int, steps: dict[int, float], items: int) -> Curve:
    """A search whose best known candidate is worth `steps[i]` from i item-evaluations on."""
    places = [Step(place, candidate) for candidate, place in enumerate(steps)]
    return Curve(method, seed, places, dict(enumerate(steps.values())), items, len(steps), 1.0, 4, 1)


def some_curves(seed: int, methods: Sequence[str], n_seeds: int = 5) -> list[Curve]:
    """Searches that get better with noise; the peer begins at 3."""
    random = np.random.default_rng(seed)
    found = []
    for method in methods:
        for number in range(n_seeds):
            places = np.unique(np.geomspace(100, 20_000, 30).astype(int) + random.integers(0, 50, 30))
            worth = 2 + np.geomspace(1, 0.01, len(places)) + random.normal(0, 0.02, len(places))
            worth[0] = 3.0 if method == PEER else 3.5
            found.append(curve(method, number, dict(zip(places.tolist(), worth.tolist(), strict=True)), 25_000))
    return found


def panels(document: str) -> dict[str, ElementTree.Element]:
    tree = ElementTree.fromstring(document)
    return {group.get("aria-label", ""): group for group in tree.iter(f"{SVG}g") if group.get("aria-label")}


def lines(panel: ElementTree.Element, kind: str = "median") -> dict[str, str]:
    """Method -> path; a target or a band has no name."""
    return {
        path.findtext(f"{SVG}title", str(number)): path.get("d", "")
        for number, path in enumerate(panel.iter(f"{SVG}path"))
        if path.get("class") == kind
    }


def labels(panel: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in panel.iter(f"{SVG}text")]


def scale(panel: ElementTree.Element, anchor: str, place: str) -> Callable[[float], float]:
    """Value -> pixels, by the first and the last number of an axis; on that of items the values are logarithms."""
    found = []
    for text in panel.iter(f"{SVG}text"):
        if text.get("text-anchor") == anchor and re.fullmatch(r"[\d.,]+", text.text or ""):
            value = float((text.text or "").replace(",", ""))
            found.append((math.log10(value) if place == "x" else value, float(text.get(place, "nan"))))
    (low, begin), (high, end) = found[0], found[-1]
    # The numbers of the upright axis stand 4 pixels below their lines.
    return lambda value: begin + (value - low) / (high - low) * (end - begin) - (4 if place == "y" else 0)


def height_at(path: str, x: float) -> float:
    """The height of a line of steps; x must not be where it steps."""
    here, *parts = re.findall(r"[MHV][-\d. ]+", path)
    at_x, y = map(float, here[1:].split())
    assert at_x <= x
    for part in parts:
        if part[0] == "V":
            y = float(part[1:])
        elif (at_x := float(part[1:])) >= x:
            return y
    raise AssertionError(f"the line ends at {at_x}, before {x}")


def brute_force_median(curves: Sequence[Curve], items: float) -> float:
    values = []
    for one in curves:
        for step in one.steps:
            if step.items <= items:
                value = one.quality[step.candidate]
        values.append(value)
    return float(np.median(values))


def test_there_is_a_panel_per_family_and_a_line_with_a_label_per_method_and_every_family_has_its_target() -> None:
    curves = {"a <b> & c": some_curves(0, [PEER, "one", "two"]), "d": some_curves(1, [PEER, "two"])}
    found = panels(curves_svg({**curves, "nothing was run": []}, 0.02))
    assert {family: list(lines(panel)) for family, panel in found.items()} == {
        "a <b> & c": [PEER, "one", "two"],
        "d": [PEER, "two"],
    }
    for family, panel in found.items():
        target = peer_target(curves[family], 0.02).quality
        assert {family, *lines(panel), f"target: {target:.4f}"} <= set(labels(panel))
        assert len(lines(panel, "band")) == len(lines(panel))
        (drawn,) = lines(panel, "target").values()
        assert float(drawn.split()[1].partition("H")[0]) == pytest.approx(scale(panel, "end", "y")(target), abs=0.2)


@pytest.mark.parametrize("n_seeds", [1, 4, 5])
def test_lines_are_medians_of_steps_that_hold_until_the_next_one(n_seeds: int) -> None:
    curves = some_curves(2, [PEER, "one"], n_seeds)
    (panel,) = panels(curves_svg({"f": curves}, 0.02)).values()
    x, y = scale(panel, "middle", "x"), scale(panel, "end", "y")
    for method, path in lines(panel).items():
        own = [one for one in curves if one.method == method]
        places = sorted({step.items for one in own for step in one.steps})
        begin = max(one.steps[0].items for one in own)
        compared = 0
        for place, following in zip(places, [*places[1:], 25_000], strict=True):
            middle = (place * following) ** 0.5
            # Steps that are nearer to each other than a picture resolves cannot be told apart.
            if place >= begin and x(math.log10(following)) - x(math.log10(place)) > 0.5:
                wanted = y(brute_force_median(own, middle))
                assert height_at(path, x(math.log10(middle))) == pytest.approx(wanted, abs=0.2)
                compared += 1
        assert compared > 20


def test_bands_go_from_the_lowest_seed_to_the_highest() -> None:
    worth = ({100: 3.0, 1000: 2.0}, {100: 2.9, 1000: 2.2}, {100: 2.5, 500: 2.4, 1000: 2.3})
    curves = [curve(PEER, seed, steps, 10_000) for seed, steps in enumerate(worth)]
    (panel,) = panels(curves_svg({"f": curves}, 0.0)).values()
    x, y = scale(panel, "middle", "x"), scale(panel, "end", "y")
    (path,) = lines(panel, "band").values()
    corners = [(100, 3.0), (1000, 2.3), (10_000, 2.3), (10_000, 2.0), (1000, 2.0), (1000, 2.4), (500, 2.4), (500, 2.5)]
    numbers = re.findall(r"[MHV][-\d. ]+", path)
    at, found = [0.0, 0.0], []
    for part in numbers:
        if part[0] == "M":
            at = [float(number) for number in part[1:].split()]
        else:
            at["HV".index(part[0])] = float(part[1:])
        found.append(tuple(at))
    for items, value in corners:
        assert any(np.allclose(place, (x(math.log10(items)), y(value)), atol=0.2) for place in found), (items, value)


def test_a_panel_ends_at_what_the_peer_has_at_first_and_says_what_is_above() -> None:
    peer = curve(PEER, 0, {100: 3.0, 1000: 2.0}, 10_000)
    bad, failed = curve("bad", 0, {100: 900.0}, 10_000), curve("failed", 0, {100: math.inf, 500: 2.5}, 10_000)
    (panel,) = panels(curves_svg({"f": [peer, bad, failed]}, 0.02)).values()
    (frame, *_) = panel.iter(f"{SVG}rect")
    top, bottom = float(frame.get("y", "nan")), float(frame.get("y", "nan")) + float(frame.get("height", "nan"))
    y = scale(panel, "end", "y")
    assert top < y(3.0) < top + 0.1 * (bottom - top)
    assert bottom > y(2.0) > bottom - 0.1 * (bottom - top)
    assert {"bad (above)", "failed"} <= set(labels(panel))
    (at,) = (float(group.get("y", "nan")) for group in panel.findall(f"{SVG}clipPath/{SVG}rect"))
    assert at == top, "what is above is cut off"


@pytest.mark.parametrize(
    "curves",
    [
        [curve(PEER, 0, {100: 2.0}, 100)],
        [curve(PEER, 0, {0: 2.0, 10: 3.0}, 50)],
        [curve(PEER, 0, {100: math.inf}, 1000)],
        [curve(PEER, 0, {100: math.inf}, 1000), curve("one", 0, {100: 1.0}, 1000)],
    ],
    ids=["one candidate", "nothing gained", "all failed", "the peer failed"],
)
def test_odd_curves_are_drawn_too(curves: list[Curve]) -> None:
    document = curves_svg({"f": curves}, 0.02)
    assert list(panels(document)) == ["f"]
    assert not re.search(r'[ "MHV](nan|inf)', document)


def test_all_methods_of_the_benchmark_look_different_and_their_labels_have_room() -> None:
    document = curves_svg({"f": some_curves(3, [method.name for method in METHODS])}, 0.02)
    (panel,) = panels(document).values()
    looks = {
        (path.get("stroke"), path.get("stroke-dasharray"))
        for path in panel.iter(f"{SVG}path")
        if path.get("class") == "median"
    }
    assert len(looks) == len(METHODS)
    (frame, *_) = panel.iter(f"{SVG}rect")
    right = float(frame.get("x", "nan")) + float(frame.get("width", "nan"))
    beside = [text for text in panel.iter(f"{SVG}text") if float(text.get("x", "0")) > right]
    heights = sorted(float(text.get("y", "nan")) for text in beside)
    assert min(np.diff(heights)) >= 16
    assert max(heights) <= float(frame.get("y", "nan")) + float(frame.get("height", "nan"))
    width = float(ElementTree.fromstring(document).get("width", "nan"))
    assert max(float(text.get("x", "nan")) + 7 * len(text.text or "") for text in beside) < width
