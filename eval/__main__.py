from hfsparse_eval.cli import app

app(prog_name="hfsparse eval")
