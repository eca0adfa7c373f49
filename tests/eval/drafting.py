"""Drafts of a size that shows a task's form and no more."""

import re
from random import Random

from hfsparse_eval.tasks import TASKS

SIZES = {"noise": 12, "prose": 300, "needles": 12}
NEEDLE = re.compile(r"One of the special magic (?:number|uuid)s for (\S+) is: ([0-9a-f-]+)\.")
NUMBER = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")


def draft(name, seed=1, **more):
    task = TASKS[name]
    return task.draw(Random(seed), SIZES[getattr(task, "haystack", "noise")], **more)
