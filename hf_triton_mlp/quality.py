"""What quantizing its MLPs costs a model: perplexity, divergence, errors of weights; and saves."""

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from hf_triton_mlp.linear import quantized_linears
from hf_triton_mlp.reading import projection_weight
from hf_triton_mlp.validation import windows

#: Tokens of a prompt, and new ones, that decoding is timed with.
PROMPT, NEW_TOKENS = 16, 33


@dataclass(frozen=True)
class QualityReport:
    """A quantized model beside the original.

    perplexities: of one text. kl_divergence: of what the original predicts for a next token from
    what the quantized model does (Kullback and Leibler's, in nats), the mean over the text.
    bytes: of all parameters and buffers. ms_per_token: of greedy decoding, one text.
    weight_errors: |quantized - original| / |original| of each weight, Euclidean, by the name of its
    layer.
    """

    perplexity_original: float
    perplexity_quantized: float
    kl_divergence: float
    bytes_original: int
    bytes_quantized: int
    ms_per_token_original: float
    ms_per_token_quantized: float
    weight_errors: dict[str, float]


@torch.no_grad()
def compare(original: Any, quantized: Any, tokens: Tensor, *, window: int = 1024) -> QualityReport:
    """Compare two causal language models on tokens (length,), in windows of their context length.

    Raises ValueError for a text of less than two tokens, and where nothing is quantized.
    """
    losses, divergence, count = [0.0, 0.0], 0.0, 0
    for part in windows(original, tokens, window):
        predicted = [
            F.log_softmax(model(part[None].to(model.device)).logits[0, :-1].float(), dim=-1)
            for model in (original, quantized)
        ]
        predicted[1] = predicted[1].to(part.device)
        for side, each in enumerate(predicted):
            losses[side] += F.nll_loss(each, part[1:], reduction="sum").item()
        ours, theirs = predicted[1], predicted[0]
        divergence += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
        count += len(part) - 1
    errors: dict[str, float] = {}
    for name, linear in quantized_linears(quantized):
        weight: Any = projection_weight(original.get_submodule(name))
        weight = weight.float()
        difference = linear.quantized.dequantize(torch.float32).to(weight.device) - weight
        errors[name] = (difference.norm() / weight.norm()).item()
    if not errors:
        raise ValueError("nothing is quantized in the model that is compared")
    before, after = (math.exp(min(loss / count, 700.0)) for loss in losses)
    return QualityReport(
        perplexity_original=before,
        perplexity_quantized=after,
        kl_divergence=divergence / count,
        bytes_original=original.get_memory_footprint(),
        bytes_quantized=quantized.get_memory_footprint(),
        ms_per_token_original=ms_per_token(original, tokens),
        ms_per_token_quantized=ms_per_token(quantized, tokens),
        weight_errors=errors,
    )


def ms_per_token(model: Any, tokens: Tensor, *, calls: int = 3) -> float:
    """Milliseconds that generate() takes for a token after the first, the median of a few calls.

    tokens (length,): a few of them are the prompt.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    prompt = tokens[None, : min(PROMPT, positions // 2)].to(model.device)
    new_tokens = int(min(NEW_TOKENS, positions - prompt.shape[1]))
    # Greedy, and no token ends the text.
    config = GenerationConfig(pad_token_id=0, do_sample=False)

    def seconds(length: int) -> float:
        start = time.perf_counter()
        mask = torch.ones_like(prompt)
        output = model.generate(
            prompt, attention_mask=mask, generation_config=config, max_new_tokens=length
        )
        output.tolist()  # the GPU is done then
        return time.perf_counter() - start

    for length in (new_tokens, 1):  # compiles and captures
        seconds(length)
    spans = [seconds(new_tokens) - seconds(1) for _ in range(calls)]
    return 1e3 * statistics.median(spans) / (new_tokens - 1)
