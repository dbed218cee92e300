"""The `outlay` command: a lazy group over planner's and runner's commands.

`outlay --help` imports neither torch nor pandas: the table below has every command's name, the module
that has a command of that name, and its first line; a test compares it with the commands themselves.
"""

from __future__ import annotations

import importlib
import sys

import click

from outlay.profiles.errors import OutlayError

COMMANDS = {
    "probe": ("runner.commands.probe", "What is in this machine."),
    "estimate": ("planner.commands.estimate", "Memory, time and cost of one strategy, each with its interval."),
    "plan": ("runner.commands.plan", "Search the strategies, choose the fastest that fits, and write plan.yaml."),
    "size": ("planner.commands.size", "What to rent or buy for a job, over the whole catalog, and which strategy."),
    "emit": ("planner.commands.emit", "Write a plan in the format that another program reads."),
    "check": ("planner.commands.check", "What a configuration means, what will happen, what is wrong, and the mend."),
    "shrink": ("runner.commands.shrink", "Write a smaller model: fewer heads, channels and blocks, really gone."),
    "run": ("runner.commands.run", "Train as a plan says, within its budget."),
    "resume": ("runner.commands.run", "Continue a run from its newest checkpoint that verifies."),
    "verify": ("runner.commands.run", "Check a run's checkpoints, or one, against their manifests."),
    "status": ("runner.commands.run", "How a run stands: last step, what it has spent, how it ended."),
    "ledger": ("runner.commands.ledger", "What runs cost, for whom, and what projects may still spend."),
    "stop": ("runner.commands.follow", "Stop a run well: it finishes the step, saves, and exits with 75."),
    "answer": ("runner.commands.follow", "Answer a run that was started with --when-over ask."),
    "tail": ("runner.commands.follow", "Show what a run does, as it does it."),
    "data": ("runner.commands.data", "Prepare text for training, and look at it."),
    "export": ("runner.commands.export", "A run's weights as a folder for others, dense or packed, with a model card."),
    "eval": ("runner.commands.eval", "Loss, size and speed of finished models on this machine, each with an interval."),
    "compare": ("runner.commands.compare", "Predicted against measured, for a run; or several plans side by side."),
    "calibrate": ("runner.commands.calibrate", "Fit the efficiency figures to measured runs, or measure this machine."),
    "catalog": ("planner.commands.catalog", "Accelerators, models and prices that outlay knows, and one's own."),
    "demo": ("runner.commands.demo", "The whole way on this machine: probe, plan, train, compare."),
}  # fmt: skip


class LazyGroup(click.Group):
    """Imports a command's module only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"outlay.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(name, COMMANDS, n=2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="outlay")
def cli() -> None:
    """Plan what training a large model needs and costs, before paying; then run it within that."""


def main() -> None:
    """Entry point: errors of ours become one message on stderr and their exit code."""
    try:
        cli(standalone_mode=True)
    except OutlayError as error:
        click.echo(f"error: {error.message()}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
