"""What decides attention in the config.json of each model whose plan is shipped.

    config("meta-llama/Llama-3.1-8B-Instruct")     # of transformers, without the hub

The values were read in public copies of the models' config.json, of Llama-2-7B-32K-Instruct in one
of LLaMA-2-7B-32K, which it was tuned from. The rest of a config leaves a fingerprint as it is.
"""

from __future__ import annotations

from typing import Any

# LongRoPE's factors of Phi-3-mini-128k-instruct, a number a pair of channels.
LONG = """
1.0700000524520874 1.1200000047683716 1.149999976158142 1.4199999570846558 1.5699999332427979
1.7999999523162842 2.129999876022339 2.129999876022339 3.009999990463257 5.910000324249268
6.950000286102295 9.070000648498535 9.930000305175781 10.710000038146973 11.130000114440918
14.609999656677246 15.409998893737793 19.809999465942383 37.279998779296875 38.279998779296875
38.599998474121094 40.12000274658203 46.20000457763672 50.940006256103516 53.66000747680664
54.9373893737793 56.89738845825195 57.28738784790039 59.98738479614258 60.86738586425781
60.887386322021484 61.71739196777344 62.91739273071289 62.957393646240234 63.41739273071289
63.8173942565918 63.83739471435547 63.897396087646484 63.93739700317383 64.06739807128906
64.11434936523438 64.12435150146484 64.15435028076172 64.19435119628906 64.24435424804688
64.57435607910156 64.69000244140625 64.76000213623047
"""
SHORT = f"""
1.1 1.1 1.1 1.3000000000000003 1.3500000000000003 1.3500000000000003 1.4000000000000004
1.5500000000000005 {"2.000000000000001 " * 17} {"2.0500000000000007 " * 6}
2.1000000000000005 2.1000000000000005 2.1500000000000004 2.25 2.25 2.25 2.25 2.25
2.3999999999999995 2.4499999999999993 2.499999999999999 2.6999999999999984 2.6999999999999984
2.7499999999999982 2.799999999999998 2.8999999999999977 3.049999999999997
"""


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def _shape(layers: int, q_heads: int, kv_heads: int, hidden: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
    }


def _llama3(factor: float) -> dict[str, Any]:
    """The rope of Llama 3.1 and 3.2."""
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    longest = 131072
    return {"rope_theta": 5e5, "rope_scaling": scaling, "max_position_embeddings": longest}


def _linear(factor: float) -> dict[str, Any]:
    return {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": factor}}


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
PHI = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA | _shape(32, 32, 8, 4096) | _llama3(8.0),
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA
    | _shape(16, 32, 8, 2048)
    | _llama3(32.0)
    | {"head_dim": 64, "tie_word_embeddings": True},
    "gradientai/Llama-3-8B-Instruct-262k": LLAMA
    | _shape(32, 32, 8, 4096)
    | {"rope_theta": 283461213.0, "max_position_embeddings": 262144},
    "togethercomputer/Llama-2-7B-32K-Instruct": LLAMA
    | _shape(32, 32, 32, 4096)
    | _linear(8.0)
    | {"max_position_embeddings": 32768},
    "lmsys/vicuna-7b-v1.5-16k": LLAMA
    | _shape(32, 32, 32, 4096)
    | _linear(4.0)
    | {"max_position_embeddings": 4096},
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL
    | _shape(32, 32, 8, 4096)
    | {"rope_theta": 1e6, "sliding_window": None, "max_position_embeddings": 32768},
    "Qwen/Qwen2.5-7B-Instruct": QWEN
    | _shape(28, 28, 4, 3584)
    | {"rope_theta": 1e6, "sliding_window": 131072, "max_window_layers": 28}
    | {"max_position_embeddings": 32768},
    "Qwen/Qwen2.5-7B-Instruct-1M": QWEN
    | _shape(28, 28, 4, 3584)
    | {"rope_theta": 1e7, "sliding_window": 32768, "max_window_layers": 28}
    | {"max_position_embeddings": 1010000},
    "microsoft/Phi-3-mini-128k-instruct": PHI
    | _shape(32, 32, 32, 3072)
    | {"rope_theta": 1e4, "sliding_window": 262144, "max_position_embeddings": 131072}
    | {"original_max_position_embeddings": 4096}
    | {
        "rope_scaling": {
            "type": "longrope",
            "long_factor": _numbers(LONG),
            "short_factor": _numbers(SHORT),
        }
    },
}


def config(model: str) -> Any:
    """The config of a model, as transformers makes it of these values."""
    from transformers import AutoConfig

    values = dict(CONFIGS[model])
    return AutoConfig.for_model(values.pop("model_type"), **values)
