"""How many of an MLP's hidden values are not exactly zero, while a model computes tokens."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

#: Random tokens that tell a density, where nobody has better ones.
TOKENS = 64


def hidden_densities(model: nn.Module, downs: Mapping[str, nn.Module]) -> dict[str, float]:
    """What part of the inputs of these down projections is not 0, for one random token at a time.

    Empty where the model does not compute any: in training, which has a random state that is not
    ours, without a vocabulary, or where it fails.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if model.training or not isinstance(size, int) or getattr(config, "is_encoder_decoder", False):
        return {}
    length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    ids = torch.randint(size, (1, length), generator=torch.Generator().manual_seed(0))
    try:
        return {name: found[1] for name, found in densities(model, downs, ids).items()}
    except Exception as error:
        logger.warning("no zeros are skipped: the model that would tell how many fails: %s", error)
        return {}


def texts(tokens: Tensor, count: int, longest: int) -> Tensor:
    """As many equal parts (count, length) of tokens (length,), none longer than that.

    Raises ValueError where that leaves none.
    """
    length = min(len(tokens) // count, longest)
    if length == 0:
        raise ValueError(f"{count} texts need as many tokens, found {len(tokens)}")
    return tokens[: count * length].view(count, length)


def _input_device(model: nn.Module) -> torch.device:
    """Where a model takes tokens: where accelerate's hooks move them, or else its first weights."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), None)
    return next(model.parameters()).device if found is None else torch.device(found)


@torch.no_grad()
def densities(
    model: nn.Module, downs: Mapping[str, nn.Module], ids: Tensor, batches: tuple[int, ...] = (1,)
) -> dict[str, dict[int, float]]:
    """For each of the modules, and of the numbers of texts, what part of its input is not 0.

    ids: texts (texts, tokens), of which `model` computes all. Of several texts a value counts that
    is not 0 in one of them at the same place; each number divides that of ids. Modules that were
    not called are missing.
    """
    texts, tokens = ids.shape
    found: dict[str, list[Tensor]] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            there = (inputs[0] != 0).reshape(texts, tokens, -1)
            found[name] = [
                there.unflatten(0, (-1, batch)).any(1).float().mean() for batch in batches
            ]

        return module.register_forward_pre_hook(hook)

    handles = [watch(name, module) for name, module in downs.items()]
    try:
        model(input_ids=ids.to(_input_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: dict(zip(batches, (part.item() for part in parts), strict=True))
        for name, parts in found.items()
    }
