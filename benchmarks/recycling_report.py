"""What the losses of the recycling study say: steps and seconds until a target, as rows and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def steps_to(losses: Sequence[float], target: float, every: int) -> float | None:
    """Steps until the loss, known every `every` steps, first is at most the target; a straight line in between."""
    for index, loss in enumerate(losses):
        if loss <= target:
            if index == 0:
                return 0.0
            before = losses[index - 1]
            return every * (index - 1 + (before - target) / (before - loss))
    return None


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """`mean ± standard deviation`; without the latter where there is one value."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table_rows(
    cells: list[dict[str, Any]], names: Sequence[str], scratch: str, donor: str, every: int
) -> list[dict[str, Any]]:
    """One row per model and seed, compared with `scratch` of the same seed.

    Columns: steps and CPU seconds until the final loss of `scratch`, as they are and as a share of what `scratch`
    needs; `with_donor_ratio` counts the CPU seconds of the donor's training too (those of `donor`; of a GPT-2 half).
    """
    by_key = {(cell["seed"], cell["model"]): cell for cell in cells}
    rows = []
    for name in names:
        for seed in sorted({cell["seed"] for cell in cells}):
            cell, base, giver = (by_key.get((seed, key)) for key in (name, scratch, donor))
            if cell is None or base is None or giver is None:
                continue
            planned = every * (len(cell["losses"]) - 1)
            target = base["losses"][-1]
            base_steps = steps_to(base["losses"], target, every) or planned
            base_seconds = base["seconds"] * base_steps / planned
            steps = steps_to(cell["losses"], target, every)
            seconds = None if steps is None else cell["seconds"] * steps / planned
            given = giver["seconds"] * (1.0 if donor == "BERT" else 0.5)
            rows.append(
                {
                    "seed": seed,
                    "model": name,
                    "parameters": cell["parameters"],
                    "scratch": scratch,
                    "target_loss": target,
                    "first_loss": cell["losses"][0],
                    "loss_100": cell["losses"][min(100 // every, len(cell["losses"]) - 1)],
                    "final_loss": cell["losses"][-1],
                    "steps": planned,
                    "steps_to_target": steps,
                    "steps_ratio": None if steps is None else steps / base_steps,
                    "cpu_seconds": cell["seconds"],
                    "seconds_to_target": seconds,
                    "seconds_ratio": None if seconds is None else seconds / base_seconds,
                    "with_donor_ratio": None
                    if seconds is None
                    else (seconds + (0.0 if "scratch" in name else given)) / base_seconds,
                    "losses": cell["losses"],
                }
            )
    return rows


def markdown_table(rows: list[dict[str, Any]]) -> list[str]:
    """Mean and standard deviation over the seeds; a ratio is left out where a seed did not get there."""
    lines = [
        "| start | parameters | loss at 0 | at 100 | final | steps to target | / scratch | CPU s to target | / scratch "
        "| / scratch, donor counted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        cells = [name, f"{mine[0]['parameters']:,}"]
        cells += [mean_and_spread([row[key] for row in mine], 3) for key in ("first_loss", "loss_100", "final_loss")]
        for key, digits in (
            ("steps_to_target", 0),
            ("steps_ratio", 2),
            ("seconds_to_target", 1),
            ("seconds_ratio", 2),
            ("with_donor_ratio", 2),
        ):
            values = [row[key] for row in mine if row[key] is not None]
            missed = len(mine) - len(values)
            text = mean_and_spread(values, digits) if values else "not reached"
            cells.append(text + (f" ({missed} of {len(mine)} not reached)" if values and missed else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def reading(rows: list[dict[str, Any]], scratch: str) -> list[str]:
    """What the rows say, strongest first: steps saved to the target, clear where beyond twice the spread."""
    found: list[tuple[float, str]] = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        ratios = [row["steps_ratio"] for row in mine if row["steps_ratio"] is not None]
        if name == scratch:
            continue
        if len(ratios) < len(mine):
            text = f"target not reached in {len(mine) - len(ratios)} of {len(mine)} runs: no gain"
            found.append((-1.0, f"- {name}: {text}."))
            continue
        mean = 1 - statistics.mean(ratios)
        spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
        clear = "" if abs(mean) > 2 * spread else "; within twice the spread, so no clear effect"
        verb = "saved" if mean >= 0 else "more than from nothing"
        found.append((mean, f"- {name}: {100 * abs(mean):.0f} % ± {100 * spread:.0f} of the steps {verb}{clear}."))
    return [text for _, text in sorted(found, key=lambda entry: -entry[0])]
