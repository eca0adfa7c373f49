"""python -m hfsparse: the command line, also for `accelerate launch -m hfsparse eval …`."""

from hfsparse.cli import main

main()
