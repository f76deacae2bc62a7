"""The `miles` command."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console as Terminal
from rich.table import Table

from miles_core import ClusterDied, Interrupted, MilesError, load_recipe
from miles_core.cluster import ACROSS_MACHINES, Cluster, Node, place
from miles_core.config import DEFAULT_DASHBOARD_PORT

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/quickstart.toml.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Override a key: train.megatron.lr=2e-6. May be repeated.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder that holds the folders of runs.")]


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006 (typer reads the default and never changes it)
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest run of this recipe's name.")] = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Train a model as RECIPE says."""
    loaded = load_recipe(recipe, overrides)
    if loaded.cluster.address:
        os.environ[ACROSS_MACHINES] = "1"
    from miles_launch.launch import launch  # noqa: PLC0415 (imports ray, which reads its environment then)

    launch(loaded, resume=resume, runs=runs)


@app.command()
def plan(recipe: RecipeArgument, overrides: SetOption = []) -> None:  # noqa: B006 (as above)
    """Print where every process of RECIPE would go on this machine, and what it asks for."""
    from miles_launch.run import roles_of  # noqa: PLC0415 (seconds)

    roles = roles_of(load_recipe(recipe, overrides))
    total = sum(role.count * role.num_cpus for role in roles)
    table = Table("process", "node", "logical CPUs", "GPUs")
    for slot in place(Cluster((Node("this machine", total),)), roles).slots:
        table.add_row(f"{slot.role}[{slot.index}]", slot.node, f"{slot.num_cpus:g}", str(slot.num_gpus))
    Terminal().print(table)


@app.command()
def doctor(runs: RunsOption = Path("runs")) -> None:
    """Check whether this machine can run Miles; exit code 2 if it cannot."""
    from miles_launch.doctor import print_report  # noqa: PLC0415 (as above)

    raise typer.Exit(print_report(runs, {"cluster.dashboard_port": DEFAULT_DASHBOARD_PORT}))


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A Hugging Face model directory.")],
    overrides: SetOption = [],  # noqa: B006 (as above)
    as_json: JsonOption = False,
) -> None:
    """Compare HF_DIR in the trainer with transformers; exit code 1 if they differ, 2 if one of them cannot load it."""
    from miles_launch import verify as tool  # noqa: PLC0415 (seconds)

    with Terminal(stderr=True).status("reading headers") as status:
        report = tool.verify(directory, overrides, status.update)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        tool.print_report(report, Terminal())
    raise typer.Exit(0 if report["holds"] else 1)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT_DIR|RUN_DIR", help="A checkpoint, or a run's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The Hugging Face directory to make.")],
    overrides: SetOption = [],  # noqa: B006 (as above)
    model: Annotated[Path | None, typer.Option("--model", help="What training started from.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read it again and compare; exit code 1.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as a Hugging Face directory."""
    from miles_launch import export as tool  # noqa: PLC0415 (as above)

    with Terminal(stderr=True).status("reading headers") as status:
        report = tool.export(checkpoint, out, overrides, model, verify=verify, say=status.update)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        tool.print_report(report, Terminal())
    raise typer.Exit(0 if report["holds"] else 1)


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the families that can be trained and what each supports, asked of the code itself."""
    from miles_launch import list_models as tool  # noqa: PLC0415 (as above)

    with Terminal(stderr=True).status("asking every family"):
        families = tool.list_models()
    if as_json:
        typer.echo(json.dumps(families, indent=1))
    else:
        tool.print_models(families, Terminal())


@app.command()
def hooks(
    kind: Annotated[str, typer.Argument(metavar="[KIND]", help="One of them, with all there is to know.")] = "",
    new: Annotated[str, typer.Option("--new", metavar="KIND", help="Print a file to start from, e.g. reward.")] = "",
) -> None:
    """List where code of one's own attaches: the recipe's key, the signature, and what comes with Miles."""
    from miles_launch import hooks as tool  # noqa: PLC0415 (imports torch)

    typer.echo(tool.template(new) if new else tool.describe(kind) if kind else tool.overview(), nl=False)


def main() -> None:
    """Run the command; every error of ours is one message on standard error and its own exit code."""
    _find_code_here()
    sys.exit(_guarded(lambda: app(standalone_mode=True)))


def _find_code_here() -> None:
    """Let recipes name modules that lie in the folder where the command is given, in this process and in its actors."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))


def _guarded(command: Callable[[], object]) -> int:
    try:
        command()
    except Interrupted as stop:
        print(f"miles: {stop}", file=sys.stderr)  # noqa: T201 (an app speaks to a person)
        return stop.exit_code
    except MilesError as error:
        print(f"miles: error: {error}", file=sys.stderr)  # noqa: T201
        if isinstance(error, ClusterDied):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_code)  # Ray's library crashes when the interpreter ends without its raylet
        return error.exit_code
    except KeyboardInterrupt:
        print("miles: stopped before the run began; there was nothing to save", file=sys.stderr)  # noqa: T201
        return Interrupted.exit_code
    return 0
