"""Eager generate() of random-weight models, patched against unpatched, in one process.

    python benchmarks/generate.py --output benchmarks/results/generate-h100.json

Batch 1, float16, greedy. Two copies of a model, one patched, generate in turn in short rounds, and
the speedup is the median of the rounds' ratios: the speed of a host drifts by more than what is
measured, but little within a round. Launches are kernels a decode step, from torch.profiler.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from hf_triton_mlp import patch_model
from hf_triton_mlp.bench import versions

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
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(name: str) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device(DEVICE):
        model = MODELS[name]()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def generate(model: Any, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """The new tokens."""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=0,
    )
    assert output.shape[1] == prompt.shape[1] + tokens
    return output[0, prompt.shape[1] :]


def launches_per_step(model: Any, prompt: torch.Tensor) -> float:
    """Kernels on the GPU, without copies and fills; the prefill is left out by a difference."""

    def launches(tokens: int) -> int:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            generate(model, prompt, tokens)
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        return sum(
            event.device_type == cuda and not event.name.startswith(("Memcpy", "Memset"))
            for event in profiler.events()
        )

    return (launches(16) - launches(8)) / 8


def rate(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Tokens per second of one call. It ends with a copy to the host: the GPU is done then."""
    start = time.perf_counter()
    generate(model, prompt, tokens).tolist()
    return tokens / (time.perf_counter() - start)


def logits_errors(sides: dict[str, Any], prompt: torch.Tensor) -> dict[str, float]:
    """RMS logits error of each side against the float32 model, relative to RMS logits."""
    with torch.no_grad():
        reference = copy.deepcopy(sides["unpatched"]).float()(prompt).logits
        errors = {side: model(prompt).logits - reference for side, model in sides.items()}
    return {side: (error.norm() / reference.norm()).item() for side, error in errors.items()}


def spread(values: Sequence[float]) -> dict[str, Any]:
    quartiles = [round(value, 4) for value in statistics.quantiles(values, n=4)]
    extremes = [round(value, 4) for value in (min(values), max(values))]
    return {"median": quartiles[1], "quartiles": quartiles[::2], "range": extremes}


def measure(name: str, prompt_tokens: int, tokens: int, rounds: int) -> dict[str, Any]:
    model = build(name)
    sides = {"unpatched": model, "patched": patch_model(copy.deepcopy(model))}
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), device=DEVICE)
    # The first calls compile the kernels and warm the allocator up.
    texts = [generate(each, prompt, tokens).tolist() for each in sides.values()]
    steps = {side: launches_per_step(sides[side], prompt) for side in sides if DEVICE == "cuda"}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        # Who goes first alternates, so that a steady drift favours neither.
        for side in sorted(sides, reverse=number % 2 == 0):
            rates[side].append(rate(sides[side], prompt, tokens))
    pairs = zip(rates["patched"], rates["unpatched"], strict=True)
    same = [a == b for a, b in zip(*texts, strict=True)]
    return {
        "model": name,
        "dtype": "float16",
        "batch": 1,
        "prompt_tokens": prompt_tokens,
        "new_tokens": tokens,
        "rounds": rounds,
        "speedup": spread([patched / unpatched for patched, unpatched in pairs]),
        "tokens_per_second": {side: spread(values) for side, values in rates.items()},
        "launches_per_step": steps,
        "equal_greedy_tokens": same.index(False) if False in same else tokens,
        "logits_error": logits_errors(sides, prompt),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    record: dict[str, Any] = {
        "benchmark": "generate",
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "versions": versions(),
        "results": [],
    }
    for name in arguments.models:
        result = measure(name, arguments.prompt_tokens, arguments.new_tokens, arguments.rounds)
        record["results"].append(result)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(record, indent=2) + "\n")
        for side, tokens in result["tokens_per_second"].items():
            launches = result["launches_per_step"].get(side, "-")
            print(f"{name:10} {side:10} {tokens['median']:7.1f} tokens/s, {launches} launches/step")
        speedup = result["speedup"]
        low, high = speedup["quartiles"]
        print(
            f"{'':10} speedup {speedup['median']:.2f} (half of the rounds {low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
