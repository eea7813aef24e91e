"""`meiosis plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meiosis.cli.common import debug_option, json_option, note, out, print_json
from meiosis.cli.memory import as_data, lines, memory_plan

if TYPE_CHECKING:
    from rich.table import Table

    from search.memory import MemoryPlan
    from search.paths.genes import PathGenes
    from search.setup import Setup

_MIB = 2**20


@click.command("plan", epilog="Example: meiosis plan samples/text/search.yaml")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a value of the config.")
@json_option
@debug_option
def command(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check CONFIG, its models, data and plug-ins; print genome, memory and cost. Spends nothing."""
    from search.auto_optimizer import AUTO, best_for
    from search.config import load_config
    from search.setup import check

    loaded = load_config(config, overrides)
    setup = check(loaded, report=note)
    memory = memory_plan(setup)
    plan = _plan(setup, memory)
    if loaded.config.search.optimizer.name == AUTO:
        plan["optimizer_chosen"] = best_for(setup.space.genes, front=setup.objective.pareto)[1]
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
        "operator": config.space.operator,
        "groups": len(setup.space.groups),
        "genes": [
            {
                "name": gene.name,
                "kind": gene.kind,
                **({"choices": gene.choices} if gene.choices else {"low": gene.low, "high": gene.high}),
                "initial": gene.value(gene.coordinate(gene.initial)),
            }
            for gene in setup.space.genes
        ],
        **({"path": _path_facts(setup.space.path)} if setup.space.path is not None else {}),
        "optimizer": config.search.optimizer.name,
        "device": setup.device,
        "memory_bytes": as_data(memory),
        "cost": {
            "candidates": config.search.budget,
            "limits": config.search.limits.model_dump(mode="json", exclude_none=True),
            "workers": config.cluster.workers,
            "items": items,
            "item evaluations": config.search.budget * sum(pools["search"] for pools in items.values()),
            "compared with": list(config.certify.arms),
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
    over = f"{plan['groups']} groups" + (" and a path" if setup.space.path is not None else "")
    genome = Table(title=f"Genome: {len(plan['genes'])} genes over {over}", title_justify="left")
    for column in ("group", "tensors", "genes", "from", "to", "start"):
        genome.add_column(column)
    tensors = {group.name: len(group.tensors) for group in setup.space.groups}
    parameters = setup.space.parameters.genes
    everywhere = {gene.name.partition("/")[0]: sum(tensors.values()) for gene in parameters}
    for group, count in {**everywhere, **tensors}.items() if parameters else ():
        genes = [gene for gene in parameters if gene.name.startswith(group + "/")]
        numbers = [gene for gene in genes if gene.ordered]
        genome.add_row(
            group,
            str(count),
            ", ".join(gene.name.partition("/")[2] for gene in genes),
            *(_spread([getattr(gene, part) for gene in numbers]) for part in ("low", "high", "initial")),
        )
    if setup.space.path is not None:
        _add_path(genome, setup.space.path)
    console.print(genome)
    if setup.space.path is not None:
        console.print(_path_line(setup.space.path), soft_wrap=True)
    cost = plan["cost"]
    names = " or ".join(setup.space.operators)
    how = f" (auto: {plan['optimizer_chosen']})" if "optimizer_chosen" in plan else ""
    console.print(
        f"Operator {names}, optimizer {plan['optimizer']}{how}. Workers run on: {plan['device']}.", soft_wrap=True
    )
    for line in lines(memory, setup.config.cluster.shards):
        console.print(line, soft_wrap=True)
    for name, pools in cost["items"].items():
        console.print(f"Evaluator {name}: " + ", ".join(f"{count} {pool} items" for pool, count in pools.items()) + ".")
    if cost["limits"]:
        limits = ", ".join(f"{name} {limit}" for name, limit in cost["limits"].items())
        console.print(f"Limits, of which the first that is reached ends the search: {limits}.", soft_wrap=True)
    if again := [arm.replace("_", " ") for arm in cost["compared with"] if arm != "standard"]:
        console.print(f"To compare the winner with {' and '.join(again)} costs at most as much again, for each.")
    fitness = setup.config.search.fitness
    at_most = "at most " if fitness.racing or fitness.rotate else ""
    console.print(
        f"Cost: {cost['candidates']} candidates, {at_most}{cost['item evaluations']:,} item evaluations on the search "
        "items. "
        f"{'The config is sound' if memory.fits else 'It does not fit'}; nothing was spent.",
        soft_wrap=True,
    )


def _add_path(table: Table, path: PathGenes) -> None:
    """Rows of a genome's table for the genes of a path, which are too many to be named."""
    for genes, what in ((path.indicators, "layers used or not"), (path.scales.genes, "scales")):
        if genes:
            spread = (_spread([getattr(gene, part) for gene in genes]) for part in ("low", "high", "initial"))
            table.add_row("path", "", f"{len(genes)} {what}", *spread)


def _path_facts(path: PathGenes) -> dict[str, Any]:
    least, most = path.limits
    return {**path.config.model_dump(mode="json"), "layers": path.depth, "min_length": least, "max_length": most}


def _path_line(path: PathGenes) -> str:
    config, (least, most) = path.config, path.limits
    line = (
        f"Paths: {least} to {most} layers, of {', '.join(config.pool)} with {path.depth} each, offered "
        f"{config.repeats} time{'s' * (config.repeats > 1)}; scales by {config.scales.by}; starts as {path.first}."
    )
    if config.stage == "after":
        line += f" Searched after the merge, which has {config.share:.0%} of the budget."
    return line


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
