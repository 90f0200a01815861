"""generate() of random-weight models, patched against unpatched, in one process.

    python benchmarks/generate.py --output benchmarks/results/generate-h100.json

Eager, batch 1, float16, greedy. Per model: tokens per second (median and range over the repeats,
both sides alternating), kernel launches per decode step (from torch.profiler), logits error.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import hf_triton_mlp
from hf_triton_mlp import patch_model, unpatch_model

#: The published configurations; weights are random, speed does not depend on them.
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config()),
    "opt-1.3b": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=2048,
            ffn_dim=8192,
            num_hidden_layers=24,
            num_attention_heads=32,
            word_embed_proj_dim=2048,
        )
    ),
}


def build(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = MODELS[name]()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def generate(model: Any, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )


def launches(model: Any, prompt: torch.Tensor, tokens: int) -> int:
    """Kernels on the GPU, without copies and fills, in one generate() call."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        generate(model, prompt, tokens)
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(
        event.device_type == cuda and not event.name.startswith(("Memcpy", "Memset"))
        for event in profiler.events()
    )


def launches_per_step(model: Any, prompt: torch.Tensor) -> float:
    """The difference of two lengths leaves the prefill out."""
    short, long = (launches(model, prompt, tokens) for tokens in (8, 16))
    return (long - short) / 8


def seconds(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    generate(model, prompt, tokens)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def logits_error(model: Any, prompt: torch.Tensor) -> dict[str, float]:
    """RMS logits error against the float32 model, relative to the RMS of its logits."""
    with torch.no_grad():
        original = model(prompt).logits
        patched = patch_model(model)(prompt).logits
        unpatch_model(model)
        reference = copy.deepcopy(model).float()(prompt).logits
    scale = reference.norm()
    return {
        "torch": ((original - reference).norm() / scale).item(),
        "patched": ((patched - reference).norm() / scale).item(),
    }


def measure(name: str, prompt_tokens: int, tokens: int, repeats: int) -> dict[str, Any]:
    model = build(name, torch.float16)
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), device="cuda")
    rates: dict[str, list[float]] = {"unpatched": [], "patched": []}
    steps: dict[str, float] = {}
    texts: dict[str, list[int]] = {}
    for repeat in range(repeats + 1):
        for side in rates:
            if side == "patched":
                patch_model(model)
            if repeat == 0:  # compiles the kernels and warms the allocator up
                texts[side] = generate(model, prompt, tokens)[0].tolist()
                steps[side] = launches_per_step(model, prompt)
            else:
                rates[side].append(tokens / seconds(model, prompt, tokens))
            unpatch_model(model)
    result: dict[str, Any] = {"model": name, "dtype": "float16", "batch": 1}
    result |= {"prompt_tokens": prompt_tokens, "new_tokens": tokens, "repeats": repeats}
    for side, values in rates.items():
        result[side] = {
            "tokens_per_second": statistics.median(values),
            "tokens_per_second_range": [min(values), max(values)],
            "launches_per_step": steps[side],
        }
    result["speedup"] = (
        result["patched"]["tokens_per_second"] / result["unpatched"]["tokens_per_second"]
    )
    same = [a == b for a, b in zip(texts["patched"], texts["unpatched"], strict=True)]
    result["equal_greedy_tokens"] = same.index(False) - prompt_tokens if False in same else tokens
    result["logits_error"] = logits_error(model, prompt)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results = [
        measure(name, arguments.prompt_tokens, arguments.new_tokens, arguments.repeats)
        for name in arguments.models
    ]
    record = {
        "benchmark": "generate",
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "hf_triton_mlp": hf_triton_mlp.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
    }
    text = json.dumps(record, indent=2)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    for result in results:
        for side in ("unpatched", "patched"):
            r = result[side]
            print(
                f"{result['model']:10} {side:10} {r['tokens_per_second']:7.1f} tokens/s "
                f"{r['launches_per_step']:6.1f} launches/step"
            )
        print(f"{'':10} speedup {result['speedup']:.2f}, errors {result['logits_error']}")


if __name__ == "__main__":
    main()
