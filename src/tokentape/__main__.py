"""`python -m tokentape` and the installed script."""


def main() -> None:
    """Run the command line and exit with its code."""
    from tokentape.cli import run

    run()


if __name__ == "__main__":
    main()
