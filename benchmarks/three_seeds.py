"""The table of results/reference/three_seeds.md: the default search of the sample family, for several seeds.

    python benchmarks/three_seeds.py                     the family of seed 0, searched with seeds 0, 1, 2
    python benchmarks/three_seeds.py --families          for every seed its own family, trained anew

The certificates have all arms: standard merges that generation 0 lacks, random search with as many item-evaluations,
and a placebo. Everything in the table is read back from the runs' own verdicts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
MEIOSIS = str(Path(sys.executable).with_name("meiosis"))
REFERENCE = ROOT / "results" / "reference"


def search(seed: int, samples: Path, results: Path) -> dict[str, Any]:
    """The verdict of one search, as `meiosis search --json` prints it."""
    arms = [f"--set=certify.{name}=true" for name in ("standard", "random_search", "placebo")]
    settings = [f"--set=seed={seed}", f"--set=results={results}", *arms]
    config = str(samples / "search.yaml")
    command = [MEIOSIS, "search", config, "--run", f"seed-{seed}", "--json", *settings]
    run = results / f"seed-{seed}"
    if run.exists():  # a benchmark that was stopped goes on, like any search
        command = [MEIOSIS, "resume", str(run), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)["verdict"]
    if found["missing"]:
        sys.exit(f"{run} was begun without {', '.join(found['missing'])}; delete it")
    return found


def rows_of(seed: int, verdict: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "seed": seed,
            "model": "found merge" if row["candidate"] == verdict["winner"] else row["label"],
            "objective": row["value"],
            "low": row["low"],
            "high": row["high"],
            **row["metrics"],
            "winner_minus_this": row["difference"],
            "p_holm": row["p"],
        }
        for row in verdict["rows"]
    ]


def markdown(rows: list[dict[str, Any]], command: str, proven: dict[int, bool]) -> str:
    lines = [
        "# The sample family, three seeds",
        "",
        "Mean over the three domains of the loss per token (nats) on the certify items, smaller is better; 95 %",
        "intervals and p-values from the paired bootstrap over documents (10,000 draws), p corrected for the number",
        "of rows (Holm). Where a baseline has several settings, the one that is best on the select items stands",
        "here; of random search and of the placebo (the same search over random changes as large as those of the",
        "sources) it is the merge that they would have taken. Nothing was measured on a GPU.",
        "",
        f"Command: `{command}`",
        "",
        "| seed | model | objective | 95 % interval | python | english | cpp | winner minus this | p (Holm) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = "" if row["winner_minus_this"] is None else f"{row['winner_minus_this']:+.4f}"
        p = "" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
        domains = " | ".join(f"{row[f'{name}.nll']:.4f}" for name in ("python", "english", "cpp"))
        lines.append(
            f"| {row['seed']} | {row['model']} | {row['objective']:.4f} | {row['low']:.4f} to {row['high']:.4f} "
            f"| {domains} | {difference} | {p} |"
        )
    lines.append("")
    for seed, yes in proven.items():
        lines.append(f"Seed {seed}: the found merge {'beats' if yes else 'does not beat'} every row at p < 0.01.")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default=ROOT / "samples" / "text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", action="store_true", help="train a family for every seed")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    proven: dict[int, bool] = {}
    for seed in arguments.seeds:
        samples = arguments.samples.resolve()
        if arguments.families and seed:
            samples = samples.with_name(f"{samples.name}-{seed}")
            subprocess.run([MEIOSIS, "samples", "text", str(samples), "--seed", str(seed)], check=True)
        verdict = search(seed, samples, ROOT / "results" / f"three-seeds-{samples.name}")
        proven[seed] = verdict["proven"]
        rows += rows_of(seed, verdict)
        print(f"seed {seed}: proven {verdict['proven']}", flush=True)
    name = "three_families" if arguments.families else "three_seeds"
    command = "python benchmarks/three_seeds.py" + (" --families" if arguments.families else "")
    REFERENCE.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), REFERENCE / f"{name}.parquet")
    text = markdown(rows, command, proven)
    (REFERENCE / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
