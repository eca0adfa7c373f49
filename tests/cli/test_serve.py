"""hfsparse serve: what it needs, and that its routes answer under the plan."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from types import ModuleType
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from transformers.utils import import_utils
from typer.testing import CliRunner

import hfsparse
from hfsparse.cli import app
from hfsparse.cli.serve import server
from hfsparse.patcher import batching
from tests import tiny
from tests.patcher.families import streaming


def test_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    result = CliRunner().invoke(app, ["serve", "nowhere"])
    assert result.exit_code == 1
    wanted = r"pip install 'hfsparse[serve]'" if batching.KNOWN else batching.OLDEST
    assert wanted in result.output


@pytest.mark.skipif(not batching.KNOWN, reason=f"transformers is before {batching.OLDEST}")
def test_a_model_that_is_not_there_is_told_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    monkeypatch.setitem(sys.modules, "uvicorn", ModuleType("uvicorn"))
    monkeypatch.setattr(sys.modules[server.__module__], "_need_address", lambda *_: None)
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "nowhere")])
    assert result.exit_code == 1
    assert result.output == f"error: no such model folder: {tmp_path / 'nowhere'}\n"


@pytest.mark.skipif(not batching.KNOWN, reason=f"transformers is before {batching.OLDEST}")
def test_a_cache_that_requests_do_not_share_has_no_size(monkeypatch):
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    monkeypatch.setitem(sys.modules, "uvicorn", ModuleType("uvicorn"))
    asked = ["serve", "nowhere", "--one-by-one", "--cache-tokens", "9"]
    assert "one after another (as asked): leave it out" in CliRunner().invoke(app, asked).output


@pytest.mark.skipif(not batching.KNOWN, reason=f"transformers is before {batching.OLDEST}")
def test_a_port_that_is_taken_is_told_before_the_model_is_read(monkeypatch):
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    monkeypatch.setitem(sys.modules, "uvicorn", ModuleType("uvicorn"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        asked = ["serve", "nowhere", "--host", "127.0.0.1", "--port", str(port)]
        result = CliRunner().invoke(app, asked)
    assert result.exit_code == 1
    assert result.output.startswith(f"error: can't listen at 127.0.0.1, port {port} (")


@pytest.mark.skipif(not batching.KNOWN, reason=f"transformers is before {batching.OLDEST}")
@pytest.mark.parametrize("batched", [True, False])
def test_its_routes_answer_under_the_plan(batched):
    uvicorn = pytest.importorskip("uvicorn")
    for name in ("fastapi", "openai", "pydantic"):
        pytest.importorskip(name)
    model, tokenizer = tiny.llama(), tiny.tokenizer(chat=True)
    prompt = "def tokenizer(chat: bool = False): " * 12
    with hfsparse.patch(model, streaming(model)) as handle:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        want = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        handle.reset_stats()
        made = server(model, tokenizer, "mine", batched, cache_tokens=4096)
        serving = uvicorn.Server(uvicorn.Config(made, port=0, log_level="error"))
        thread = threading.Thread(target=serving.run)
        thread.start()
        try:
            while not serving.started:
                time.sleep(0.01)
            port = serving.servers[0].sockets[0].getsockname()[1]
            asked = {"prompt": prompt, "max_tokens": 5, "temperature": 0}
            headers = {"Content-Type": "application/json"}
            url = f"http://127.0.0.1:{port}/v1/completions"
            # What comes behind a request that is refused is answered all the same.
            wrong = [({"prompt": ""}, "holds no tokens"), ({"max_tokens": 0}, "asks for 0 new")]
            for part, words in wrong[: 1 if batched else 2]:
                for stream in (False, True):
                    bad = json.dumps(asked | part | {"stream": stream}).encode()
                    with pytest.raises(HTTPError, match="400") as refused:
                        urlopen(Request(url, bad, headers), timeout=60)
                    assert words in refused.value.read().decode()
            request = Request(url, json.dumps(asked).encode(), headers)
            with urlopen(request, timeout=60) as answer:
                text = json.loads(answer.read())["choices"][0]["text"]
        finally:
            serving.should_exit = True
            thread.join()
        assert text == tokenizer.decode(want, skip_special_tokens=True)
        assert handle.stats().pair_density < 1
