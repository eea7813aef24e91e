"""The benchmark of search quality: landscapes are what they say, and methods run through the real search."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_tables import table_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from quality.curves import Step, items_to_reach  # noqa: E402
from quality.landscapes import Analytic, Table, load, names, quality  # noqa: E402
from quality.methods import METHODS, PEER, chosen  # noqa: E402
from quality.peer_cma import SIGMA, PeerCma  # noqa: E402
from quality.reports import markdown, rows, write  # noqa: E402
from quality.runs import Curve, models_for, search, table_config, table_curve  # noqa: E402
from quality.target import Target, peer_target  # noqa: E402

from search.genome import Gene  # noqa: E402
from search.nevergrad_box import import_cma  # noqa: E402
from search.optimizer import Problem  # noqa: E402
from search.store.run_folder import RunFolder  # noqa: E402

TABLES = sorted((ROOT / "results" / "reference" / "tables").glob("*.parquet"))
PAGES = sorted((ROOT / "results" / "reference").glob("search_quality_*.md"))


def quadratic_table(seed: int = 0) -> tuple[Table, np.ndarray]:
    """A table of scores that are exact quadratics of the point, and their optima, one per item."""
    random = np.random.default_rng(seed)
    points, optima = random.uniform(-1, 1, (60, 4)), random.uniform(-0.5, 0.5, (20, 4))
    values = ((points[:, None] - optima) ** 2).sum(2).astype(np.float32)
    return Table(2, ("a", "b"), -1.0, 1.0, "nll", points, {"t": {"search": values, "certify": values}}), optima


def test_a_table_of_quadratics_is_right_between_its_points() -> None:
    table, optima = quadratic_table()
    for point in np.random.default_rng(1).uniform(-1, 1, (20, 4)):
        np.testing.assert_allclose(table.scores("t", "search", point), ((point - optima) ** 2).sum(1), atol=1e-3)
    error, spread = table.left_out_errors()
    assert error < 1e-3 < 0.1 < spread


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table, _ = quadratic_table()
    table.write(tmp_path / "t.parquet")
    again = load(str(tmp_path / "t.parquet"))
    assert (again.groups, again.sources, again.tasks) == (2, ("a", "b"), table.tasks)
    point = np.array([0.1, -0.2, 0.3, 0.4])
    np.testing.assert_allclose(again.scores("t", "certify", point), table.scores("t", "certify", point), atol=5e-3)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_committed_tables_explain_points_they_have_not_seen(path: Path) -> None:
    table = Table.read(path)
    error, spread = table.left_out_errors()
    assert error < 0.25 * spread
    assert path.stat().st_size < 2_000_000


@pytest.mark.parametrize("formula", ["bowl", "valley", "answers"])
def test_formulas_are_better_near_their_middle_than_at_the_corners(formula: str) -> None:
    landscape = Analytic(formula, 2)
    middle = np.full(len(names(landscape)), 0.42)
    assert quality(landscape, middle) < min(quality(landscape, np.full(len(middle), end)) for end in (-0.2, 1.4))


def test_the_peer_asks_what_pycma_asks_from_one_over_n_with_a_sixth() -> None:
    genes = tuple(Gene(f"g{i}", -0.2, 1.4, 1 / 3) for i in range(5))
    peer = PeerCma(Problem(np.zeros(5), 50, 1, 7, 0.1, genes))
    randn = np.random.RandomState(7).randn
    reference = import_cma().CMAEvolutionStrategy([1 / 3] * 5, SIGMA, {"seed": np.nan, "randn": randn, "verbose": -9})
    assert reference.popsize == 4 + int(3 * np.log(5))
    for _ in range(4):
        asked = reference.ask()
        told = [float(((x - 0.5) ** 2).sum()) for x in asked]
        for weights, loss in zip(asked, told, strict=True):
            point = peer.ask()
            np.testing.assert_allclose(-0.2 + 1.6 * point, weights.clip(-0.2, 1.4), atol=1e-12)
            peer.tell(point, loss)
        reference.tell(asked, told)


def test_a_target_is_reached_when_it_is_not_left_again() -> None:
    steps = [Step(10, 0), Step(20, 1), Step(30, 2), Step(40, 3)]
    worth = {0: 3.0, 1: 1.0, 2: 2.0, 3: 0.5}
    assert items_to_reach(steps, worth.__getitem__, 1.0) == 40
    assert items_to_reach(steps, worth.__getitem__, 2.0) == 20
    assert items_to_reach(steps, worth.__getitem__, 0.1) == np.inf


def some_curves() -> list[Curve]:
    """The peer, a quick method with two candidates in flight, and one that does not get there; of three seeds."""

    def curves(method: str, steps: list[Step], items: int, window: int) -> list[Curve]:
        return [Curve(method, s, steps, {0: 2.0, 1: 1.0}, items, 20, 1.0, genes=6, window=window) for s in range(3)]

    return [
        *curves(PEER, [Step(100, 0), Step(1000, 1)], 2000, 1),
        *curves("quick", [Step(50, 0), Step(100, 1)], 500, 2),
        *curves("slow", [Step(50, 0)], 500, 1),
    ]


def test_ratios_are_those_of_item_evaluations_to_the_peers_end() -> None:
    found = {row.method: row for row in rows("f", some_curves(), tolerance=0.0)}
    assert (found[PEER].ratio, found["quick"].ratio, found["slow"].ratio) == (1.0, 10.0, 0.0)
    assert (found["quick"].reached, found["slow"].reached) == (3, 0)


def test_the_target_is_what_the_peer_has_at_its_end_but_for_a_share_of_its_gain() -> None:
    assert peer_target(some_curves(), 0.25) == Target(quality=1.25, first=2.0)


def test_a_page_has_a_row_per_method_and_the_picture_beside_it(tmp_path: Path) -> None:
    text = markdown("x", rows("f", some_curves(), tolerance=0.0), "command", ["a note"], 0.0)
    _, quick, slow = table_rows(text)
    assert quick == {
        "family": "f",
        "method": "quick",
        "seeds": "3",
        "genes": "6",
        "in flight": "2",
        "reach it": "3",
        "items to target": "100",
        "ratio": "10.0",
        "final quality": "1.0000",
        "items in all": "500",
        "seconds": "1.0",
    }
    assert (slow["items to target"], slow["ratio"]) == ("not reached", "")
    assert "](x.svg)" in text
    write(tmp_path, "x", {"f": some_curves()}, 0.0, text)
    assert {path.name for path in tmp_path.iterdir()} == {"x.md", "x.parquet", "x.svg"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_committed_pages_have_the_peer_first_and_show_pictures_that_are_there(path: Path) -> None:
    text = path.read_text()
    found = table_rows(text)
    for family in {row["family"] for row in found}:
        assert next(row["method"] for row in found if row["family"] == family) == PEER
    assert all((path.parent / name).exists() for name in re.findall(r"!\[.*?\]\((.*?)\)", text))


def test_methods_run_through_the_real_search_and_find_better_merges(tmp_path: Path) -> None:
    def curve(name: str) -> Curve:
        (method,) = (method for method in METHODS if method.name == name)
        found = table_curve("bowl-1", method, 0, 40, tmp_path)
        assert isinstance(found, Curve), found
        return found

    peer, default = curve(PEER), curve("default")
    assert peer.items == (40 - 4) * 450  # parents and base are no candidates of its own
    assert default.candidates == 40
    assert {(peer.genes, peer.window), (default.genes, default.window)} == {(len(names(load("bowl-1"))), 1)}
    landscape = load("bowl-1")
    n_sources = len(landscape.sources)
    unsearched = [*np.eye(n_sources), np.zeros(n_sources), np.full(n_sources, 1 / n_sources)]
    assert default.final < min(quality(landscape, point) for point in unsearched), "parents, base and uniform soup"
    assert table_curve("bowl-1", chosen([PEER])[0], 0, 40, tmp_path).quality == peer.quality  # type: ignore[union-attr]


def test_a_search_that_was_run_is_taken_again_only_with_the_same_config(tmp_path: Path) -> None:
    landscape, (peer,) = load("bowl-1"), chosen([PEER])
    config = table_config("bowl-1", landscape, models_for("bowl-1", landscape, tmp_path / "models"), 8)
    certified = tmp_path / f"{PEER}-0.certified.json"

    def is_run(config: dict[str, Any]) -> bool:
        """Whether it is run now; what was known of an earlier one is then gone."""
        marks = [tmp_path / f"{PEER}-0" / "mark", certified]
        run = search(config, peer, 0, tmp_path)
        assert isinstance(run, RunFolder), run
        gone = [not mark.exists() for mark in marks]
        assert len(set(gone)) == 1
        for mark in marks:
            mark.touch()
        return gone[0]

    assert is_run(config)
    assert not is_run(config)
    assert is_run({**config, "objectives": {**config["objectives"], "normalize": "parents"}})
