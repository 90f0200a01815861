"""What quantizing its MLPs costs a model: perplexity, divergence, errors of weights; and saves."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_triton_mlp.linear import quantized_linears
from hf_triton_mlp.validation import windows


@dataclass(frozen=True)
class QualityReport:
    """A quantized model beside the original.

    perplexities: of one text. kl_divergence: of what the original predicts for a next token from
    what the quantized model does (Kullback and Leibler's, in nats), the mean over the text.
    bytes: of all parameters and buffers. weight_errors: |quantized - original| / |original| of each
    weight, Euclidean, by the name of its layer.
    """

    perplexity_original: float
    perplexity_quantized: float
    kl_divergence: float
    bytes_original: int
    bytes_quantized: int
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
        before = original.get_submodule(name)
        weight = (before.weight.t() if type(before) is Conv1D else before.weight).float()
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
        weight_errors=errors,
    )
