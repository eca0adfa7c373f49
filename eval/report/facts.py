"""What a report says of how it was made."""

from __future__ import annotations

from collections.abc import Sequence

from hfsparse_eval.report.kinds import Kind
from hfsparse_eval.run.results import Settings
from hfsparse_eval.tasks.scores import METRICS


def list_facts(settings: Settings, kind: Kind, sessions, arms, batches: Sequence[int]) -> list[str]:
    """A line a fact: model, arms, prompts, data, and each machine."""
    plans = [f"{arm['title']} {arm['plan'] or '(a peer)'}" for arm in arms]
    sizes = ", ".join(map(str, batches)) or "1"
    facts = {
        "model": f"{settings.model} (fingerprint {settings.fingerprint}), {settings.dtype}",
        "arms beside dense": ", ".join(plans) or "none, dense only",
        "prompts": f"chat template {settings.chat}, seed {settings.seed}, batch size {sizes}, "
        "greedy",
        "new tokens": f"at most {settings.max_new_tokens or kind.caps}; {kind.ends}",
        "prose haystack": f"{settings.prose} (not RULER's essays: compare only runs with this)",
    }
    if settings.data:
        facts["data"] = settings.data
    if settings.metric:
        facts["right"] = f"an answer that holds {METRICS[settings.metric].right}"
    if settings.kind == "ppl":
        apart = f"{settings.stride} tokens apart" if settings.stride else "side by side"
        facts["windows"] = f"of the text's beginning, {apart}"
    if settings.turns:
        facts["turns"] = settings.turns
    if settings.kind == "ruler":
        facts["questions"] = (
            f"qa_1 {settings.squad or 'not run'}; qa_2 {settings.hotpotqa or 'not run'}; "
            "qa_*_invented: invented facts (not SQuAD or HotpotQA)"
        )
    for name in kind.unused:
        del facts[name]
    lines = [f"{name}: {value}" for name, value in facts.items()]
    for session in sessions:
        versions = [f"{k} {v}" for k, v in session.items() if k != "machine"]
        lines.append(f"machine: {session['machine']}; {', '.join(versions)}")
    return lines
