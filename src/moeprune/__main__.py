"""``python -m moeprune`` is the command line."""

from __future__ import annotations


def main() -> None:
    """Run the command line (the console script's entry point)."""
    from moeprune.cli import main as run

    run()


if __name__ == "__main__":
    main()
