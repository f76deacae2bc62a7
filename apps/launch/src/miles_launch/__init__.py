"""The `miles` command: composes the rooms of Miles into runs."""


def main() -> None:
    """Run the `miles` command."""
    from miles_launch.cli import main as cli_main  # noqa: PLC0415 (actors import this package and need no typer)

    cli_main()


__all__ = ["main"]
