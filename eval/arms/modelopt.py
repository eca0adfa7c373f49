"""Skip-softmax of nvidia-modelopt as an arm (BLASST, arXiv 2512.12087)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from types import SimpleNamespace

import torch

from hfsparse.errors import UsageError
from hfsparse.profiler.prompts.calibration import make_prompts
from hfsparse_eval.arms import FORMS, Arm, read_share

TILE = 128
SAMPLES = 4  # prompts of calibration at each length: one of each kind that `profile` uses
NEVER = 1e-30  # as a threshold: decode is dense


class ModelOpt(Arm):
    """Skips tiles of 128x128 scores in prompts, calibrated for a share of them; decode is dense.

    modelopt's PyTorch form runs on eager attention, which holds all scores of a layer: it tells
    what skipping costs in answers, not in time, and takes `S * S` numbers a head.
    """

    batches = False  # tiles of padding would count

    def __init__(self, name: str, words: list[str]):
        if len(words) != 1:
            raise UsageError(f"arm {name}: give {FORMS}")
        self.name = self.title = name
        self.share = read_share(name, words[0])
        self.fitted = None  # modelopt's threshold by length and share
        try:
            self.package = import_module("modelopt.torch.sparsity.attention_sparsity")
        except ImportError as error:
            raise UsageError(f"arm {name}: modelopt can't be imported: {error}") from error

    def prepare(self, tokenizer, lengths) -> None:
        self.prompts = [p.ids for n in lengths for p in make_prompts(tokenizer, n, SAMPLES, seed=0)]

    @contextmanager
    def on(self, model) -> Iterator[Tiles]:
        known, form = set(vars(model)), model.config._attn_implementation
        try:
            with redirect_stdout(io.StringIO()):
                self.package.sparsify(model, self._settings(), forward_loop=self._read)
            heads = [m for m in model.modules() if hasattr(m, "_sparse_method_instance")]
            methods = [head._sparse_method_instance for head in heads]
            self.fitted = self.fitted or methods[0].calibration_params
            if not self.fitted:
                raise ValueError("modelopt's calibration found no thresholds on these lengths")
            for method in methods:
                method.thresholds_config = {"prefill": [NEVER], "decode": [NEVER]}
                method.calibration_params = self.fitted
                method.target_sparse_ratio = {"prefill": self.share}
            tiles = Tiles()
            for head in heads:
                head._stats_manager = tiles
            yield tiles
        finally:
            for module in [m for m in model.modules() if hasattr(m, "_sparse_method_instance")]:
                module.export()
                for left in ("_sparse_method_instance", "_stats_manager", "_last_stats"):
                    vars(module).pop(left, None)
            for left in set(vars(model)) - known:
                delattr(model, left)
            model.config._attn_implementation = form

    def _settings(self) -> dict:
        attention = {
            "method": "flash_skip_softmax",
            "backend": "pytorch",
            "br": TILE,
            "bc": TILE,
            "thresholds": {"prefill": [NEVER], "decode": [NEVER]},
            "collect_stats": True,
            "enable": True,
        }
        settings = {"*attn*": attention, "default": {"enable": False}}
        if not self.fitted:
            ratio = {"prefill": self.share, "decode": 0.0}
            settings["calibration"] = {"target_sparse_ratio": ratio}
        return {"sparse_cfg": settings}

    def _read(self, model) -> None:
        with torch.inference_mode():
            for ids in self.prompts:
                model(ids.to(model.device), use_cache=False)


class Tiles:
    """Counts tiles where modelopt reports them, a layer at a time."""

    enabled = True

    def __init__(self):
        self.kept: list[float] = []

    def begin(self, sample) -> None:
        self.kept = []

    def collect(self, stats: dict) -> None:
        if stats["phase"] == "prefill":
            self.kept.append(1 - stats["sparsity"][0])

    def stats(self) -> SimpleNamespace:
        """The share of tiles that were computed. Those on the diagonal count as whole ones."""
        kept = sum(self.kept) / len(self.kept)
        return SimpleNamespace(
            pair_density=kept,
            block_density=kept,
            decode_share=1.0,
            cache_share=1.0,
            kv_bytes=None,
        )
