import re
from random import Random

from hfsparse_eval.tasks import TASKS
from tests.eval.drafting import draft


def test_vt_is_one_chain_of_four_hops_after_a_solved_example():
    made = draft("vt")
    chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", made.context)
    value = chain[0][1]
    assert made.answers == tuple(name for name, _ in chain)
    assert [source for _, source in chain[1:]] == list(made.answers[:-1])
    assert 10000 <= int(value) <= 99998
    assert made.after == (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    assert made.prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"5 variables are assigned the value {value}, they are: "
    )
    example = re.findall(r"VAR ([A-Z]{3}) = ", made.before)
    assert len(example) == 5
    assert f"they are:  {' '.join(example)}\n\nMemorize and track" in made.before
    assert len(made.gold) == 5


def test_vt_never_names_a_variable_var(monkeypatch):
    class Scripted(Random):
        def choices(self, letters, k):
            return list(queue.pop(0))

    queue = ["VAR", "AAA", "AAA", "BBB", "CCC", "DDD", "EEE"]
    made = TASKS["vt"]._problem(Scripted(0), 8, letters=3)
    assert made.answers == ("AAA", "BBB", "CCC", "DDD", "EEE")
