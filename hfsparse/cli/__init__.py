"""The command line: profile, verify, recipes, plans, new, import, export, bits, show, diff, check,
push, explain, doctor, generate, serve, bench, eval.

torch and transformers are imported inside the commands, so that `hfsparse --help` is instant.
"""

from __future__ import annotations

import typer

from hfsparse.cli import bits, export, plans, profile, run, serve, verify
from hfsparse.cli.application import Commands, options

app = typer.Typer(
    cls=Commands,
    help="Sparse attention for Hugging Face models: profile each head, then run the plan.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.callback()(options)
for _name, _command in {  # `hfsparse --help` lists them in this order
    "profile": profile.profile,
    "verify": verify.verify,
    "recipes": profile.list_recipes,
    "plans": plans.list_plans,
    "new": plans.new,
    "import": plans.import_,
    "export": export.export,
    "bits": bits.bits,
    "show": plans.show,
    "diff": plans.diff,
    "check": plans.check,
    "push": plans.push,
    "explain": run.explain,
    "doctor": run.doctor,
    "generate": run.generate,
    "serve": serve.serve,
    "bench": run.bench,
}.items():
    app.command(_name)(_command)
app.command(  # eval/ reads the words itself
    "eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(run.evaluate)


def main() -> None:
    app(prog_name="hfsparse")


if __name__ == "__main__":
    main()
