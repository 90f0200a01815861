"""generate() by captured steps, against transformers' own loop. On the CPU they run uncaptured."""

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from hf_triton_mlp import (
    choosing,
    decoding,
    graph_decode,
    patch_model,
    patch_report,
    patched,
    unpatch_model,
)
from hf_triton_mlp.capture import CACHE, CAPTURES, CannotCapture, Step, captures_of

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.float16, torch.bfloat16]}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
NAMES = ["bloom", "gemma", "gpt2", "llama", "opt-post-norm", "opt-pre-norm"]


pytestmark = pytest.mark.usefixtures("reasons")


def text_model(family: str = "gpt2", device: str = "cpu", **changes: Any) -> Any:
    return tiny.build(family, **changes).to(device)


def generate(model: Any, inputs: dict[str, torch.Tensor], ours: bool, **options: Any) -> Any:
    torch.manual_seed(7)
    if ours:
        options["custom_generate"] = graph_decode
    return model.generate(**inputs, **{"max_new_tokens": 20, "do_sample": False, **options})


def assert_same(
    model: Any, inputs: dict[str, torch.Tensor], said: list[str], **options: Any
) -> Any:
    theirs = generate(model, inputs, ours=False, **options)
    found = generate(model, inputs, ours=True, **options)
    assert said == []
    assert torch.equal(found, theirs)
    return found


# --- the same tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_random_prompts_of_trained_models(name: str, device: str, reasons: list[str]) -> None:
    """200 prompts in left-padded batches, against the loop with a static cache.

    In 16 bits two tokens may be as good as equal: the logits of each step up to the first other
    token of a text are as accurate as that loop's, so that a margin there is within their errors.
    """
    folder = CHECKPOINTS / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original: Any = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
    text = tokenizer((CHECKPOINTS / "heldout.txt").read_text())["input_ids"]
    for dtype in DTYPES[device]:
        model = patch_model(copy.deepcopy(original).to(dtype), cuda_graphs=True)
        generator = torch.Generator().manual_seed(0)
        steps = []
        for _ in range(8):
            prompts = []
            for _ in range(25):
                start, length = (
                    int(torch.randint(1, n, (), generator=generator)) for n in (900, 24)
                )
                prompts.append(tokenizer.decode(text[start : start + length]))
            inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
            inputs.pop("token_type_ids", None)
            options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True, **LOGITS}
            found = model.generate(**inputs, **options)
            assert reasons == []
            static = model.generate(**inputs, **options, cache_implementation="static")
            reasons.clear()  # the static cache is one
            if dtype == torch.float32:
                assert torch.equal(found.sequences, static.sequences)
            else:
                steps.append(comparable(original, inputs, options, found, static))
        if steps:
            ours, theirs, exact = (torch.cat(each) for each in zip(*steps, strict=True))
            tiny.assert_as_accurate(ours.to(dtype), theirs.to(dtype), exact)


def comparable(
    wide: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any], found: Any, static: Any
) -> tuple[torch.Tensor, ...]:
    """Logits of steps that follow the same tokens in both, and the wide model's after those."""
    prompt, tokens = inputs["input_ids"].shape[1], static.sequences

    def as_there(text: int, sequence: torch.Tensor) -> list[int]:
        return [int(tokens[text, sequence.shape[0]])]

    wide = wide.generate(**inputs, **options, prefix_allowed_tokens_fn=as_there)
    steps = min(len(found.logits), len(static.logits))
    new = slice(prompt, prompt + steps)
    other = (found.sequences[:, new] != tokens[:, new]).long()
    same = (other.cumsum(1) == other).t()  # no token before this one
    ours, theirs, exact = (torch.stack(of.logits[:steps])[same] for of in (found, static, wide))
    return ours, theirs, exact


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "llama", "gemma", "olmo2"])
def test_families(family: str, device: str, reasons: list[str]) -> None:
    model = text_model(family, device)
    assert_same(model, tiny.batch(device), reasons)
    patch_model(model)
    assert_same(model, tiny.batch(device), reasons)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_windows_shorter_than_the_text(family: str, device: str, reasons: list[str]) -> None:
    model = text_model(family, device, sliding_window=4)
    assert_same(model, tiny.batch(device), reasons)
    options = {"return_dict_in_generate": True}
    theirs = generate(model, tiny.batch(device), ours=False, **options)
    found = generate(model, tiny.batch(device), ours=True, **options)
    for ours, own in zip(found[CACHE].layers, theirs[CACHE].layers, strict=True):
        assert ours.get_seq_length() == own.get_seq_length()
        torch.testing.assert_close(ours.keys, own.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, own.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8, "temperature": 1.3},
        {"min_p": 0.1},
        {"repetition_penalty": 1.5, "typical_p": 0.9},
        {"num_return_sequences": 3},
        {"min_new_tokens": 9, "eos_token_id": list(range(2, 90))},
        {"eos_token_id": [2, 5, 17, 30, 31]},
    ],
    ids=" ".join,
)
def test_sampling(options: dict[str, Any], device: str, reasons: list[str]) -> None:
    assert_same(text_model(device=device), tiny.batch(device), reasons, do_sample=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"eos_token_id": list(range(2, 60))},
        {"eos_token_id": list(range(2, 96)), "min_new_tokens": 5},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [3, 4], "num_return_sequences": 1},
        {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(len(ids), len(ids) + 9))},
    ],
    ids=" ".join,
)
def test_greedy_options(options: dict[str, Any], device: str, reasons: list[str]) -> None:
    assert_same(text_model(device=device), tiny.batch(device), reasons, **options)


IGNORING = RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=3)

#: Options, and whether each of the two choices that they need, one after the other, is captured.
CHOICES = [
    ({"temperature": 0.7, "top_k": 20, "top_p": 0.9}, [True]),
    ({"do_sample": False, "repetition_penalty": 1.7}, [True]),
    ({"min_p": 0.1, "epsilon_cutoff": 1e-3, "renormalize_logits": True}, [True]),
    ({"typical_p": 0.9, "remove_invalid_values": True}, [True]),
    ({"suppress_tokens": [3, 4], "begin_suppress_tokens": [5], "min_length": 1}, [True]),
    ({"min_new_tokens": 9, "eos_token_id": list(range(2, 90))}, [True, True]),
    ({"exponential_decay_length_penalty": (5, 1.2), "eos_token_id": [2]}, [True]),
    ({"forced_eos_token_id": 2, "temperature": 1.2}, [True]),
    ({"logits_processor": LogitsProcessorList([IGNORING])}, [True]),
    ({"no_repeat_ngram_size": 2}, []),
    ({"eta_cutoff": 1e-3}, []),
]


@pytest.mark.parametrize(
    ("options", "captured"),
    CHOICES,
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_choices_are_captured(
    options: dict[str, Any], captured: list[bool], device: str, reasons: list[str]
) -> None:
    """Once for numbers that are the same, and with the tokens of transformers' own processors."""
    model, inputs = text_model(device=device), tiny.batch(device)
    for _ in range(2):
        assert_same(model, inputs, reasons, **{"do_sample": True, **options})
    (step,) = captures_of(model)._steps.values()
    found = list(step.choices.values())
    assert [choice is not None for choice in found] == captured
    assert all((choice.graph is not None) == (device == "cuda") for choice in found)


def test_other_numbers_are_captured_anew(device: str, reasons: list[str]) -> None:
    model, inputs = text_model(device=device), tiny.batch(device)
    for tenths in range(1, choosing.CHOICES + 4):
        assert_same(model, inputs, reasons, do_sample=True, temperature=tenths / 10)
    (step,) = captures_of(model)._steps.values()
    assert len(step.choices) == choosing.CHOICES


def test_scores_of_captured_choices(device: str, reasons: list[str]) -> None:
    model, inputs = text_model(device=device), tiny.batch(device)
    options = {"output_scores": True, **LOGITS, "do_sample": True, "top_k": 9, "eos_token_id": 5}
    theirs = generate(model, inputs, ours=False, **options)
    found = generate(model, inputs, ours=True, **options)
    assert torch.equal(found.sequences, theirs.sequences) and reasons == []
    for name in ("scores", "logits"):
        torch.testing.assert_close(found[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_a_choice_that_cannot_be_captured(
    device: str, monkeypatch: pytest.MonkeyPatch, reasons: list[str]
) -> None:
    """The steps are, and it is tried once."""

    tried = []

    def fails(*args: Any) -> None:
        tried.append(None)
        raise ValueError("no")

    model, inputs, options = text_model(device=device), tiny.batch(device), {"do_sample": True}
    theirs = generate(model, inputs, ours=False, **options)
    monkeypatch.setattr(choosing.Choice, "__init__", fails)
    for _ in range(2):
        assert torch.equal(generate(model, inputs, ours=True, **options), theirs)
    (step,) = captures_of(model)._steps.values()
    assert list(step.choices.values()) == [None] and tried == [None] and reasons == []


def test_random_numbers_go_on(device: str, reasons: list[str]) -> None:
    """Calls one after the other draw what transformers' would, whatever was captured between."""
    model, inputs = text_model(device=device), tiny.batch(device)
    texts = []
    for ours in ({}, {"custom_generate": graph_decode}):
        torch.manual_seed(3)
        options = {"max_new_tokens": 9, "do_sample": True, "eos_token_id": [2, 5, 17], **ours}
        texts.append(
            [model.generate(**inputs, **options, temperature=t) for t in (0.5, 0.9, 0.5, 1.5)]
        )
    assert all(map(torch.equal, *texts)) and reasons == []


def test_scores_logits_and_the_cache(device: str, reasons: list[str]) -> None:
    model, inputs = text_model(device=device), tiny.batch(device)
    for ends in (None, list(range(2, 60))):
        options = {
            "return_dict_in_generate": True,
            "output_scores": True,
            "output_logits": True,
            "eos_token_id": ends,
        }
        theirs = generate(model, inputs, ours=False, **options)
        found = generate(model, inputs, ours=True, **options)
        assert torch.equal(found.sequences, theirs.sequences) and reasons == []
        for name in ("scores", "logits"):
            torch.testing.assert_close(found[name], theirs[name], rtol=1e-4, atol=1e-4)
        assert found[CACHE].get_seq_length() == theirs[CACHE].get_seq_length()


def test_a_text_goes_on_from_its_cache(device: str, reasons: list[str]) -> None:
    model, inputs = text_model(device=device), tiny.batch(device)
    texts = []
    for ours in (False, True):
        cache = DynamicCache(config=model.config)
        first = generate(model, inputs, ours, **{CACHE: cache})
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(first)], 1)
        longer = {"input_ids": first, "attention_mask": mask[:, : first.shape[1]]}
        texts.append(generate(model, longer, ours, **{CACHE: cache}))
    assert torch.equal(*texts) and reasons == []


def test_embeddings_for_a_prompt(device: str, reasons: list[str]) -> None:
    model, inputs = text_model("llama", device), tiny.batch(device)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert_same(model, given, reasons)


def test_a_cache_that_grows(
    device: str, monkeypatch: pytest.MonkeyPatch, reasons: list[str]
) -> None:
    monkeypatch.setattr(decoding, "LEAST_CAPACITY", 16)
    model = text_model(device=device)
    assert_same(model, tiny.batch(device), reasons, max_new_tokens=50)
    assert [shape.capacity for shape in captures_of(model)._steps] == [32, 64]
    options = {"max_new_tokens": 50, "do_sample": True, "repetition_penalty": 1.5}
    assert_same(model, tiny.batch(device), reasons, **options)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "llama"])
def test_the_host_reads_behind(
    family: str, monkeypatch: pytest.MonkeyPatch, reasons: list[str]
) -> None:
    """Not so where the next step might ask for a position that is not there."""
    waiting: list[int] = []
    receive = decoding._Reports.receive

    def counted(self: Any) -> Any:
        waiting.append(len(self))
        return receive(self)

    monkeypatch.setattr(decoding._Reports, "receive", counted)
    assert_same(text_model(family), tiny.batch(), reasons)
    assert waiting[0] == decoding.STEPS_AHEAD + 1 and waiting[-1] == 1


#: Operations on a GPU whose result, or its size, the host waits for.
WAITING = {
    "_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "multinomial",
    "nonzero", "unique_consecutive", "unique_dim",
}  # fmt: skip


class HostReads(TorchDispatchMode):
    """Records what makes the host wait for a GPU, on the CPU as well."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = False
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = [index for index in indices if index is not None and index.dtype == torch.bool]
        if self.recording and (name in WAITING or masks):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class HostTensors(TorchFunctionMode):
    """Records what a GPU would get from the host."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.reads.recording and function in (torch.tensor, torch.as_tensor, torch.from_numpy):
            self.reads.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "llama", "gemma2"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"repetition_penalty": 1.3},
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
        {"typical_p": 0.9, "epsilon_cutoff": 1e-3},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[5, 6]], "min_new_tokens": 4},
    ],
    ids=" ".join,
)
def test_no_step_waits(
    family: str,
    options: dict[str, Any],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    reasons: list[str],
) -> None:
    """From the first report on, the host reads reports alone; on a GPU, CUDA says so too."""
    model, inputs, reads = text_model(family, device), tiny.batch(device), HostReads()
    is_over = decoding._Run.is_over

    def watched(self: Any, length: int) -> bool:
        reads.recording = False
        over = is_over(self, length)
        reads.recording = not over
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default" if over else "error")
        return over

    monkeypatch.setattr(decoding._Run, "is_over", watched)
    options = {"do_sample": True, "eos_token_id": [2, 5], **options}
    try:
        with reads, HostTensors(reads):
            generate(model, inputs, ours=True, **options)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert reads.found == [] and reasons == []


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.put_: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.put_.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("ends", [None, list(range(2, 60))])
def test_a_streamer_gets_each_token_once(ends: Any, device: str, reasons: list[str]) -> None:
    model, inputs = text_model(device=device), tiny.batch(device)
    theirs, found = Recorder(), Recorder()
    generate(model, inputs, ours=False, streamer=theirs, eos_token_id=ends)
    decoding.enable(model)
    generate(model, inputs, ours=False, streamer=found, eos_token_id=ends)
    assert found.put_ == theirs.put_ and found.ended and reasons == []


class Calls(StoppingCriteria):
    """Stops after some calls, and counts them."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return torch.full((len(input_ids),), len(self.lengths) == 5, device=input_ids.device)


def test_what_counts_its_calls(device: str, reasons: list[str]) -> None:
    model, inputs = text_model(device=device), tiny.batch(device)
    both = Calls(), Calls()
    texts = [
        generate(model, inputs, ours, stopping_criteria=StoppingCriteriaList([calls]))
        for ours, calls in zip((False, True), both, strict=True)
    ]
    assert torch.equal(*texts) and both[0].lengths == both[1].lengths and reasons == []


@pytest.mark.parametrize("sample", [False, True])
def test_strings_that_end_a_text(sample: bool, device: str, reasons: list[str]) -> None:
    folder = CHECKPOINTS / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.eval().to(device)
    prompts = [(CHECKPOINTS / "heldout.txt").read_text()[start : start + 40] for start in (0, 99)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
    inputs.pop("token_type_ids", None)
    options = {"do_sample": sample, "max_new_tokens": 60, "tokenizer": tokenizer}
    stops = {"stop_strings": [" the", "nd"]}
    longest = generate(model, inputs, ours=False, **options)
    theirs = generate(model, inputs, ours=False, **options, **stops)
    decoding.enable(model)
    found = generate(model, inputs, ours=False, **options, **stops)
    assert torch.equal(found, theirs) and reasons == []
    assert found.shape[1] < longest.shape[1]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_masks_of_other_kinds(family: str, device: str, reasons: list[str]) -> None:
    model, inputs = text_model(family, device), tiny.batch(device)
    inputs["attention_mask"][:, 3] = 0
    assert_same(model, inputs, reasons)
    inputs["attention_mask"] = inputs["attention_mask"].bool()
    assert_same(model, inputs, reasons)
    inputs.pop("attention_mask")
    assert_same(model, inputs, reasons)


def test_positions_of_the_user(device: str, reasons: list[str]) -> None:
    model, inputs = text_model("gpt2", device), tiny.batch(device, rows=1)
    inputs["position_ids"] = torch.arange(7, device=device)[None] + 20
    assert_same(model, inputs, reasons)


def test_a_prompt_nearly_as_long_as_a_cache(device: str, reasons: list[str]) -> None:
    model = text_model(device=device, n_positions=600)
    for length in (255, 256, 257):
        assert_same(model, tiny.batch(device, length=length), reasons, max_new_tokens=4)


class NoNumber(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores * torch.nan if input_ids.shape[1] > 9 else scores


def test_probabilities_that_are_none() -> None:
    model, inputs = text_model(), tiny.batch()
    options = {"do_sample": True, "logits_processor": LogitsProcessorList([NoNumber()])}
    for ours in (False, True):
        with pytest.raises(RuntimeError, match="probability tensor contains"):
            generate(model, inputs, ours, **options)
    assert len(generate(model, inputs, ours=True)) == 2


# --- transformers' loop, and why ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beam"),
        ({"cache_implementation": "static", "disable_compile": True}, "another cache"),
        ({"use_cache": False}, "no cache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
    ],
)
def test_what_is_not_captured(options: dict[str, Any], reason: str, reasons: list[str]) -> None:
    model, inputs = text_model(attn_implementation="eager"), tiny.batch()
    theirs = generate(model, inputs, ours=False, **options)
    decoding.enable(model)
    found = generate(model, inputs, ours=False, **options)
    sequences = [each if isinstance(each, torch.Tensor) else each[0] for each in (theirs, found)]
    assert torch.equal(*sequences)
    assert len(reasons) == 1 and reason in reasons.pop()
    assert_same(model, inputs, reasons)


def test_hooks_training_and_the_cpu(monkeypatch: pytest.MonkeyPatch, reasons: list[str]) -> None:
    model, inputs = text_model(), tiny.batch()
    expected = generate(model, inputs, ours=False)
    hook = model.transformer.h[1].register_forward_hook(lambda *_: None)
    assert torch.equal(generate(model, inputs, ours=True), expected) and "hooks" in reasons.pop()
    hook.remove()
    model.train()
    assert torch.equal(generate(model, inputs, ours=True), expected) and "train" in reasons.pop()
    model.eval()
    monkeypatch.setattr(decoding, "ON_CPU", False)
    assert torch.equal(generate(model, inputs, ours=True), expected) and "cpu" in reasons.pop()


@pytest.mark.parametrize("name", ["is_causal", "use_bidirectional_attention"])
def test_attention_without_an_order(name: str, reasons: list[str]) -> None:
    family, value = ("llama", False) if name == "is_causal" else ("gemma3_text", True)
    model, inputs = text_model(family), tiny.batch()
    setattr(model.config, name, value)
    expected = generate(model, inputs, ours=False)
    assert torch.equal(generate(model, inputs, ours=True), expected) and "behind" in reasons.pop()


@pytest.mark.parametrize("error", [ValueError("no"), torch.cuda.OutOfMemoryError("full")])
def test_a_step_that_cannot_be_captured(
    error: Exception, monkeypatch: pytest.MonkeyPatch, reasons: list[str]
) -> None:
    model, inputs = text_model(), tiny.batch()
    expected = generate(model, inputs, ours=False)

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(Step, "run", fail)
    assert torch.equal(generate(model, inputs, ours=True), expected)
    assert len(reasons) == 1


# --- what is kept -------------------------------------------------------------------------------


def test_changes_of_the_model_are_seen(reasons: list[str]) -> None:
    model, inputs = text_model(), tiny.batch()
    decoding.enable(model)
    generate(model, inputs, ours=False)
    [step] = captures_of(model)._steps.values()
    model.load_state_dict(tiny.randomized(copy.deepcopy(model), seed=1).state_dict())
    assert_same(model, inputs, reasons)
    assert list(captures_of(model)._steps.values()) == [step]
    model.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(
        2 * model.transformer.h[0].mlp.c_fc.weight.detach()
    )
    assert_same(model, inputs, reasons)
    assert step not in captures_of(model)._steps.values()
    model.double().float()
    assert not captures_of(model)._steps
    unpatch_model(model)


def test_few_captures_are_kept(reasons: list[str]) -> None:
    model = text_model()
    for rows in range(1, CAPTURES + 3):
        generate(model, tiny.batch(rows=rows), ours=True, max_new_tokens=2)
    assert [shape.batch for shape in captures_of(model)._steps] == list(range(3, CAPTURES + 3))


def test_patch_and_the_way_back(tmp_path: Path, reasons: list[str]) -> None:
    model, inputs = text_model(), tiny.batch()
    expected, cls = generate(model, inputs, ours=False), type(model)
    assert patch_report(model).decoding == ""
    with patched(model, cuda_graphs=True):
        assert type(model) is not cls and type(model).__name__ == cls.__name__
        assert "none captured" in str(patch_report(model))
        assert torch.equal(generate(model, inputs, ours=False), expected)
        assert "256 tokens" in patch_report(model).decoding
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(generate(copied, inputs, ours=False), expected)
        model.save_pretrained(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(tmp_path).config.architectures == [cls.__name__]
    assert type(model) is cls and not captures_of(model)._steps and reasons == []


def test_a_model_that_does_not_generate() -> None:
    model: PreTrainedModel = text_model().transformer
    before = tiny.tree(model)
    with pytest.raises(ValueError, match="generate"):
        patch_model(model, cuda_graphs=True)
    assert tiny.tree(model) == before


def test_inference_mode_and_after(device: str, reasons: list[str]) -> None:
    model, inputs = text_model(device=device), tiny.batch(device)
    with torch.inference_mode():
        found = generate(model, inputs, ours=True)
    assert torch.equal(assert_same(model, inputs, reasons), found)


def test_an_error_in_the_middle(reasons: list[str]) -> None:
    class Fails(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.put_) == 4:
                raise KeyboardInterrupt

    model, inputs = text_model(), tiny.batch()
    decoding.enable(model)
    with pytest.raises(KeyboardInterrupt):
        generate(model, inputs, ours=False, streamer=Fails())
    decoding.disable(model)
    assert_same(model, inputs, reasons)


def test_threads_take_turns(reasons: list[str]) -> None:
    model = text_model()
    decoding.enable(model)
    prompts = [tiny.batch(length=length) for length in (3, 5, 7, 9)]
    expected = [generate(model, inputs, ours=False) for inputs in prompts]
    found: dict[int, torch.Tensor] = {}

    def run(i: int) -> None:
        for _ in range(3):
            found[i] = model.generate(**prompts[i], max_new_tokens=20, do_sample=False)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(len(prompts))) and reasons == []


def test_a_streamer_that_generates(reasons: list[str]) -> None:
    class Generates(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.put_) == 3:
                generate(model, inputs, ours=False)

    model, inputs = text_model(), tiny.batch()
    expected = generate(model, inputs, ours=False)
    decoding.enable(model)
    assert torch.equal(generate(model, inputs, ours=False, streamer=Generates()), expected)
    assert len(reasons) == 1 and "another generate" in reasons[0]


def test_within_a_step_of_another_call() -> None:
    captures = captures_of(text_model())
    device = torch.device("cpu")
    with captures.in_use(device), pytest.raises(CannotCapture), captures.in_use(device):
        pass
