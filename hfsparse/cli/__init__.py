"""The command line: profile, recipes, import, show, diff, check, doctor, generate, bench, eval.

torch and transformers are imported inside the commands, so that `hfsparse --help` is instant.
"""

from __future__ import annotations

from importlib import import_module

from hfsparse.cli.application import app

for _part in ("profile", "plans", "run"):  # the order of `hfsparse --help`
    import_module(f"hfsparse.cli.{_part}")


def main() -> None:
    app(prog_name="hfsparse")


if __name__ == "__main__":
    main()
