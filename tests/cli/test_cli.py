"""The command line: help at once, and one line, no traceback, for whatever can't be used."""

import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import fields, replace

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import hfsparse
from hfsparse.cli import app
from hfsparse.errors import UsageError
from hfsparse.evictions import EVICTIONS
from hfsparse.models.loading import load_config
from hfsparse.patterns import PATTERNS
from hfsparse.plan import Below, Layer, ModelId, Plan
from hfsparse.plan.extend import DualChunk
from hfsparse.plan.files import DataFile
from hfsparse.plan.kept import Full
from hfsparse.profiler.settings import Settings
from hfsparse.selectors import SELECTORS
from tests import tiny

PARTLY = "prefill: s*2 full*2, cache: s full, decode: ring full"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def plan(model, tmp_path):
    """The full plan of the tiny model."""
    file = tmp_path / "plan.yaml"
    Plan.full(ModelId.of(tiny.llama())).save(file)
    return file


@pytest.fixture
def prompt(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("What is at the end of a long text?\n")
    return file


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def error(*words):
    """The one line that a refused command prints."""
    result = run(*words)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    *progress, last = result.stderr.splitlines()
    assert all("Loading weights" in line for line in progress if line)
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


# ---- help


def test_a_command_prints_no_warnings_of_packages_that_it_does_not_use():
    pytest.importorskip("torchao")  # warns where it is imported, which transformers does
    words = [sys.executable, "-m", "hfsparse", "recipes"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stderr == ""


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['hfsparse', '--help']\nfrom hfsparse.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    words = (
        "profile verify recipes plans new import export show diff check push explain doctor "
        "generate bench eval"
    )
    places = [done.stdout.index(f"│ {command} ") for command in words.split()]
    assert places == sorted(places)
    assert done.stdout.endswith("[]\n")


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert run("--version").stdout == f"hfsparse {version('hfsparse')}\n"


def test_eval_hands_its_words_and_its_exit_code_on():
    assert "hfsparse eval ruler" in run("eval", "ruler", "--help").stdout
    unknown = run("eval", "nonsense")
    assert unknown.exit_code == 2
    assert "nonsense" in unknown.output


def test_one_process_is_not_several(plan, model, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "hfsparse check is one process, and 2 were started" in error("check", plan, model)
    assert run("eval", "ruler", "--help").exit_code == 0  # it shares its samples
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run("check", plan, model).exit_code == 0


def test_eval_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hfsparse_eval.cli", None)
    assert "pip install 'hfsparse[eval]'" in error("eval", "ruler", "x")


def test_ctrl_c_is_one_line_and_130(monkeypatch, plan):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(Plan, "load", interrupted)
    result = run("show", plan)
    assert result.exit_code == 130
    assert result.stderr == "interrupted: profile and eval go on when given the same command\n"


def test_a_warning_to_users_is_one_line_without_code(monkeypatch, plan):
    usual = warnings.formatwarning

    def warned(path):
        raise UsageError(
            warnings.formatwarning("it may lose answers", UserWarning, "cli.py", 7)
            + warnings.formatwarning("old", DeprecationWarning, "other.py", 8, line="")
        )

    monkeypatch.setattr(Plan, "load", warned)
    said = run("show", plan).stderr
    assert said == "error: warning: it may lose answers\nother.py:8: DeprecationWarning: old\n\n"
    assert warnings.formatwarning is usual


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, plan):
    monkeypatch.setattr(Plan, "load", lambda path: {}["absent"])
    assert isinstance(run("show", plan).exception, KeyError)


# ---- new


def test_new_writes_the_full_plan_a_line_a_layer(model, tmp_path):
    file = tmp_path / "my plan.yaml"
    result = run("new", model, "-o", file)
    assert result.exit_code == 0, result.output
    assert f"hfsparse check '{file}' {model}" in result.stdout
    assert list(tmp_path.iterdir()) == [file]
    assert Plan.load(file) == Plan.full(ModelId.of(tiny.llama()))
    for layer in range(2):
        row = f"  {layer}: {{prefill: full*4, cache: full*2, decode: full*2}}"
        assert row in file.read_text().splitlines()
    assert run("check", file, model).exit_code == 0


def test_each_kind_of_a_new_plan_is_there_to_uncomment(model, tmp_path):
    file = tmp_path / "plan.yaml"
    run("new", model, "-o", file)
    row = re.compile(r"^  # (\w+: {kind.*})$", flags=re.MULTILINE)
    known = {**PATTERNS, **SELECTORS, **EVICTIONS, "held": Full}
    alone = {kind: cls() for kind, cls in known.items() if not hasattr(cls, "calibrate")}
    assert Plan.loads(row.sub(r"  \1", file.read_text())).patterns == alone
    for kind in known.keys() - alone.keys():
        assert f"  # and a table: hfsparse profile MODEL --selector {kind}\n" in file.read_text()


def test_a_new_plan_says_which_layers_are_fixed(tmp_path):
    from tests.patcher.families import fresh

    fresh("gemma3").config.save_pretrained(tmp_path)
    run("new", tmp_path, "-o", tmp_path / "plan.yaml")
    rows = (tmp_path / "plan.yaml").read_text().splitlines()[-3:]
    noted = [
        "# a window of 40 tokens of its own: cache and decode stay full" in row for row in rows
    ]
    assert noted == [True, False, False]


def test_new_leaves_a_file_that_is_there_and_refuses_what_it_cannot_describe(model, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("mine")
    assert error("new", model, "-o", file) == f"{file} exists: give another name, or remove it"
    assert file.read_text() == "mine"
    assert "make it first" in error("new", model, "-o", tmp_path / "absent" / "plan.yaml")
    absent = tmp_path / "absent"
    assert error("new", absent, "-o", absent) == f"no such model folder: {absent}"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["t5", "mamba", "bert"])
def test_new_writes_no_plan_for_a_model_that_no_plan_can_patch(name, tmp_path):
    from tests.support.models import REFUSED, build_refused

    refused = build_refused(name)
    refused.config.architectures = [type(refused).__name__]
    refused.config.save_pretrained(tmp_path / "model")
    said = error("new", tmp_path / "model", "-o", tmp_path / "plan.yaml")
    assert REFUSED[name].reason in said
    assert not (tmp_path / "plan.yaml").exists()


def test_new_that_fails_in_the_middle_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    file = tmp_path / "plan.yaml"
    assert error("new", model, "-o", file).endswith("No space left on device. Give another path")
    assert list(tmp_path.iterdir()) == []


# ---- bits


def test_a_plan_in_fewer_bits_is_one_command_and_expects_what_its_cache_takes(
    plan, model, tmp_path
):
    given = Plan.load(plan)
    given.expected = {700: {"pair_density": 0.5, "cache_share": 1.0}}
    given.save(plan)
    file = tmp_path / "plan4.yaml"
    result = run("bits", plan, model, "--bits", 4, "-o", file)
    assert result.exit_code == 0, result.output
    assert f"wrote {file}: 4 of 4 kv heads keep numbers in 4 bits" in result.stdout
    found, loaded = Plan.load(file), tiny.llama().bfloat16()
    assert found.layers == given.with_bits(4, loaded).layers
    with hfsparse.patch(loaded, found) as handle, torch.no_grad():
        loaded(torch.arange(700)[None] % 390 + 2)
        share = handle.stats().cache_share
    assert found.expected == {700: {"pair_density": 0.5, "cache_share": round(share, 4)}}
    assert "exists: give another name" in error("bits", plan, model, "--bits", 8, "-o", file)
    assert "bits is 5: give 16, 8, 4 or fp8" in error(
        "bits", plan, model, "--bits", 5, "-o", "b.yaml"
    )


# ---- explain


def test_explain_prints_what_python_says_of_the_loaded_model(model, plan, tmp_path):
    from hfsparse.models.loading import load

    file = tmp_path / "ring.yaml"
    text = plan.read_text().replace("layers:\n", "patterns: {s: {kind: streaming}}\nlayers:\n")
    text = text.replace("prefill: full*4, cache: full*2, decode: full*2", PARTLY)
    file.write_text(text)
    for chosen, words in ((None, []), (Plan.load(file), ["--plan", file])):
        loaded, _ = load(str(model), "cpu")
        with hfsparse.patch(loaded, chosen):
            expected = hfsparse.explain(loaded)
        result = run("explain", model, *words, "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert result.stdout == expected + "\n"
    assert "ring" in expected


def test_explain_reads_no_weights_and_refuses_in_the_words_of_patch(model, plan, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text())
    halves = run("explain", bare, "--plan", plan, "--dtype", "bfloat16")
    assert halves.exit_code == 0, halves.output
    Plan.full(ModelId.of(tiny.llama(num_hidden_layers=3))).save(tmp_path / "three.yaml")
    assert "3 layers" in error("explain", bare, "--plan", tmp_path / "three.yaml")
    assert "unknown dtype int3" in error("explain", bare, "--dtype", "int3")
    assert "device nowhere can't be used" in error("explain", bare, "--device", "nowhere")


# ---- show and check


def test_show_prints_the_map_and_draws_it(plan, tmp_path):
    result = run("show", plan, "--png", tmp_path / "heads.png")
    assert result.exit_code == 0
    assert "    0  ## ##    ##     ##" in result.stdout
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_show_refuses_a_file_that_is_no_plan(tmp_path):
    assert "absent.yaml" in error("show", tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert "list.yaml" in error("show", tmp_path / "list.yaml")


def test_check_says_that_a_plan_fits(plan, model):
    result = run("check", plan, model)
    assert (result.exit_code, result.stdout) == (0, f"{plan} fits {model}\n")


def test_check_says_why_a_plan_does_not_fit(model, tmp_path):
    Plan.full(ModelId.of(tiny.llama(num_hidden_layers=3))).save(tmp_path / "three.yaml")
    assert "3 layers" in error("check", tmp_path / "three.yaml", model)


def test_check_refuses_a_table_of_another_model_and_names_what_makes_one(model, tmp_path):
    words = Layer(("full",) * 4, ("full",) * 2, ("it",) * 2)
    table = {"weight": torch.ones(2, 2, 32)}  # the model's keys have 16 channels
    data = {"channels": DataFile.of("it.safetensors", table)}
    plan = Plan(ModelId.of(tiny.llama()), {"it": SELECTORS["channels"]()}, (words,) * 2, data=data)
    plan.save(tmp_path / "plan.yaml")
    asked = "check", tmp_path / "plan.yaml", model
    told = error(*asked)
    assert "not of keys of 16 channels: hfsparse profile MODEL --selector channels makes" in told
    (tmp_path / "it.safetensors").unlink()
    assert "it.safetensors is not beside the plan" in error(*asked)
    assert "make plan and table anew: hfsparse profile MODEL -o plan.yaml" in error(*asked)


def test_check_predicts_memory_and_what_fits(plan, model, tmp_path):
    asked = "check", plan, model, "--length", "1000", "--batch", "2", "--gpu"
    told = run(*asked, "1GiB")
    assert told.exit_code == 0
    assert run(*asked, f"{1 / 1024} tib").stdout == told.stdout.replace("1GiB", f"{1 / 1024} tib")
    assert "2 x 1,000 tokens" in told.stdout
    for arm in ("dense", "plan", "4 bits"):
        (line,) = [line for line in told.stdout.splitlines() if line.startswith(arm)]
        assert " = 0.0" in line
        assert "in 1GiB: 2 x " in line
    _, whole, few = (
        int(x.replace(",", "")) for x in re.findall(r"2 x (\S+) tokens at", told.stdout)
    )
    assert whole < few
    assert "note: this model's window is 512 tokens" in told.stdout
    assert "note" not in run("check", plan, model, "--length", "512").stdout
    longer = tmp_path / "longer.yaml"
    replace(Plan.load(plan), extend=DualChunk(512)).save(longer)
    assert "extended by dca: trained 512, chunk 384, local 128" in run("show", longer).stdout
    told = run("check", longer, model, "--length", "1000")
    assert told.exit_code == 0
    assert "note" not in told.stdout
    assert "512 trained: dca, 256 keys" in run("explain", model, "--plan", longer).stdout
    words = Layer(("full",) * 4, ("host",) * 2, ("quest",) * 2)
    kinds, hosted = (
        {"host": Full(host=True), "quest": SELECTORS["quest"]()},
        tmp_path / "hosted.yaml",
    )
    replace(Plan.full(ModelId.of(tiny.llama())), patterns=kinds, layers=(words,) * 2).save(hosted)
    told = run("check", hosted, model, "--length", "100000").stdout
    dense, ours = (line for line in told.splitlines() if line.startswith(("dense", "plan")))
    assert "in host memory" not in dense
    assert re.search(r"= \d\.\d\d, and 0\.\d[1-9] in host memory$", ours)
    given = tmp_path / "given.yaml"
    replace(Plan.load(plan), made={"cache_gib": 0.5, "at": 400}).save(given)
    told = run("check", given, model, "--length", "500").stdout
    assert "note: this plan's cache was given 0.5 GiB at 400 tokens, and other lengths" in told
    assert "note" not in run("check", given, model, "--length", "400").stdout
    long = "check", plan, model, "--length", "200000"
    assert "in chunks of 32,768 by itself, which takes less work: --chunk" in run(*long).stdout
    assert "by itself" not in run(*long, "--chunk", "32768").stdout
    small = run("check", plan, model, "--length", "100000", "--gpu", "1MiB")
    assert small.exit_code == 1
    assert "shorter length" in small.stderr


def test_check_notes_shares_below_the_fewest_pages_and_blocks(model, tmp_path):
    kinds = {
        "pages": SELECTORS["quest"](share=0.06, min_pages=4),
        "units": SELECTORS["quest"](share=0.1, min_pages=2, unit=16),
        "blocks": PATTERNS["block_topk"](share=0.25, min_blocks=4),
        "unread": SELECTORS["quest"](share=0.01),
    }
    words = Layer(("full",) * 3 + ("blocks",), ("full",) * 2, ("pages", "units"))
    file = tmp_path / "plan.yaml"
    below = Below(prefill=300)
    full = Plan.full(ModelId.of(tiny.llama()))
    replace(full, patterns=kinds, layers=(words,) * 2, below=below).save(file)

    def notes(length):
        told = run("check", file, model, "--length", length, "--chunk", 4096).stdout
        return [line for line in told.splitlines() if re.match("note: of", line)]

    assert notes(1000) == [
        "note: of 1,000 tokens blocks reads 512, its min_blocks, more than share 0.25; the share "
        "decides from 1,537 tokens on",
        "note: of 1,000 tokens pages reads 256, its min_pages, more than share 0.06; the share "
        "decides from 3,201 tokens on",
        "note: of 1,000 tokens units reads 128, its min_pages, more than share 0.1; the share "
        "decides from 1,121 tokens on",
    ]
    assert [line.split()[4] for line in notes(299)] == ["pages", "units"]  # below.prefill
    for name, enough in (("blocks", 1537), ("pages", 3201), ("units", 1121)):
        assert any(f" {name} reads" in line for line in notes(enough - 1))
        assert not any(f" {name} reads" in line for line in notes(enough))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu", "1GiB"], "--gpu: of a prompt's memory, so give its --length"),
        (["--chunk", "64", "--batch", "2"], "--batch, --chunk: of a prompt's memory"),
        (["--length", "5", "--gpu", "lots"], "'lots' is no size"),
        (["--length", "5", "--dtype", "int3"], "unknown dtype int3"),
    ],
)
def test_check_says_what_it_cannot_predict(plan, model, options, says):
    assert says in error("check", plan, model, *options)


def test_check_reads_no_weights(plan, model, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((model / "config.json").read_text())
    assert run("check", plan, tmp_path / "bare").exit_code == 0


@pytest.mark.parametrize("command", ["check", "generate", "profile"])
def test_no_such_model_folder(command, plan, prompt, tmp_path):
    absent = tmp_path / "absent"
    words = {
        "check": [plan, absent],
        "generate": [absent, "--plan", plan, "--prompt-file", prompt],
        "profile": [absent, "-o", tmp_path / "new.yaml"],
    }
    assert error(command, *words[command]) == f"no such model folder: {absent}"


def test_a_broken_config_is_one_line(plan, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "cannot load the configuration" in error("check", plan, tmp_path)


def test_a_name_that_may_be_a_folder_or_the_hubs_is_told_as_both(plan, monkeypatch):
    from transformers import AutoConfig

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    for command in (["check", plan], ["generate", "--prompt-file", plan]):
        told = error(*command, "models/llama")
        assert "(there is no folder models/llama here, so it was asked of the Hugging" in told
    for name in ("llama/", "my llama", "C:\\llama", "models/old/llama", "./llama", "~/llama"):
        assert error("check", plan, name) == f"no such model folder: {name}"


# ---- what the console can't show


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_what_the_console_cannot_show_is_replaced(encoding, plan, model, prompt, monkeypatch):
    """In the middle of an answer, in a table, in a name, and in help."""
    odd = plan.rename(plan.with_name("模型.yaml"))
    answer = ["generate", model, "--prompt-file", prompt, "--max-new-tokens", 60]
    spelled = "ĉ模 a"
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.decode", lambda *a, **k: spelled)
    for words, told in (
        (["check", odd, model], " fits "),  # click writes UTF-8 where Python would write ASCII
        (answer, "?? a"),
        (["eval", "ruler", "--help"], "cuda:1"),
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream)
            with pytest.raises(SystemExit) as end:
                app([str(word) for word in words])
        stream.flush()
        assert end.value.code in (0, None)
        assert told in stream.buffer.getvalue().decode(errors="replace")


def test_a_way_to_show_it_that_was_asked_for_is_kept(plan, monkeypatch):
    odd = plan.rename(plan.with_name("模型.yaml"))
    stream = io.TextIOWrapper(io.BytesIO(), "cp1252", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        app(["diff", str(odd), str(odd)])
    stream.flush()
    assert r"\u6a21\u578b.yaml" in stream.buffer.getvalue().decode(errors="replace")


# ---- generate


def test_generate_prints_the_answer_and_what_was_kept(plan, model, prompt):
    words = ["generate", model, "--plan", plan, "--prompt-file", prompt, "--max-new-tokens", 5]
    sparse, dense = run(*words), run(*words[:2], *words[4:])
    assert sparse.exit_code == dense.exit_code == 0, sparse.output
    answer = sparse.stdout.splitlines()[0]
    assert answer == dense.stdout.splitlines()[0]
    assert "cache" in sparse.stdout
    assert error(*words, "--exact").startswith("exact=True can't be followed: the plan's steps")


def test_generate_reads_the_prompt_in_chunks_of_a_given_size(plan, model, prompt, monkeypatch):
    from transformers import LlamaModel

    prompt.write_text("word " * 90)
    words = ["generate", model, "--plan", plan, "--prompt-file", prompt, "--max-new-tokens", 5]
    calls, forward = [], LlamaModel.forward

    def told(self, **given):
        calls.append(given["input_ids"].shape[1])
        return forward(self, **given)

    monkeypatch.setattr(LlamaModel, "forward", told)
    whole = run(*words)
    assert calls[1:] == [1] * 4
    total = calls[0]
    calls.clear()
    pieces = run(*words, "--chunk", 64)
    assert calls == [64] * (total // 64) + [total % 64] * bool(total % 64) + [1] * 4
    assert pieces.stdout.splitlines()[0] == whole.stdout.splitlines()[0]


def test_generate_gives_the_prompt_its_chat_template(model, prompt, monkeypatch):
    from transformers import LlamaForCausalLM

    seen = {}

    def generate(self, input_ids, **options):
        seen["prompt"] = tiny.tokenizer().decode(input_ids[0])

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    run("generate", model, "--prompt-file", prompt)
    assert seen["prompt"] == "<s><user>What is at the end of a long text?\n<assistant>"


def test_generate_is_greedy_whatever_the_models_settings_and_its_tokenizer_bring(
    model, prompt, tmp_path
):
    plain = run("generate", model, "--prompt-file", prompt)
    assert plain.exit_code == 0
    folder = tmp_path / "bringing"
    shutil.copytree(model, folder)
    brought = dict(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        num_beams=2,
        num_return_sequences=2,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        min_new_tokens=40,
        eos_token_id=1,
        bos_token_id=0,
    )
    (folder / "generation_config.json").write_text(json.dumps(brought))
    named = json.loads((folder / "tokenizer_config.json").read_text())
    named["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    assert "token_type_ids" in AutoTokenizer.from_pretrained(folder)("a text")
    got = run("generate", folder, "--prompt-file", prompt)
    assert got.exit_code == 0, got.exception
    assert got.stdout == plain.stdout
    said = got.stderr.splitlines()
    assert all("Loading weights" in line for line in said if line)


def test_generate_refuses_a_prompt_longer_than_the_window(model, plan, prompt):
    prompt.write_text("word " * 2000)
    message = error("generate", model, "--prompt-file", prompt, "--max-new-tokens", 5)
    whole = f"<s><user>{prompt.read_text().strip()}\n<assistant>"
    tokens = 5 + len(tiny.tokenizer(chat=True)(whole)["input_ids"])
    over = f"{tokens - 512} more than this model's window of 512 (--beyond-window passes it)"
    assert message == f"prompt and answer take {tokens} tokens, {over}"
    prompt.write_text("word " * 600)
    replace(Plan.load(plan), extend=DualChunk(512)).save(plan)
    words = ["--plan", plan, "--prompt-file", prompt, "--max-new-tokens", 2]
    assert run("generate", model, *words).exit_code == 0


def test_generate_refuses_a_plan_for_another_model(model, prompt, tmp_path):
    Plan.full(ModelId.of(tiny.llama(num_hidden_layers=3))).save(tmp_path / "three.yaml")
    words = ["--plan", tmp_path / "three.yaml", "--prompt-file", prompt]
    assert "3 layers" in error("generate", model, *words)


def test_generate_refuses_a_prompt_file_that_is_absent_empty_or_no_text(tmp_path):
    file = tmp_path / "p.txt"
    assert error("generate", "m", "--prompt-file", file) == f"there is no prompt file {file}"
    file.write_text(" \n")
    assert error("generate", "m", "--prompt-file", file) == f"the prompt file {file} is empty"
    file.write_bytes(b"\xff\xfe")
    assert "can't read the prompt file" in error("generate", "m", "--prompt-file", file)


# ---- profile


def test_profile_passes_every_option_on_and_names_the_next_command(model, tmp_path, monkeypatch):
    given = {}

    def measure(loaded, tokenizer, **options):
        given.update(options)
        return Plan.full(ModelId.of(loaded))

    monkeypatch.setattr("hfsparse.profiler.profile", measure)
    data = tmp_path / "own.jsonl"
    data.write_text(json.dumps({"text": "x"}))
    out = tmp_path / "a plan.yaml"
    shares = ["--prefill-density", 0.3, "--cache-share", 0.5, "--decode-share", 0.1]
    options = ["--lengths", "256,128", "--samples", 3, "--seed", 7, "--data", data]
    options += [
        "--method",
        "minference",
        "--no-verify",
        "--drop",
        0.02,
        "--nats",
        0.3,
        "--verify-samples",
        5,
        "--loss",
        0.2,
    ]
    result = run("profile", model, "-o", out, *shares, *options)
    assert result.exit_code == 0, result.output
    defaults = {each.name: each.default for each in fields(Settings) if each.name != "recipe"}
    assert given == defaults | {
        "out": out,
        "lengths": (256, 128),
        "samples": 3,
        "prefill_density": 0.3,
        "cache_share": 0.5,
        "decode_share": 0.1,
        "loss": 0.2,
        "seed": 7,
        "data": data,
        "method": "minference",
        "verify": False,
        "drop": 0.02,
        "nats": 0.3,
        "verify_samples": 5,
        "progress": True,
    }
    assert "recipe" not in result.stdout
    assert f"hfsparse generate {model} --plan '{out}' --prompt-file FILE" in result.stdout


def test_profile_names_the_table_that_lies_beside_its_plan(model, tmp_path, monkeypatch):
    def measure(loaded, tokenizer, **options):
        table = DataFile.of("plan.lowrank.safetensors", {"keys": torch.eye(4)})
        plan = replace(Plan.full(ModelId.of(loaded)), data={"lowrank": table})
        plan.save(options["out"])
        return plan

    monkeypatch.setattr("hfsparse.profiler.profile", measure)
    out, own = tmp_path / "plan.yaml", tmp_path / "plan.lowrank.safetensors"
    own.write_bytes(b"what another plan reads")
    result = run("profile", model, "-o", out)
    (made,) = (file.name for file in tmp_path.glob("plan.lowrank-*.safetensors"))
    assert f"wrote {out}, beside it {made}. Look at it" in result.stdout


def test_profile_ends_with_the_budgets_met_and_a_warning_of_what_the_proof_cannot_say(
    model, tmp_path, monkeypatch
):
    numbers = {"pair_density": 0.38, "cache_share": 0.85, "decode_share": 0.2}
    verified = {
        "told": "1.0 % of 96 answers lost",
        "kept": True,
        "given_back": ["layer 0 kv head 0"],
    }
    told = []

    def measure(loaded, tokenizer, **options):
        expected = {256: dict.fromkeys(numbers, 1.0), 512: numbers}
        return replace(
            Plan.full(ModelId.of(loaded)), expected=expected, made={"verified": verified}
        )

    monkeypatch.setattr("hfsparse.profiler.profile", measure)
    for change in ({}, {"kept": False}, {"told": "none: there was nothing to ask"}):
        verified |= change
        result = run("profile", model, "-o", tmp_path / "plan.yaml", "--lengths", "512")
        assert result.exit_code == 0, result.output
        told.append(result.output.strip().splitlines()[-1])
        assert (
            "budgets at 512 tokens: pairs 0.38 of 0.40 met; cache 0.85 of 0.80 not met; reads 0.20 "
            "of 0.25 met: more is kept so that the plan loses no more than its limits\n"
        ) in result.output
        assert "\x1b" not in result.output  # this is no terminal
    assert told[0].lstrip().startswith("hfsparse generate")
    assert told[1].startswith("warning: this plan loses more than its limits")
    assert told[2].startswith("warning: nothing verified this plan: there was nothing to ask.")


@pytest.mark.parametrize(
    ("verified", "warning"),
    [
        ({"told": "1.0 % of 96 answers lost", "kept": True}, None),
        ({"told": "1.0 % of 96 answers lost"}, None),  # of 0.1
        ({"told": "9.0 % of 96 answers lost", "kept": False}, "loses more than its limits"),
        ({"told": "none: no task"}, "nothing verified this plan: no task"),
        ({"told": "nothing: no task"}, "nothing verified this plan: no task"),
    ],
)
def test_profile_doubts_a_plan_that_its_proof_does_not_carry(verified, warning):
    from hfsparse.profiler.report import find_doubt

    plan = Plan.full(ModelId.of(tiny.llama()))
    assert find_doubt(plan) is None
    plan.made = {"verified": verified}
    said = find_doubt(plan)
    assert said is None if warning is None else warning in said


def test_profile_says_that_no_head_has_the_selector_or_eviction_that_was_asked_for():
    from hfsparse.profiler.report import find_unused
    from hfsparse.profiler.settings import Settings

    plan = Plan.full(ModelId.of(tiny.llama()))
    assert find_unused(plan, Settings()) is None
    said = find_unused(plan, Settings(selector="landmarks"))
    assert said.startswith("no head of this plan reads by landmarks: ")
    assert "Give a smaller --decode-share, or longer --lengths" in said
    plan.patterns = {"marks": SELECTORS["landmarks"]()}
    assert find_unused(plan, Settings(selector="landmarks")) is None
    said = find_unused(plan, Settings(selector="landmarks", eviction="snapkv"))
    assert said.startswith("no head of this plan keeps by snapkv: ")
    plan.patterns |= {"kept": EVICTIONS["snapkv"]()}
    assert find_unused(plan, Settings(eviction="snapkv")) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "1024,many"], "lengths is '1024,many': give whole numbers"),
        (["--lengths", "0"], "lengths is '0': give whole numbers"),
        (["--lengths", ""], "lengths is '': give whole numbers"),
        (["--prefill-density", "0"], "prefill_density is 0.0: give more than 0 and at most 1"),
        (["--cache-share", "1.5"], "cache_share is 1.5: give more than 0 and at most 1"),
        (["--decode-share", "nan"], "decode_share is nan: give more than 0 and at most 1"),
        (["--drop", "1.5"], "drop is 1.5: give 0 or more, and less than 1"),
        (["--nats", "-1"], "nats is -1.0: give 0 or more"),
        (["--data", "absent.jsonl"], "there is no calibration file absent.jsonl"),
        (["--recipe", "duo", "--drop", "0.1"], "--drop: of the proof, which duo leaves out"),
        (["--proxy", "copy"], "proxy copy ranks heads for duo, not for balanced"),
        (["--lengths", "256,2048"], "lengths (256, 2048): the model's window is 512 tokens"),
        (["--dtype", "int3"], "unknown dtype int3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_profile_refuses_what_it_cannot_use(model, tmp_path, options, message):
    assert message in error("profile", model, "-o", tmp_path / "plan.yaml", *options)
    assert list(tmp_path.iterdir()) == []


def test_profile_refuses_an_unwritable_output_before_it_loads_the_model(tmp_path, monkeypatch):
    def opened(model, *rest):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("hfsparse.models.loading.load", opened)
    (tmp_path / "file").touch()
    absent, inside = tmp_path / "absent" / "plan.yaml", tmp_path / "file" / "plan.yaml"
    assert "make it first" in error("profile", "m", "-o", absent)
    assert "make it first" in error("profile", "m", "-o", inside)
    assert "is a folder" in error("profile", "m", "-o", tmp_path)

    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    message = error("profile", "m", "-o", tmp_path / "plan.yaml")
    assert "can't write in" in message
    assert "No space left on device" in message


# ---- models whose layers differ

UNLIKE = dict(  # Gemma 4's global layers have other heads than its windowed ones
    vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=3, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, global_head_dim=16, num_global_key_value_heads=1,
    attention_k_eq_v=True, hidden_size_per_layer_input=0, vocab_size_per_layer_input=400,
    num_kv_shared_layers=0, sliding_window=40, max_position_embeddings=512,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
)  # fmt: skip
SERVED = {
    "new": "new {model} -o {out}",
    "explain": "explain {model} --plan {plan}",
    "check": "check {plan} {model}",
    "check of a length": "check {plan} {model} --length 100",
    "generate": "generate {model} --prompt-file {prompt}",
    "generate by a plan": "generate {model} --prompt-file {prompt} --plan {plan}",
    "bench": "bench {model} --lengths 16",
    "import": "import minference {published} -o {out} --model-config {model}",
    "eval": "eval ppl {model} --plan {plan} --output {out} --lengths 128 --samples 1",
}


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    """A folder of a model whose windowed layer has other kv heads than the full one."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Gemma4ForCausalLM"):
        pytest.skip("this transformers has no Gemma 4")
    folder = tmp_path_factory.mktemp("models") / "gemma4"
    config = transformers.Gemma4TextConfig(**UNLIKE)
    transformers.Gemma4ForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer(True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", SERVED)
def test_every_command_serves_heads_that_differ_by_layer(command, unlike, prompt, tmp_path):
    published = tmp_path / "published.json"
    pattern = [{str(h): ["vertical_and_slash", 100, 800, 1] for h in range(4)}] * 3
    published.write_text(json.dumps(pattern))
    plan = tmp_path / "plan.yaml"
    Plan.full(ModelId.of(load_config(str(unlike)))).save(plan)
    named = dict(model=unlike, plan=plan, prompt=prompt, published=published, out=tmp_path / "out")
    result = run(*(word.format(**named) for word in SERVED[command].split()))
    assert result.exit_code == 0, (result.output, result.stderr, result.exception)


TEXTS = dict(
    vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=3, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
VISION = dict(hidden_size=32, num_heads=2, num_attention_heads=2, intermediate_size=32, depth=1)
MULTIMODAL = {  # what commands load is the text half of the class that the folder names
    "qwen3_5": (
        "Qwen3_5",
        dict(
            linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
            linear_value_head_dim=16, layer_types=["linear_attention"] + ["full_attention"] * 2,
        ),
        dict(VISION, out_hidden_size=64),
    ),
    "llama4": (
        "Llama4",
        dict(
            attention_chunk_size=64, no_rope_layers=[1, 0, 0], num_local_experts=2,
            intermediate_size_mlp=64,
            layer_types=["chunked_attention"] + ["full_attention"] * 2,
        ),
        dict(VISION, num_hidden_layers=1, image_size=28, patch_size=14, vision_output_dim=64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MULTIMODAL)
def test_commands_and_python_agree_on_the_class_of_a_multimodal_folder(family, prompt, tmp_path):
    """Plans of commands that read a config, of those that load, and of the whole model fit all."""
    transformers = pytest.importorskip("transformers")
    prefix, more, vision = MULTIMODAL[family]
    if not hasattr(transformers, f"{prefix}ForConditionalGeneration"):
        pytest.skip(f"this transformers has no {prefix}")
    whole = getattr(transformers, f"{prefix}ForConditionalGeneration")
    config = whole.config_class(text_config=dict(TEXTS, **more), vision_config=vision)
    built = whole(config).eval()
    built.save_pretrained(folder := tmp_path / "model")
    tiny.tokenizer(True).save_pretrained(folder)
    plans = [tmp_path / f"{name}.yaml" for name in ("new", "profiled", "python")]
    for words in (
        ("new", folder, "-o", plans[0]),
        ("profile", folder, "-o", plans[1], "--lengths", 512, "--samples", 1, "--no-verify"),
    ):
        result = run(*words)
        assert result.exit_code == 0, (result.output, result.stderr, result.exception)
    assert f"note: the text half of this model is loaded, {prefix}ForCausalLM" in result.stderr
    Plan.full(ModelId.of(built)).save(plans[2])
    classes = [Plan.load(plan).model.class_name for plan in plans]
    assert classes == [f"{prefix}ForCausalLM"] * 2 + [f"{prefix}ForConditionalGeneration"]
    assert f"{prefix}ForCausalLM, 3 layers" in run("doctor", folder).stdout
    for plan in plans:
        Plan.load(plan).check(built)
        for words in (
            ("check", plan, folder),
            ("explain", folder, "--plan", plan),
            ("generate", folder, "--plan", plan, "--prompt-file", prompt, "--max-new-tokens", 2),
        ):
            result = run(*words)
            assert result.exit_code == 0, (result.output, result.stderr, result.exception)


def test_check_says_what_patch_would_say(tmp_path):
    """The plan fits the config, and patch would refuse the model."""
    transformers = pytest.importorskip("transformers")
    config = transformers.PhimoeConfig(
        vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=40, num_local_experts=4,
        architectures=["PhimoeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    Plan.full(ModelId.of(config)).save(tmp_path / "plan.yaml")
    said = error("check", tmp_path / "plan.yaml", tmp_path)
    assert "can't be patched" in said
