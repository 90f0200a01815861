"""What a captured step depends on is in the fingerprint of its model, and little else."""

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch import nn

from hf_triton_mlp import patch_model
from hf_triton_mlp.fingerprint import fingerprint, modules_of


@dataclass
class Arguments:
    scale: float = 1.0


def extended() -> Any:
    """A tiny model that holds more kinds of things than most do."""
    model = tiny.build("gpt2")
    attention = model.transformer.h[1].attn
    attention.arguments = Arguments()
    attention.number = np.float64(2)
    attention.table = {"a": [torch.ones(3)]}
    attention.function = torch.relu
    attention.register_buffer("turned", torch.ones(4, 4), persistent=False)
    return model


def set_config(model: Any) -> None:
    model.config.attn_pdrop = 0.5


def set_nested(model: Any) -> None:
    model.config.id2label[0] = "other"


def switch_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def replace_config(model: Any) -> None:
    model.transformer.h[1].attn.config = copy.deepcopy(model.config)


def replace_parameter(model: Any) -> None:
    norm = model.transformer.ln_f
    norm.weight = nn.Parameter(norm.weight.detach().clone())


def move_storage(model: Any) -> None:
    norm = model.transformer.ln_f
    norm.weight.data = norm.weight.data.clone()


def transpose(model: Any) -> None:
    model.transformer.h[1].attn.turned.t_()


def cast(model: Any) -> None:
    model.lm_head.double()


def remove_bias(model: Any) -> None:
    model.transformer.ln_f.bias = None


def replace_buffer(model: Any) -> None:
    model.transformer.h[1].attn.turned = torch.ones(4, 4)


def replace_module(model: Any) -> None:
    model.transformer.h[1].mlp.act = nn.ReLU()


def share_a_layer(model: Any) -> None:
    model.transformer.h[2] = model.transformer.h[1]


def swap_layers(model: Any) -> None:
    layers = model.transformer.h
    layers[0], layers[1] = layers[1], layers[0]


def remove_a_layer(model: Any) -> None:
    del model.transformer.h[2]


def change_class(model: Any) -> None:
    model.transformer.ln_f.__class__ = type("Other", (nn.LayerNorm,), {})


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def set_number(model: Any) -> None:
    model.transformer.ln_f.eps *= 2


def set_number_again(model: Any) -> None:
    for _ in range(3):  # freed numbers lie where the first one did
        model.transformer.ln_f.eps *= 2


def set_numpy(model: Any) -> None:
    model.transformer.h[1].attn.number = np.float64(3)


def set_dataclass(model: Any) -> None:
    model.transformer.h[1].attn.arguments.scale = 2.0


def set_in_a_table(model: Any) -> None:
    model.transformer.h[1].attn.table["a"][0] = torch.ones(3)


def replace_function(model: Any) -> None:
    model.transformer.h[1].attn.function = torch.tanh


def rename(model: Any) -> None:
    attention = model.transformer.h[1].attn
    attention.other = attention.__dict__.pop("function")


def replace_forward(model: Any) -> None:
    act = model.transformer.h[1].mlp.act
    act.forward = functools.partial(type(act).forward, act)


def patch(model: Any) -> None:
    patch_model(model)


CHANGES: list[Callable[[Any], None]] = [
    set_config, set_nested, switch_attention, replace_config, replace_parameter, move_storage,
    transpose, cast, remove_bias, replace_buffer, replace_module, share_a_layer, swap_layers,
    remove_a_layer, change_class, untie, set_number, set_number_again, set_numpy, set_dataclass,
    set_in_a_table, replace_function, rename, replace_forward, patch,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: Callable[[Any], None]) -> None:
    model = extended()
    before = fingerprint(model)
    assert before == fingerprint(model)
    change(model)
    assert before != fingerprint(model)


def test_a_class_that_gets_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = extended()
    before = fingerprint(model)
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, input: input)
    assert before != fingerprint(model)


def test_what_changes_nothing_is_not_seen() -> None:
    model = patch_model(extended())
    before = fingerprint(model)
    model(**tiny.batch())
    model.load_state_dict(tiny.randomized(copy.deepcopy(model), seed=1).state_dict())
    model.train().eval()
    model.requires_grad_(False)
    model.generation_config.temperature = 0.3
    handle = model.register_forward_hook(lambda *_: None)
    handle.remove()
    assert before == fingerprint(model)


def test_nothing_is_kept_alive() -> None:
    model = extended()
    attention = model.transformer.h[1].attn
    attention.bound = model.generate
    attention.partial = functools.partial(print, model)
    before = fingerprint(model)
    references = [weakref.ref(x) for x in (model, attention, model.config, attention.turned)]
    del model, attention
    gc.collect()
    assert [reference() for reference in references] == [None] * 4
    assert before != fingerprint(extended())


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_each_module_once(name: str) -> None:
    model = tiny.build(name)
    model.again = tiny.decoder_layers(name, model)[0]
    found = modules_of(model)
    assert len(found) == len(set(found)) and set(found) == set(model.modules())
