"""The `minidiff` command; also `python -m minidiff`."""

import sys


def main() -> None:
    """cli.main, which has an answer to Ctrl-C; so that there is one while it is being imported, too."""
    try:
        from minidiff.cli.main import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
