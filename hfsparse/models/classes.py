"""Which class of transformers a model is loaded by, and which two have one text decoder."""

from __future__ import annotations

from typing import Any


def class_of(config: Any) -> type | None:
    """The class that commands load a config's model by; None where transformers has none.

    It is that of AutoModelForCausalLM, which for some multimodal models (Qwen3.5, Llama 4) is
    their text half; without one, the first of `architectures`.
    """
    import transformers

    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return causal or _named((getattr(config, "architectures", None) or [""])[0])


def is_half(one: type, whole: Any) -> bool:
    """Whether model class `one` is the text half of a multimodal config or model class."""
    parts = getattr(getattr(whole, "config_class", whole), "sub_configs", None) or {}
    text = parts.get("text_config")
    return text is not None and one.config_class is text


def same_decoder(one: str, other: str) -> bool:
    """Whether two model classes, by name, are one, or one is the other's text half."""
    if one == other:
        return True
    pair = _named(one), _named(other)
    return None not in pair and (is_half(*pair) or is_half(*reversed(pair)))


def _named(name: str) -> type | None:
    """A model class of transformers."""
    import transformers

    found = getattr(transformers, name, None)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known else None
