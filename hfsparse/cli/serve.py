"""`hfsparse serve`: transformers' OpenAI-compatible server, with a model that follows a plan."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from hfsparse.cli.application import Device, Dtype, Model
from hfsparse.cli.run import PlanOption
from hfsparse.errors import Error, UsageError

PAGE_SIZE = 256  # tokens of a page of transformers' cache, if nothing else is said
HANDLERS = {  # of routes, by what transformers' `build_server` calls them
    "chat_handler": ("chat_completion", "ChatCompletionHandler"),
    "completion_handler": ("completion", "CompletionHandler"),
    "response_handler": ("response", "ResponseHandler"),
    "transcription_handler": ("transcription", "TranscriptionHandler"),
    "systemone_handler": ("systemone", "SystemOneHandler"),
}


def serve(
    model: Model,
    plan: PlanOption = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 8000,
    cache_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that all requests' cache holds; what memory allows."),
    ] = None,
    one_by_one: Annotated[
        bool, typer.Option(help="Answer requests one after another, by generate.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a model under a plan, at OpenAI-compatible routes, by continuous batching."""
    _need_packages()

    import uvicorn

    from hfsparse.models.loading import load
    from hfsparse.patcher import batching, patch
    from hfsparse.patcher.state import state_of
    from hfsparse.plan.sources import open_plan

    asked = "as asked" if one_by_one else None
    _need_batching(cache_tokens, asked)
    _need_address(host, port)
    chosen = open_plan(plan) if plan is not None else None
    loaded, tokenizer = load(model, device, dtype)
    with patch(loaded, chosen) as handle:
        why = asked or batching.why_not(state_of(loaded))
        _need_batching(cache_tokens, why)
        how = "continuous batching" if why is None else f"one request after another ({why})"
        app = server(loaded, tokenizer, model, why is None, cache_tokens)
        typer.echo(f"{model} at http://{host}:{port}/v1, {how}")
        uvicorn.run(app, host=host, port=port)
        typer.echo(str(handle.stats()))


def server(
    model: Any, tokenizer: Any, name: str, batched: bool, cache_tokens: int | None = None
) -> Any:
    """transformers' serving app, whose one model is this object, under a name."""
    from transformers import ContinuousBatchingConfig
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerateManager, GenerationState

    class Held(ModelManager):
        """Has the model that it is asked for, and no other."""

        def _load_processor(self, *args, **more):
            return tokenizer

        def _load_model(self, *args, **more):
            return model

        def get_gen_models(self, *args):
            """What `/v1/models` lists, in 5.17; newer versions list this model by themselves."""
            return [{"id": name, "object": "model", "created": 0, "owned_by": "hfsparse"}]

    class OneByOne(GenerateManager):
        generate_streaming = _checked(GenerateManager.generate_streaming)
        generate_non_streaming = _checked(GenerateManager.generate_non_streaming)

    class State(GenerationState):
        def get_manager(self, *args, use_cb=False):
            return super().get_manager(*args, use_cb=True) if use_cb else one_by_one

    one_by_one, config = OneByOne(), ContinuousBatchingConfig()
    if cache_tokens is not None:
        config.num_blocks = -(-cache_tokens // PAGE_SIZE)
    state = State(continuous_batching=batched, cb_config=config)
    known, asked = Held(force_model=name), inspect.signature(build_server).parameters
    made = {
        part: getattr(import_module(f"transformers.cli.serving.{module}"), kind)(known, state)
        for part, (module, kind) in HANDLERS.items()
        if part in asked
    }
    app = build_server(known, generation_state=state, **made)
    app.add_exception_handler(Error, _refuse)
    return app


def _checked(answer: Callable) -> Callable:
    """The same, where `generate` can answer; UsageError before an answer begins, where it can't."""
    from hfsparse.patcher.batching import check_prompt

    @wraps(answer)
    def ask(self, model, processor, inputs, config, *args, **more):
        check_prompt(inputs["input_ids"][0])
        asked = config.max_new_tokens
        if asked is not None and asked < 1:
            raise UsageError(f"this request asks for {asked} new tokens: ask for one or more")
        return answer(self, model, processor, inputs, config, *args, **more)

    return ask


async def _refuse(request: Any, error: Exception) -> Any:
    """The answer to a request that can't be followed: 400, with the sentence that says why."""
    from fastapi.responses import JSONResponse

    return JSONResponse({"detail": str(error)}, 400)


def _need_batching(cache_tokens: int | None, why: str | None) -> None:
    """UsageError where requests share no cache, whose size was given; `why` they share none."""
    if cache_tokens is not None and why is not None:
        raise UsageError(
            "--cache-tokens is of the cache that requests share, and they come one after another "
            f"({why}): leave it out"
        )


def _need_address(host: str, port: int) -> None:
    """UsageError where nothing can listen there: told before weights are read."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UsageError(
            f"can't listen at {host}, port {port} ({error.strerror}): "
            "give another --port, or a --host of this machine"
        ) from None


def _need_packages() -> None:
    """UsageError where transformers has no server, or the packages that it needs are missing."""
    import transformers
    from transformers.utils import import_utils

    if not (find_spec("transformers.cli") and find_spec("transformers.cli.serving")):
        raise UsageError(
            "hfsparse serve needs transformers 5.17.0 or newer, whose server takes a model object; "
            f"this is {transformers.__version__}"
        )
    if not import_utils.is_serve_available():
        raise UsageError(
            "hfsparse serve needs fastapi, uvicorn, pydantic and openai: "
            "pip install 'hfsparse[serve]'"
        )
