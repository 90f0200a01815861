"""What becomes of captured steps: how many are kept, and what makes them give way."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny_models as tiny
import torch
from test_decoding import assert_same, generate, text_model
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from hf_triton_mlp import attention, capture, decoding, patch_model, patch_report, unpatch_model
from hf_triton_mlp.capture import PROBES, Captures, Step, captures_of
from hf_triton_mlp.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("reasons")


def steps_of(model: Any) -> list[Step]:
    return list(captures_of(model)._steps.values())


def memory(device: str) -> int:
    """What tensors have on the GPU, 0 on the CPU."""
    gc.collect()
    if device == "cpu":
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


# --- how many are kept --------------------------------------------------------------------------


@pytest.fixture
def room(device: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Memory for captures: as much as the caches of three texts need, and graphs have none."""
    model = text_model(device=device)
    generate(model, tiny.batch(device, rows=1), ours=True, max_new_tokens=2)
    [step] = steps_of(model)
    assert captures_of(model).nbytes == step.nbytes + step.graph_bytes
    monkeypatch.setattr(capture, "most_bytes", lambda device: 3 * step.nbytes)
    caches = property(lambda captures: sum(step.nbytes for step in captures._steps.values()))
    monkeypatch.setattr(Captures, "nbytes", caches)
    return 3 * step.nbytes


def test_captures_have_a_part_of_the_memory(device: str, room: int, reasons: list[str]) -> None:
    model = text_model(device=device)
    for rows in (1, 2, 1, 2):
        assert_same(model, tiny.batch(device, rows=rows), reasons, max_new_tokens=3)
    assert [step.shape.batch for step in steps_of(model)] == [1, 2]
    assert captures_of(model).nbytes <= room
    generate(model, tiny.batch(device, rows=2), ours=True, max_new_tokens=3, do_sample=True)
    assert [step.shape.greedy for step in steps_of(model)] == [False]


def test_one_that_is_too_large_goes_after_its_call(
    device: str, room: int, monkeypatch: pytest.MonkeyPatch, reasons: list[str]
) -> None:
    monkeypatch.setattr(decoding, "LEAST_CAPACITY", 16)
    monkeypatch.setattr(capture, "most_bytes", lambda device: room // 12)
    model = text_model(device=device)
    for _ in range(2):
        assert_same(model, tiny.batch(device), reasons, max_new_tokens=40)
        assert steps_of(model) == []


def test_the_report_says_what_memory_there_is(device: str) -> None:
    model = patch_model(text_model(device=device), cuda_graphs=True)
    generate(model, tiny.batch(device), ours=False)
    [step] = steps_of(model)
    said = patch_report(model).decoding
    assert f"{step.nbytes / 2**20:.1f} MiB of cache" in said
    assert f"the graphs' own memory: {step.graph_bytes / 2**20:.1f} MiB" in said
    assert (step.graph_bytes > 0) == (device == "cuda")


@pytest.mark.parametrize("fails", [1, 2])
def test_captures_make_room(
    fails: int, monkeypatch: pytest.MonkeyPatch, reasons: list[str]
) -> None:
    """Where there is no memory for one more, the others go; only then is there none."""
    model = text_model()
    generate(model, tiny.batch(rows=1), ours=True)
    [before] = steps_of(model)
    expected = generate(model, tiny.batch(), ours=False)
    left = [fails]
    run = Step.run

    def scarce(self: Step, *args: Any) -> None:
        if self is not before and left[0]:
            left[0] -= 1
            raise torch.cuda.OutOfMemoryError("full")
        run(self, *args)

    monkeypatch.setattr(Step, "run", scarce)
    assert torch.equal(generate(model, tiny.batch(), ours=True), expected)
    assert [step.shape.batch for step in steps_of(model)] == [2] * (fails == 1)
    assert len(reasons) == (fails == 2)


# --- and what frees them ------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
def test_unpatching_frees_captures(enabled: bool, device: str, reasons: list[str]) -> None:
    model, inputs = text_model(device=device), tiny.batch(device)
    expected = generate(model, inputs, ours=False)
    levels = []
    for _ in range(3):  # what a first time allocates for good is no matter
        patch_model(model, cuda_graphs=enabled)
        assert torch.equal(generate(model, inputs, ours=not enabled), expected)
        step = weakref.ref(steps_of(model)[0])
        held = memory(device)
        unpatch_model(model)
        levels.append(memory(device))
        assert step() is None and (device == "cpu" or levels[-1] < held)
    assert levels[1] == levels[2] and reasons == []


@pytest.mark.parametrize("sample", [False, True])
def test_a_deleted_model_frees_captures(sample: bool, device: str) -> None:
    levels = []
    for _ in range(3):
        model = patch_model(text_model(device=device), cuda_graphs=True)
        generate(model, tiny.batch(device), ours=False, do_sample=sample)
        step = weakref.ref(steps_of(model)[0])
        del model
        levels.append(memory(device))
        assert step() is None
    assert levels[1] == levels[2]


# --- changes of the model -----------------------------------------------------------------------


def scale_softcap(model: Any) -> None:
    model.config.final_logit_softcapping = 0.5


def scale_rotation(model: Any) -> None:
    model.model.rotary_emb.attention_scaling *= 3


def turn_faster(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(3)


def replace_rotation(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 3


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach().roll(1, 0))


def swap_layers(model: Any) -> None:
    """But for the numbers by which the cache knows them."""
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    layers[0].self_attn.layer_idx, layers[1].self_attn.layer_idx = 0, 1


def change_epsilon(model: Any) -> None:
    model.model.norm.eps = model.model.norm.variance_epsilon = 10.0


def negate(model: Any) -> None:
    model.model.norm.weight.data.neg_()


def replace_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh().eval()


def train_and_back(model: Any) -> None:
    model.train()
    model.eval()


def freeze(model: Any) -> None:
    model.requires_grad_(False)


def end_sooner(model: Any) -> None:
    model.generation_config.eos_token_id = list(range(2, 60))


#: Each change, and whether captured steps outlive it.
CHANGES: list[tuple[Callable[[Any], None], bool]] = [
    (scale_softcap, False),
    (scale_rotation, False),
    (turn_faster, True),
    (replace_rotation, False),
    (untie, False),
    (swap_layers, False),
    (change_epsilon, False),
    (negate, True),
    (replace_activation, False),
    (train_and_back, True),
    (freeze, True),
    (end_sooner, False),  # a step for another number of tokens
]


@pytest.mark.parametrize(("change", "kept"), CHANGES)
def test_a_change_between_calls(
    change: Callable[[Any], None], kept: bool, device: str, reasons: list[str]
) -> None:
    model, inputs = text_model("gemma2", device), tiny.batch(device)
    assert_same(model, inputs, reasons)
    [step] = steps_of(model)
    change(model)
    assert_same(model, inputs, reasons)
    assert (steps_of(model) == [step]) == kept


def test_another_attention(device: str, reasons: list[str]) -> None:
    model, inputs = text_model("llama", device), tiny.batch(device)
    for name in ("sdpa", "eager", "sdpa"):
        before = steps_of(model)
        model.set_attn_implementation(name)
        assert_same(model, inputs, reasons)
        assert len(steps_of(model)) == 1 and steps_of(model) != before


@pytest.mark.parametrize("rows", [-20, 7])
def test_resized_embeddings(rows: int, device: str, reasons: list[str]) -> None:
    model, inputs = text_model(device=device), tiny.batch(device)
    inputs["input_ids"] %= 60
    copied = copy.deepcopy(model)
    patch_model(model, cuda_graphs=True)
    generate(model, inputs, ours=False)
    [step] = steps_of(model)
    for each in (copied, model):
        torch.manual_seed(3)
        each.resize_token_embeddings(tiny.VOCABULARY + rows, mean_resizing=False)
    expected = generate(copied, inputs, ours=False)
    assert torch.equal(generate(model, inputs, ours=False), expected) and reasons == []
    assert expected.max() < tiny.VOCABULARY + rows and step not in steps_of(model)


@pytest.mark.parametrize("patches", [True, False])
def test_adapters_merged_and_not(patches: bool, device: str, reasons: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = text_model(device=device), tiny.batch(device)
    if patches:
        patch_model(model)
    plain = assert_same(model, inputs, reasons)
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True
    )
    adapted = peft.get_peft_model(model, lora).eval()
    texts = [assert_same(adapted, inputs, reasons)]
    with adapted.disable_adapter():
        assert torch.equal(assert_same(adapted, inputs, reasons), plain)
    adapted.merge_adapter()
    texts.append(assert_same(adapted, inputs, reasons))
    adapted.unmerge_adapter()
    texts.append(assert_same(adapted, inputs, reasons))
    texts.append(assert_same(adapted.merge_and_unload(), inputs, reasons))
    assert not torch.equal(texts[0], plain)
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_layers_removed_before_unpatching(device: str, reasons: list[str]) -> None:
    model, inputs = text_model(device=device), tiny.batch(device)
    cls = type(model)
    patch_model(model, cuda_graphs=True)
    generate(model, inputs, ours=False)
    del model.transformer.h[2]
    model.config.n_layer = 2
    found = generate(model, inputs, ours=False)
    unpatch_model(model)
    assert type(model) is cls and torch.equal(assert_same(model, inputs, reasons), found)


def test_copies_have_captures_of_their_own(device: str, reasons: list[str]) -> None:
    model = patch_model(text_model(device=device), cuda_graphs=True)
    inputs = tiny.batch(device)
    expected = generate(model, inputs, ours=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not steps_of(copied)
        generate(copied, inputs, ours=False)
        with torch.no_grad():
            copied.transformer.ln_f.weight.neg_()
        assert not torch.equal(generate(copied, inputs, ours=False), expected)
        assert torch.equal(generate(model, inputs, ours=False), expected)
    assert reasons == []


def test_models_that_share_modules(device: str, reasons: list[str]) -> None:
    one, other = text_model(device=device), text_model(device=device)
    other.transformer = one.transformer
    other.lm_head.weight = nn.Parameter(one.lm_head.weight.detach().roll(1, 0))
    inputs = tiny.batch(device)
    texts = [assert_same(model, inputs, reasons) for model in (one, other)]
    assert not torch.equal(*texts)
    one.transformer.ln_f.weight = nn.Parameter(-one.transformer.ln_f.weight.detach())
    changed = [assert_same(model, inputs, reasons) for model in (one, other)]
    assert not any(torch.equal(*pair) for pair in zip(texts, changed, strict=True))


def test_a_forward_that_sets_numbers(reasons: list[str]) -> None:
    """Captures of other shapes have taken in the old ones."""
    model = text_model()
    act = model.transformer.h[0].mlp.act

    class Counts(type(act)):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self.rows = len(input)
            return super().forward(input)

    act.__class__ = Counts
    for rows in (1, 2):
        assert_same(model, tiny.batch(rows=rows), reasons)
        assert [step.shape.batch for step in steps_of(model)] == [rows]


def test_compiled_modules(reasons: list[str]) -> None:
    model, inputs = text_model(), tiny.batch()
    expected = generate(model, inputs, ours=False)
    wrapped = torch.compile(model, backend="eager")  # its generate() is the model's
    assert torch.equal(generate(wrapped, inputs, ours=True), expected) and reasons == []
    model.transformer.h[1].mlp.compile(backend="eager")
    assert torch.equal(generate(model, inputs, ours=True), expected)
    assert "compiled" in reasons.pop()


# --- calls within and beside each other ---------------------------------------------------------


class Generates(LogitsProcessor):
    """Calls generate() of a model at each token."""

    def __init__(self, model: Any, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        self.texts: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.texts.append(self.model.generate(**self.inputs, max_new_tokens=9, do_sample=False))
        return scores


@pytest.mark.parametrize("same", [True, False])
def test_a_processor_that_generates(same: bool, device: str, reasons: list[str]) -> None:
    """The same model, or one with the same modules."""
    model, inner = text_model(device=device), text_model(device=device)
    inputs, other = tiny.batch(device), tiny.batch(device, rows=3)
    inner.transformer, inner.lm_head = model.transformer, model.lm_head
    inner = model if same else inner
    texts, within = [], []
    for ours in (False, True):
        if ours:
            decoding.enable(inner)
            decoding.enable(model)
        processor = Generates(inner, other)
        processors = LogitsProcessorList([processor])
        texts.append(generate(model, inputs, ours=False, logits_processor=processors))
        within.append(processor.texts)
    assert torch.equal(*texts)
    assert all(torch.equal(*pair) for pair in zip(*within, strict=True))
    assert ("another generate()" in reasons[0]) if same else (reasons == [])


def test_another_error_in_the_middle(device: str, reasons: list[str]) -> None:
    class Fails(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == 12:
                raise ZeroDivisionError
            return scores

    model, inputs = text_model(device=device), tiny.batch(device)
    for sample in (False, True):
        with pytest.raises(ZeroDivisionError):
            options = {"logits_processor": LogitsProcessorList([Fails()]), "do_sample": sample}
            generate(model, inputs, ours=True, **options)
        assert_same(model, inputs, reasons, do_sample=sample)


def test_an_interrupted_capture(
    device: str, monkeypatch: pytest.MonkeyPatch, reasons: list[str]
) -> None:
    model, inputs = text_model(device=device), tiny.batch(device)
    names = {module: dict(vars(module)) for module in model.modules()}
    run, left = Step._run, [3]

    def interrupted(self: Step, *args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        run(self, *args)

    monkeypatch.setattr(Step, "_run", interrupted)
    # On a GPU, two steps compare attentions, one runs before the capture, and one is captured.
    for at in range(1, PROBES + 1 + 4 * (device == "cuda")):
        left[0] = at
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs, ours=True)
        assert not steps_of(model)
    assert_same(model, inputs, reasons)
    assert {module: dict(vars(module)) for module in model.modules()} == names


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_forward_beside_a_step(family: str, name: str, device: str) -> None:
    """Another thread calls the model while a step is captured with our attention."""
    model, inputs = text_model(family, device), tiny.batch(device)
    model.set_attn_implementation(name)
    generate(model, inputs, ours=True)
    [step] = steps_of(model)

    def look() -> tuple[Any, ...]:
        with torch.no_grad():
            logits = model(**inputs).logits
        return logits, fingerprint(model), model.config._attn_implementation

    with ThreadPoolExecutor(1) as other:
        expected, *seen = look()
        with attention.in_step(model, step.cache):
            found, *others = other.submit(look).result()
            assert model.config._attn_implementation == attention.NAME
    assert torch.equal(found, expected) and others == seen
    assert type(model.config._attn_implementation) is str


def test_steps_of_models_with_one_config(device: str) -> None:
    """Two threads take turns, and the config has its own name again."""
    model, inputs = text_model("llama", device), tiny.batch(device)
    generate(model, inputs, ours=True)
    [step], name = steps_of(model), model.config._attn_implementation

    def enter() -> str:
        with attention.in_step(model, step.cache):
            return model.config._attn_implementation

    with ThreadPoolExecutor(1) as other:
        with attention.in_step(model, step.cache):
            entered = other.submit(enter)
            with pytest.raises(TimeoutError):
                entered.result(0.2)
        assert entered.result(60) == name
    assert type(model.config._attn_implementation) is str


@pytest.mark.gpu
def test_other_streams(reasons: list[str]) -> None:
    """A call waits for what its own stream did before, and the next one for the call."""
    model, inputs = text_model(device="cuda"), tiny.batch("cuda")
    default, side = torch.cuda.current_stream(), torch.cuda.Stream()
    weight = model.transformer.ln_f.weight.data
    expected = generate(model, inputs, ours=False)
    weight.neg_()
    negated = generate(model, inputs, ours=False)
    assert not torch.equal(expected, negated)
    for stream in (side, default, side, side, default):
        stream.wait_stream(default)
        stream.wait_stream(side)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**8)
            weight.neg_()
            assert torch.equal(generate(model, inputs, ours=True), expected)
            torch.cuda._sleep(10**8)
            weight.neg_()
            assert torch.equal(generate(model, inputs, ours=True), negated)
    assert reasons == [] and len(steps_of(model)) == 1


@pytest.mark.gpu
def test_streams_without_an_order(reasons: list[str]) -> None:
    """Calls on two streams, of which none waits for the other, share a captured step."""
    model = text_model(device="cuda")
    prompts = [tiny.batch("cuda", length=length) for length in (5, 9)]
    expected = [generate(model, inputs, ours=False) for inputs in prompts]
    streams = [torch.cuda.Stream() for _ in prompts]
    torch.cuda.synchronize()
    found = []
    for _ in range(4):
        for inputs, stream in zip(prompts, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(generate(model, inputs, ours=True))
    torch.cuda.synchronize()
    assert all(torch.equal(text, expected[i % 2]) for i, text in enumerate(found))
    assert reasons == []
