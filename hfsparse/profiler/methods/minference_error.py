"""The `minference` method's variant that compares patterns by output error instead of recall."""

from hfsparse.plan import Plan
from hfsparse.profiler.job import Job
from hfsparse.profiler.methods import minference


def plan(job: Job) -> Plan:
    return minference.plan(job, score="error")
