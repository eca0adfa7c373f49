"""Plans on the hub, through huggingface_hub itself, which talks to a stand-in on this machine."""

from __future__ import annotations

import hashlib

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants, file_download, utils
from safetensors.torch import save_file
from typer.testing import CliRunner

import hfsparse
from hfsparse.cli import app
from hfsparse.errors import UsageError
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Layer, ModelId, Plan, PlanError
from hfsparse.plan.hub import parse, push
from hfsparse.plan.sources import open_plan
from tests import tiny
from tests.patterns.matrix import weights
from tests.plan.hub_stand_in import Hub, serve
from tests.plan.test_data import TEXT

REPO = "org/some.repo"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub, and an empty cache of it."""
    found = Hub()
    with serve(found) as url:
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        for module in (constants, file_download):  # 0.x has its own name for it
            if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
                monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield found


@pytest.fixture
def offline(monkeypatch):
    anew = getattr(utils, "reset_sessions", lambda: None)  # of 0.x, whose sessions remember

    def off():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        anew()

    yield off
    monkeypatch.undo()
    anew()


def plan(recent: int = 64) -> Plan:
    words = ("near",) * 2
    layer = Layer(("near",) * 4, words, ("ring",) * 2)
    made = Plan(ModelId.of(tiny.llama()), {"near": Streaming(4, recent)}, (layer, layer))
    made.expected = {2048: {"pair_density": 0.25, "cache_share": 0.125}}
    made.made = {"method": "balanced", "model": "org/tiny", "verified": {"told": "0 % lost"}}
    return made


def put(hub, given: Plan, file: str = "plan.yaml", branch: str = "main") -> str:
    return hub.commit(REPO, {file: given.dumps().encode()}, branch)


def refused(source: str) -> str:
    with pytest.raises(PlanError) as error:
        open_plan(source)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- from the hub


def test_patch_and_commands_take_an_address(hub, tmp_path):
    put(hub, plan())
    model, address = tiny.llama(), f"hf://{REPO}/plan.yaml"
    with hfsparse.patch(model, address) as handle:
        assert plan().hash()[:19] in handle.explain()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["check", address, str(tmp_path / "model")])
    assert done.stdout == f"{address} fits {tmp_path / 'model'}\n"


def test_a_revision_is_a_branch_or_a_commit(hub):
    first = put(hub, plan(64))
    put(hub, plan(32))
    put(hub, plan(16), "sub/other.yaml", "wide/v2")
    assert open_plan(f"hf://{REPO}/plan.yaml") == plan(32)
    assert open_plan(f"hf://{REPO}@{first}/plan.yaml") == plan(64)
    assert open_plan(f"hf://{REPO}@wide%2Fv2/sub/other.yaml") == plan(16)


def test_a_hash_pins_the_plan(hub):
    put(hub, plan(64))
    address, whole = f"hf://{REPO}/plan.yaml", plan(64).hash()
    assert open_plan(f"{address}#{whole}") == open_plan(f"{address}#{whole[:19]}") == plan(64)
    put(hub, plan(32))
    said = refused(f"{address}#{whole}")
    assert f"the plan there has the hash {plan(32).hash()}" in said
    noted = plan(32)
    noted.made["note"] = "of no weight"
    put(hub, noted)
    assert open_plan(f"{address}#{plan(32).hash()}") == noted  # notes are no part of a hash


def test_tables_come_with_their_plan_of_the_same_commit(hub, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    save_file(weights(1, 2, 8), folder / "table")
    table = (folder / "table").read_bytes()
    text = TEXT.replace("SHA", hashlib.sha256(table).hexdigest()).encode()
    beside = {"v1/plan.yaml": text, "v1/plan.labels.safetensors": table}
    old = hub.commit(REPO, beside)
    assert open_plan(f"hf://{REPO}/v1/plan.yaml").data["labels"].content == table
    assert ("GET", f"/{REPO}/resolve/{old}/v1/plan.labels.safetensors") in hub.asked
    hub.commit(REPO, {"v2/plan.yaml": text})
    said = refused(f"hf://{REPO}/v2/plan.yaml")
    assert f"{REPO} has no file v2/plan.labels.safetensors" in said


def test_what_was_fetched_is_there_offline(hub, offline):
    put(hub, plan())
    address = f"hf://{REPO}/plan.yaml"
    open_plan(address)
    offline()
    hub.asked.clear()
    assert open_plan(address) == plan()
    said = refused(f"hf://{REPO}/other.yaml")
    assert "the hub can't be reached, and other.yaml is not in the cache here" in said
    assert not hub.asked


def test_a_token_is_sent(hub, monkeypatch):
    sent = []
    take = huggingface_hub.hf_hub_download
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: sent.append(k) or take(*a, **k)
    )
    put(hub, plan())
    assert open_plan(f"hf://{REPO}/plan.yaml") == plan()
    assert all("token" not in given for given in sent)  # huggingface_hub finds it
    assert {"Bearer hf_secret"} == hub.tokens


def test_the_hub_s_refusals_are_one_sentence(hub):
    put(hub, plan())
    hub.gated.add("org/gated")
    start = "can't get {} from the hub: "
    for source, why in {
        "hf://org/absent/plan.yaml": "there is no repository org/absent, or it is private",
        "hf://org/gated/plan.yaml": "org/gated is gated: accept its terms on its page",
        f"hf://{REPO}@v9/plan.yaml": f"{REPO} has no revision v9",
        f"hf://{REPO}/none.yaml": f"{REPO} has no file none.yaml",
    }.items():
        assert refused(source).startswith(start.format(source) + why)


def test_a_plan_that_cannot_be_read_is_refused_as_any_other(hub):
    hub.commit(REPO, {"plan.yaml": b"hfsparse: 1\nlayers: 3\n"})
    with pytest.raises(PlanError, match=r"plan\.yaml: .* problems"):
        open_plan(f"hf://{REPO}/plan.yaml")


@pytest.mark.parametrize(
    "source",
    [
        "hf://plan.yaml",
        "hf://org/repo",
        "hf://org/repo/",
        "hf://org/repo@/plan.yaml",
        "hf://org/repo@a/b@c/plan.yaml",
        "hf://org/repo/plan.yaml#sha256:12",
        "hf://org/repo/plan.yaml#v1",
        "hf://../repo/plan.yaml",
        "hf://org/repo/../plan.yaml",
        "hf://org/repo//plan.yaml",
    ],
)
def test_an_address_has_its_form(source):
    assert "is no plan on the hub: give hf://ORG/REPO/plan.yaml" in refused(source)


def test_the_parts_of_an_address():
    found = parse("hf://a-b/c.d@refs%2Fpr%2F1/x/y.yaml#sha256:0123456789ab")
    assert (found.repo, found.file) == ("a-b/c.d", "x/y.yaml")
    assert (found.revision, found.pin) == ("refs/pr/1", "sha256:0123456789ab")


# ---- to the hub


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_what_is_pushed_is_what_is_fetched(hub, tmp_path):
    plan().save(tmp_path / "best.yaml")
    done = command("push", tmp_path / "best.yaml", REPO)
    assert done.exit_code == 0, done.output
    assert {*hub.repos[REPO]["main"]} >= {"best.yaml", "README.md", "heads.png"}
    assert REPO not in hub.private
    assert open_plan(f"hf://{REPO}/best.yaml") == plan()
    said = done.stdout.splitlines()[-1].split("hfsparse show ")[1]
    assert open_plan(said) == plan()
    plan(32).save(tmp_path / "best.yaml")
    assert command("push", tmp_path / "best.yaml", REPO).exit_code == 0  # the repository is there
    assert open_plan(f"hf://{REPO}/best.yaml") == plan(32)
    assert open_plan(said) == plan(64)  # a commit stays


def test_a_branch_and_a_private_repository(hub, tmp_path):
    plan().save(tmp_path / "plan.yaml")
    done = command("push", tmp_path / "plan.yaml", REPO, "--private", "--branch", "wide")
    assert done.exit_code == 0, done.output
    assert REPO in hub.private
    assert "plan.yaml" not in hub.repos[REPO]["main"]
    assert open_plan(f"hf://{REPO}@wide/plan.yaml") == plan()


def test_a_dry_run_writes_the_folder_and_asks_nobody(hub, tmp_path):
    plan().save(tmp_path / "plan.yaml")
    folder = tmp_path / "card"
    done = command("push", tmp_path / "plan.yaml", REPO, "--dry-run", folder)
    assert done.stdout == f"wrote README.md, heads.png, plan.yaml in {folder}\n"
    assert not hub.asked
    assert Plan.load(folder / "plan.yaml") == plan()
    assert (folder / "heads.png").read_bytes().startswith(b"\x89PNG")
    again = command("push", tmp_path / "plan.yaml", REPO, "--dry-run", folder)
    assert f"{folder} has files in it: give an empty folder" in again.stderr


def test_the_card_has_map_proof_budgets_and_use(hub, tmp_path):
    plan().save(tmp_path / "plan.yaml")
    command("push", tmp_path / "plan.yaml", REPO, "--dry-run", tmp_path / "card")
    _, front, page = (tmp_path / "card" / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "org/tiny"
    assert "hfsparse" in yaml.safe_load(front)["tags"]
    assert "](heads.png)" in page
    assert "Verified by the profiler: 0 % lost." in page
    assert "| tokens | pair_density | cache_share |\n| ---: | ---: | ---: |\n" in page
    assert "| 2048 | 0.250 | 0.125 |" in page
    assert f'hfsparse.patch(model, "hf://{REPO}/plan.yaml")' in page
    assert f"hf://{REPO}/plan.yaml#{plan().hash()[:19]}" in page
    assert plan().hash() in page


def test_the_card_of_a_plan_without_proof_says_so(tmp_path):
    done = command("push", "duo:llama-3.1-8b-instruct", REPO, "--dry-run", tmp_path / "card")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "card" / "README.md").read_text("utf-8")
    assert "Verified by nothing: converted from a published search, not verified by us" in page
    assert "MIT, Copyright (c) 2024 MIT HAN Lab" in page
    assert "The plan states no figures." in page
    assert (tmp_path / "card" / "duo-llama-3.1-8b-instruct.yaml").is_file()


def test_a_push_that_is_refused_is_one_line(hub, tmp_path, offline):
    plan().save(tmp_path / "plan.yaml")
    hub.token = "hf_another"
    said = command("push", tmp_path / "plan.yaml", REPO)
    assert said.exit_code == 1
    assert said.stderr.splitlines()[-1].startswith(f"error: can't push to {REPO}: ")
    assert "Give a token that may write there" in said.stderr
    offline()
    with pytest.raises(UsageError, match=f"can't push to {REPO}: "):
        push(tmp_path, REPO)
    with pytest.raises(UsageError, match="the repository is mine: give ORG/REPO"):
        push(tmp_path, "mine")
    assert hub.repos == {}
