"""Entry point: commands are imported when they are called, errors become one line and an exit status."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import NoReturn

import click

from evaluators.errors import MeiosisError
from meiosis import __version__

# Command -> module and one-line help; the modules load only what their command needs.
_COMMANDS = {
    "samples": ("meiosis.cli.samples", "Train small sample models to try Meiosis on."),
    "plan": ("meiosis.cli.plan", "Check a config and show genome, memory and cost; spend nothing."),
    "search": ("meiosis.cli.search", "Search for the best merge, certify it and export it."),
    "baselines": ("meiosis.cli.baselines", "Evaluate parents and standard merges only, without a search."),
    "resume": ("meiosis.cli.resume", "Go on with a run exactly where it stopped."),
    "certify": ("meiosis.cli.certify", "Compare what a run found with more: random search, a placebo."),
    "status": ("meiosis.cli.status", "List runs, or show progress, best and failures of one."),
    "merge": ("meiosis.cli.merge", "Carry out one merge from a recipe file, no search."),
    "recipe": ("meiosis.cli.recipe", "Write the recipe of a common merge: soup, arithmetic, SLERP."),
    "recycle": ("meiosis.cli.recycle", "Start a new or larger model from the weights of an older one."),
    "statistics": ("meiosis.cli.statistics", "Collect what fisher and regmean need to know of a model."),
    "mergekit": ("meiosis.cli.mergekit", "Convert recipes to mergekit files, and mergekit files to ours."),
    "evaluate": ("meiosis.cli.evaluate", "Score a model folder with the evaluators of a config."),
    "export": ("meiosis.cli.export", "Write the best, or any, trial of a run as a checkpoint."),
    "operators": ("meiosis.cli.operators", "List the merge operators with their parameters."),
    "cache": ("meiosis.cli.cache", "Show or remove the copies of models that a cluster left on this machine."),
    "evaluators": ("meiosis.cli.evaluators", "List the evaluators with their metrics and options."),
}


class _Commands(click.Group):
    """A group that imports a command when it is called, so that --help does not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from evaluators.errors import nearest

        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command '{args[0]}'{nearest(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.command(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: meiosis search samples/text/search.yaml",
)
@click.version_option(__version__, prog_name="meiosis")
@click.pass_context
def cli(context: click.Context) -> None:
    """Find the best way to merge fine-tunes of one base model."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> NoReturn:
    """Run the command line and exit: 0 success, 1 failure, 2 a mistake of the user, 130 interrupted."""
    debug = "--debug" in sys.argv[1:]
    try:
        cli.main(standalone_mode=False)
        status = 0
    except click.exceptions.Exit as request:
        status = request.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        more = f" (see: {context.command_path} --help)" if context else ""
        click.echo(f"meiosis: {error.format_message()}{more}", err=True)
        status = error.exit_code
    except MeiosisError as error:
        if debug:
            traceback.print_exc()
        _complain(error)
        status = error.exit_status
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo("meiosis: interrupted", err=True)
        status = 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error of ours.
        sys.stderr.close()
        status = 1
    except Exception as error:  # noqa: BLE001 - a fault of ours, told as one; --debug raises it
        if debug:
            traceback.print_exc()
        click.echo(f"meiosis: unexpected {type(error).__name__}: {error}", err=True)
        click.echo("This is a fault of Meiosis; --debug shows where it happened.", err=True)
        status = 1
    sys.exit(status)


def _complain(error: MeiosisError) -> None:
    for line in str(error).splitlines():
        click.echo(f"meiosis: {line}", err=True)
