"""`meiosis plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meiosis.cli.common import debug_option, json_option, note, out, print_json
from meiosis.cli.memory import as_data, lines, memory_plan

if TYPE_CHECKING:
    from search.memory import MemoryPlan
    from search.setup import Setup

_MIB = 2**20


@click.command("plan", epilog="Example: meiosis plan samples/text/search.yaml")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a value of the config.")
@json_option
@debug_option
def command(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check CONFIG, its models, data and plug-ins; print genome, memory and cost. Spends nothing."""
    from search.config import load_config
    from search.setup import check

    setup = check(load_config(config, overrides), report=note)
    memory = memory_plan(setup)
    plan = _plan(setup, memory)
    if as_json:
        print_json(plan)
    else:
        _show(setup, plan, memory)
    if setup.config.cluster.check_memory:
        memory.require()


def _plan(setup: Setup, memory: MemoryPlan) -> dict[str, Any]:
    from evaluators.base import ITEM_POOLS

    config = setup.config
    items = {
        name: {pool: len(evaluator.items(pool)) for pool in ITEM_POOLS} for name, evaluator in setup.evaluators.items()
    }
    return {
        "config": config.name,
        "models": {
            name: {
                "path": ref.path,
                "kind": setup.checkpoints[name].kind,
                "sha256": ref.sha256,
                "bytes": setup.checkpoints[name].nbytes,
            }
            for name, ref in setup.models.items()
        },
        "operator": setup.space.operator,
        "groups": len(setup.space.groups),
        "genes": [
            {"name": gene.name, "low": gene.low, "high": gene.high, "initial": gene.initial}
            for gene in setup.space.genes
        ],
        "optimizer": config.search.optimizer.name,
        "device": setup.device,
        "memory_bytes": as_data(memory),
        "cost": {
            "candidates": config.search.budget,
            "limits": config.search.limits.model_dump(mode="json", exclude_none=True),
            "workers": config.cluster.workers,
            "items": items,
            "item evaluations": config.search.budget * sum(pools["search"] for pools in items.values()),
        },
    }


def _show(setup: Setup, plan: dict[str, Any], memory: MemoryPlan) -> None:
    from rich.table import Table

    console = out()
    models = Table(title="Models", title_justify="left")
    for column in ("name", "checkpoint", "MiB", "sha256"):
        models.add_column(column, overflow="fold")
    for name, model in plan["models"].items():
        kind = " (LoRA adapter, applied to the base on the fly)" if model["kind"] == "adapter" else ""
        models.add_row(name, model["path"] + kind, f"{model['bytes'] / _MIB:.1f}", str(model["sha256"])[:16])
    console.print(models)
    genome = Table(title=f"Genome: {len(plan['genes'])} genes over {plan['groups']} groups", title_justify="left")
    for column in ("group", "tensors", "genes", "from", "to", "start"):
        genome.add_column(column)
    for group in setup.space.groups:
        genes = [gene for gene in setup.space.genes if gene.name.startswith(group.name + "/")]
        genome.add_row(
            group.name,
            str(len(group.tensors)),
            ", ".join(gene.name.partition("/")[2] for gene in genes),
            *(_spread([getattr(gene, part) for gene in genes]) for part in ("low", "high", "initial")),
        )
    console.print(genome)
    cost = plan["cost"]
    console.print(f"Operator {plan['operator']}, optimizer {plan['optimizer']}. Workers run on: {plan['device']}.")
    for line in lines(memory, setup.config.cluster.shards):
        console.print(line, soft_wrap=True)
    for name, pools in cost["items"].items():
        console.print(f"Evaluator {name}: " + ", ".join(f"{count} {pool} items" for pool, count in pools.items()) + ".")
    if cost["limits"]:
        limits = ", ".join(f"{name} {limit}" for name, limit in cost["limits"].items())
        console.print(f"Limits, of which the first that is reached ends the search: {limits}.", soft_wrap=True)
    at_most = "at most " if setup.config.search.fitness.racing else ""
    console.print(
        f"Cost: {cost['candidates']} candidates, {at_most}{cost['item evaluations']:,} item evaluations on the search "
        "items. "
        f"{'The config is sound' if memory.fits else 'It does not fit'}; nothing was spent.",
        soft_wrap=True,
    )


def _spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
