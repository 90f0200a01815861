"""The generate() benchmark: whole calls, ours against transformers' own ways to decode.

Every contender has a copy of the model that shares its weights, and decodes greedily or samples, in
turn with the others, round by round, in one process. A round is one call for all new tokens and one
for the first alone; both end with a copy of the tokens to the host, so the GPU is done then. The
time a token takes is their difference over the tokens between: that is right for a loop that runs
ahead of its tokens too, but knows only means. So gaps between tokens are measured as well, by a
streamer and in a call of its own: when tokens reach a reader on the host, which each loop decides
itself.
"""

import copy
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hf_triton_mlp import decoding
from hf_triton_mlp.bench import fill, new_run, versions
from hf_triton_mlp.capture import CACHE, captures_of
from hf_triton_mlp.linear import quantized_linears
from hf_triton_mlp.measure import ceilings
from hf_triton_mlp.mlp import TritonMLP
from hf_triton_mlp.patching import patch_model
from hf_triton_mlp.peers import OURS
from hf_triton_mlp.ranks import Ranks, ranks_of

#: Published configurations; their weights here are random, which speed does not depend on.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 2048,
    },
    "opt-6.7b": {
        "model_type": "opt",
        "hidden_size": 4096,
        "ffn_dim": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 4096,
    },
    "bloom-7b1": {"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32},
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}

EAGER = "transformers eager"
COMPILED = "transformers static + compile"
OURS_EAGER = "hf_triton_mlp eager"


#: How tokens are chosen where they are sampled, as transformers' users often do.
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}


class Way(NamedTuple):
    """A way to decode: how the model is patched, if it is, and what generate() is told."""

    patch: dict[str, Any] | None = None
    options: dict[str, Any] = {}  # noqa: RUF012


#: By contender. On a GPU, transformers compiles the steps of a static cache by itself.
WAYS = {
    EAGER: Way(),
    OURS_EAGER: Way(patch={}),
    OURS: Way(patch={"cuda_graphs": True}),
    COMPILED: Way(options={"cache_implementation": "static"}),
}


#: Ours, where zeros are not skipped.
DENSE = f"{OURS} dense"

#: Ours, where others share the weights, by each of them alone.
ALONE = f"{OURS} unshared"


def quantized_way(quantization: str) -> tuple[str, Way]:
    """Ours with weights of a format that patch_model knows, by name."""
    return f"{OURS} {quantization}", Way({"cuda_graphs": True, "quantization": quantization})


# --- measuring --------------------------------------------------------------------------------


def bench_generate(
    places: Iterable[dict[str, Any]],
    load: Callable[[str, str], Any],
    *,
    device: torch.device,
    compiled: bool = True,
    quantizations: Sequence[str] = (),
    zeros: float | None = None,
    rounds: int = 5,
    seconds: float = math.inf,
    mp_group: Any = None,
    kept: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda cell, done, total: None,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure these cells, which `cells` lists, with models on the device, `load(name, dtype)`.

    compiled: also transformers' compiled steps, which take most of the time; on the CPU it does
    not compile, and they are left out. quantizations: formats of weights, each for a contender of
    ours more. zeros: what part of the hidden values `load` makes 0, for a contender more that does
    not skip them. rounds: at least two. mp_group: the ranks that share the weights of our models;
    the others run on each by itself, and so does a contender more, ours unshared. The rest is as
    for `bench_mlp`.
    What fails, for lack of memory say, is recorded as failed. The limit is what reading
    `bytes_per_step` takes at this machine's bandwidth; peak memory is what is allocated, weights
    too, without what graphs reserve. Without a GPU there is neither, nor a number of launches.
    A first call compiles what no contender before has, in the order of `WAYS`, and captures.
    Raises ValueError for more tokens than a model has positions.
    """
    on_gpu = device.type == "cuda"
    run: dict[str, Any] = {**new_run(), "rounds": rounds, "ceilings": {}}
    record: dict[str, Any] = {
        "benchmark": "generate",
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": versions(),
        "compiled": compiled and on_gpu,
    }
    ways = {name: way for name, way in WAYS.items() if name != COMPILED or record["compiled"]}
    if quantizations:
        record["quantization"] = ", ".join(quantizations)
        ways.update(map(quantized_way, quantizations))
    if zeros is not None:
        record["zeros"] = str(zeros)  # a setting, which records must share
        ways[DENSE] = Way({"cuda_graphs": True, "sparsity": "off"})
    if mp_group is not None:
        record["ranks"] = str(mp_group.size())
        ways = {
            name: way if way.patch is None else Way({**way.patch, "mp_group": mp_group})
            for name, way in ways.items()
        }
        ways[ALONE] = WAYS[OURS]
    ranks = ranks_of(mp_group)
    model: Any = None
    held = None

    def measure(place: dict[str, Any]) -> dict[str, Any]:
        nonlocal model, held
        name, dtype = place["model"], place["dtype"]
        if held != (name, dtype):
            model = None
            _free()
            if on_gpu and dtype not in run["ceilings"]:
                run["ceilings"][dtype] = ceilings(getattr(torch, dtype))._asdict()
            model = load(name, dtype)
            held = name, dtype
        read = run["ceilings"][dtype]["read_tb_s"] if on_gpu else None
        return _cell(model, place, ways, rounds, read, ranks)

    def clock() -> float:
        """The first rank's: all skip the same cells."""
        now = time.monotonic()
        return now if ranks is None else ranks.exchange(now, "looking at the clock")[0]

    orders = {"model": tuple(MODELS)}
    with torch.no_grad():
        return fill(
            record, run, places, measure, orders=orders, seconds=seconds, kept=kept,
            progress=progress, save=save, clock=clock,
        )  # fmt: skip


def cells(
    models: Sequence[str],
    dtypes: Sequence[str],
    batches: Sequence[int],
    prompts: Sequence[int],
    new_tokens: Sequence[int],
    sampled: Sequence[bool] = (False,),
) -> list[dict[str, Any]]:
    """Every cell: texts in a batch, tokens in each prompt, new tokens for each text.

    sampled: whether tokens are chosen as `SAMPLED` says, or greedily.
    """
    keys = ("model", "dtype", "batch", "prompt", "new_tokens", "sampled")
    values = itertools.product(models, dtypes, batches, prompts, new_tokens, sampled)
    return [dict(zip(keys, each, strict=True)) for each in values]


def random_model(name: str, dtype: str, device: torch.device, zeros: float | None = None) -> Any:
    """A model of `MODELS` with random weights.

    zeros: of OPT, what part of the hidden values ReLU makes 0, about, by the bias in front of it.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODELS[name])
    if zeros is not None and config.model_type != "opt":
        raise ValueError(
            f"{name} has no ReLU, whose zeros --zeros is for; opt-1.3b and opt-6.7b do"
        )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if zeros is not None:
        # What a norm gives has mean square 1, so products are as the weights' rows are long.
        place = statistics.NormalDist().inv_cdf(min(max(zeros, 1e-6), 1 - 1e-6))
        for layer in model.model.decoder.layers:
            nn.init.constant_(layer.fc1.bias, -place * config.init_std * config.hidden_size**0.5)
    return model.eval()


def twin(model: Any) -> Any:
    """A copy whose weights lie in the same memory, until one of both is given others.

    Patching moves GPT-2's: its copy then has a layout of its own.
    """
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(weight.data, requires_grad=weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, memo)


class Contender:
    """A twin of a model, and one way to decode with it."""

    def __init__(self, model: Any, way: Way, sampled: bool = False) -> None:
        choice = SAMPLED if sampled else {"do_sample": False}
        self.model, self.options = twin(model), {**choice, **way.options}
        # No token ends a text: all are made.
        self.model.generation_config = GenerationConfig(pad_token_id=0)
        if way.patch is not None:
            patch_model(self.model, **way.patch)

    def generate(self, prompt: Tensor, tokens: int, streamer: Any = None) -> list[list[int]]:
        """The new tokens of each text, by the same random numbers in each call."""
        torch.manual_seed(0)
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            streamer=streamer,
            **self.options,
        )
        assert output.shape[1] == prompt.shape[1] + tokens
        return output[:, prompt.shape[1] :].tolist()

    def seconds(self, prompt: Tensor, tokens: int) -> float:
        """How long a call takes."""
        start = time.perf_counter()
        self.generate(prompt, tokens)
        return time.perf_counter() - start

    def gaps(self, prompt: Tensor, tokens: int) -> list[float]:
        """Seconds between a token of each text and the next, as they reach the host."""
        clock = _Clock()
        self.generate(prompt, tokens, clock)
        _, *times = clock.times  # the first is the prompt's
        return [after - before for before, after in itertools.pairwise(times)]

    def launches(self, prompt: Tensor, tokens: int) -> float:
        """Kernels on the GPU a step, replayed ones too, without copies and fills.

        A difference of two lengths, at most 16 and 8, leaves the prompt's out.
        """
        more = min(16, tokens)
        less = more // 2

        def launches(length: int) -> int:
            self.generate(prompt, length)  # a shorter text may have a graph of its own
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                self.generate(prompt, length)
                torch.cuda.synchronize()
            return sum(
                event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset"))
                for event in profiler.events() or ()
            )

        return (launches(more) - launches(less)) / (more - less)


class _Clock(BaseStreamer):
    """When tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Judge:
    """Where texts part: the margin there by the unpatched model, and how far errors reach.

    The error is the largest of a logit, of both models, against the unpatched one in a wider type,
    or where that finds no memory, of the patched one against the unpatched.
    """

    def __init__(self, model: Any, patched: Any | None) -> None:
        self.models = {"transformers": model}
        if patched is not None:
            self.models["hf_triton_mlp"] = patched
        wide = torch.float64 if model.dtype == torch.float32 else torch.float32
        self.wide = _unless_full(lambda: twin(model).to(wide))
        _free()
        self.against = "transformers" if self.wide is None else str(wide).removeprefix("torch.")

    def logits_errors(self, tokens: Tensor) -> dict[str, float] | None:
        """RMS error of each model's logits for tokens (1, length), relative to RMS logits."""
        if self.wide is None:
            return None
        reference = self.wide(tokens).logits
        return {
            side: round(((model(tokens).logits - reference).norm() / reference.norm()).item(), 8)
            for side, model in self.models.items()
        }

    def parting(self, tokens: Tensor, theirs: int, ours: int) -> dict[str, float]:
        """After tokens (1, length), the unpatched model's margin between two, and the error."""
        logits = {side: self._last(model, tokens) for side, model in self.models.items()}
        own = logits["transformers"]
        reference = own if self.wide is None else self._last(self.wide, tokens)
        errors = [(each - reference).abs().max().item() for each in logits.values()]
        return {"margin": (own[theirs] - own[ours]).item(), "error": max(errors)}

    def _last(self, model: Any, tokens: Tensor) -> Tensor:
        return model(tokens).logits[0, -1].double()


def _cell(
    model: Any,
    place: dict[str, Any],
    ways: dict[str, Way],
    rounds: int,
    read_tb_s: float | None,
    ranks: Ranks | None,
) -> dict[str, Any]:
    new, sampled = place["new_tokens"], place["sampled"]
    prompt = _prompt(model, place)
    of_model = bytes_per_step(model, place)
    limit_ms = None if read_tb_s is None else sum(of_model.values()) / read_tb_s / 1e9
    torch._dynamo.reset()
    _free()
    found: dict[str, dict[str, Any]] = {}
    contenders: dict[str, Contender] = {}
    texts: dict[str, list[list[int]]] = {}
    times: dict[str, list[tuple[float, float]]] = {}

    @contextmanager
    def part_of(name: str) -> Iterator[dict[str, Any]]:
        """A contender that fails, on any rank, takes no further part; ranks end it together."""
        failed = None
        try:
            yield found[name]
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"[:200]
        each = [failed] if ranks is None else ranks.exchange(failed, f"measuring {name}")
        failed = next((one for one in each if one is not None), None)
        if failed is not None:
            found[name]["failed"] = failed
            contenders.pop(name, None)
            times.pop(name, None)
            _free()  # here, where no traceback keeps tensors alive

    alone = _allocated(model)
    for name, way in ways.items():
        found[name] = {}
        with part_of(name) as result:
            contenders[name] = Contender(model, way, sampled)
            # What other contenders keep does not count, nor does a layout of weights twice, nor
            # weights that are there for others, as those are which this one has quantized.
            quantizes = "quantization" in (way.patch or {})
            weights = contenders[name].model.get_memory_footprint() if quantizes else alone
            beside = _allocated(model) - weights
            result["first_call_s"] = round(contenders[name].seconds(prompt, new), 3)
            contenders[name].seconds(prompt, 1)
            with _peak(model) as peak:
                texts[name] = contenders[name].generate(prompt, new)
            if peak:
                result["peak_memory"] = peak[0] - beside
            times[name] = []
    for number in range(rounds):
        # Who goes first alternates, so that a steady drift favours no one.
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            with part_of(name):
                whole, first = (contenders[name].seconds(prompt, tokens) for tokens in (new, 1))
                times[name].append((whole, first))
    quantized = [name for name in times if "quantization" in (ways[name].patch or {})]
    for name in times:
        limit = limit_ms
        skipped = skipped_bytes(contenders[name].model) if place["batch"] == 1 else 0
        if name in quantized or skipped or "mp_group" in (ways[name].patch or {}):
            per_step = bytes_per_step(contenders[name].model, place)
            per_step["weights"] -= skipped
            found[name]["bytes_per_step"] = per_step
            if read_tb_s is not None:
                limit = sum(per_step.values()) / read_tb_s / 1e9
        found[name].update(_figures(times, name, place, limit))
    others = [name for name in times if name not in (OURS, DENSE, ALONE, *quantized)]
    best = max(others, key=lambda n: found[n]["tokens_per_second"]["median"], default=None)
    speedup = None
    if OURS in times and best is not None:
        speedup = _spread(_ratios(times, OURS, best))
    for name in list(contenders):
        with part_of(name) as result:
            result.update(_details(contenders[name], prompt, new))
    if ranks is not None:
        # Where texts part, all ranks ask the same.
        each = ranks.exchange(texts, "comparing texts")
        texts = each[0]
        for name in contenders:
            found[name]["same_on_all_ranks"] = all(one[name] == texts[name] for one in each)
    patched = next((contenders[n].model for n in (OURS_EAGER, OURS) if n in contenders), None)
    torch._dynamo.reset()
    judge = Judge(model, patched)
    if EAGER in contenders:
        for name in contenders:
            if name != EAGER:
                margins = None if sampled else judge
                found[name].update(_compare(margins, prompt, texts[EAGER], texts[name]))
    return {
        "contenders": found,
        "bytes_per_step": of_model,
        "limit_ms": None if limit_ms is None else round(limit_ms, 4),
        "logits_error": _unless_full(judge.logits_errors, prompt[:1]),
        "error_against": judge.against,
        "best_other": best,
        "speedup": speedup,
    }


def _details(contender: Contender, prompt: Tensor, new: int) -> dict[str, Any]:
    """What calls of their own tell, and the captures."""
    gaps = sorted(contender.gaps(prompt, new))
    p99 = gaps[math.ceil(0.99 * len(gaps)) - 1]
    details: dict[str, Any] = {
        "gap_ms": {"median": round(statistics.median(gaps) * 1e3, 4), "p99": round(p99 * 1e3, 4)}
    }
    if prompt.is_cuda:
        details["launches_per_step"] = contender.launches(prompt, new)
    if decoding.is_enabled(contender.model):
        captures = captures_of(decoding.generating(contender.model))
        details["capture_s"] = round(captures.seconds, 3)
        details["graphs"] = str(captures)
    return details


def skipped_bytes(model: Any) -> int:
    """What a step of one text need not read, by the densities that patching measured."""
    return sum(
        round((1 - module.density) * config.hidden_size * config.intermediate_size)
        * model.dtype.itemsize
        // (1 if module.ranks is None else module.ranks.size)
        for module in model.modules()
        if isinstance(module, TritonMLP) and module.density is not None
        for config in (module.mlp_config,)
    )


def bytes_per_step(model: Any, place: dict[str, Any]) -> dict[str, int]:
    """What a step has to read: weights, and keys and values, as many as there are on average.

    Of embeddings, only a row for each text is read; tied ones are the last product's weight.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        tables.discard(id(head.weight))
    weights = sum(w.nbytes for w in model.parameters() if id(w) not in tables)
    weights += sum(linear.quantized.nbytes for _, linear in quantized_linears(model))
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    cache = getattr(model(tokens, use_cache=True), CACHE)
    states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
    each = sum(state.nbytes for state in states) / tokens.numel()
    length = place["prompt"] + place["new_tokens"] / 2
    return {"weights": weights, "keys_and_values": round(place["batch"] * length * each)}


def _prompt(model: Any, place: dict[str, Any]) -> Tensor:
    """Random tokens (batch, length)."""
    config = model.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if place["prompt"] + place["new_tokens"] > positions:
        raise ValueError(
            f"{place['model']} has {positions} positions, too few for a prompt of "
            f"{place['prompt']} and {place['new_tokens']} new tokens"
        )
    generator = torch.Generator().manual_seed(0)
    shape = place["batch"], place["prompt"]
    return torch.randint(0, config.vocab_size, shape, generator=generator).to(model.device)


def _figures(
    times: dict[str, list[tuple[float, float]]],
    name: str,
    place: dict[str, Any],
    limit_ms: float | None,
) -> dict[str, Any]:
    new = place["new_tokens"]
    tokens = place["batch"] * new
    step_ms = statistics.median((whole - first) / (new - 1) for whole, first in times[name]) * 1e3
    figures: dict[str, Any] = {
        "tokens_per_second": _spread([tokens / whole for whole, _ in times[name]]),
        "first_token_ms": round(statistics.median(first for _, first in times[name]) * 1e3, 4),
        "token_ms": round(step_ms, 4),
    }
    if EAGER in times and name != EAGER:
        figures["speedup_over_eager"] = _spread(_ratios(times, name, EAGER))
    if ALONE in times and name == OURS:
        figures["speedup_over_unshared"] = _spread(_ratios(times, name, ALONE))
    if limit_ms is not None:
        figures["of_limit"] = round(limit_ms / step_ms, 6)
    return figures


def _ratios(times: dict[str, list[tuple[float, float]]], name: str, other: str) -> list[float]:
    """How many times faster, round by round."""
    pairs = zip(times[name], times[other], strict=True)
    return [theirs / ours for (ours, _), (theirs, _) in pairs]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": round(median, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "range": [round(min(values), 4), round(max(values), 4)],
    }


def _compare(
    judge: Judge | None, prompt: Tensor, theirs: list[list[int]], ours: list[list[int]]
) -> dict[str, Any]:
    """Of each text the tokens until the first that differs, and what is known about that one.

    Sampled tokens have no margin, so that no judge knows.
    """
    equal, differences = [], []
    for row, (expected, found) in enumerate(zip(theirs, ours, strict=True)):
        same = [a == b for a, b in zip(expected, found, strict=True)]
        equal.append(same.index(False) if False in same else len(same))
        if False in same:
            position = same.index(False)
            new = torch.tensor(expected[:position], dtype=torch.int64, device=prompt.device)
            tokens = torch.cat([prompt[row], new])[None]
            parting = None
            if judge is not None:
                parting = _unless_full(judge.parting, tokens, expected[position], found[position])
            differences.append({"text": row, "position": position, **(parting or {})})
    return {"equal_tokens": equal, "differences": differences}


def _unless_full(work: Callable[..., Any], *args: Any) -> Any:
    """What it returns; None where there is no memory for it."""
    try:
        return work(*args)
    except torch.OutOfMemoryError:
        return None


def _allocated(model: Any) -> int:
    return torch.cuda.memory_allocated() if model.device.type == "cuda" else 0


@contextmanager
def _peak(model: Any) -> Iterator[list[int]]:
    """The most bytes that were allocated meanwhile, in a list that is empty without a GPU."""
    peak: list[int] = []
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield peak
    if model.device.type == "cuda":
        peak.append(torch.cuda.max_memory_allocated())


def _free() -> None:
    """Give back what nothing refers to. An error here is one after which no kernel runs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# --- showing ----------------------------------------------------------------------------------


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """For a terminal of 100 columns, one for each cell."""
    for cell in record["cells"]:
        shown = Table(title=_title(cell), box=SIMPLE, padding=(0, 1, 0, 0))
        shown.add_column("", no_wrap=True)
        for name in cell["contenders"]:
            shown.add_column(name.replace(" ", "\n", 1), justify="right", no_wrap=True)
        columns = [_column(result) for result in cell["contenders"].values()]
        for line in dict.fromkeys(itertools.chain(*columns)):
            shown.add_row(line, *(column.get(line, "-") for column in columns))
        yield shown


def _title(cell: dict[str, Any]) -> str:
    return f"{cell['model']}, {cell['dtype']}, batch {cell['batch']}, {_lengths(cell)} tokens"


def _lengths(cell: dict[str, Any]) -> str:
    sampled = ", sampled" if cell["sampled"] else ""
    return f"{cell['prompt']} + {cell['new_tokens']}{sampled}"


def _column(result: dict[str, Any]) -> dict[str, str]:
    """What is known of one contender, by what it is."""
    if "tokens_per_second" not in result:
        return {"tokens/s": "failed"}
    rate = result["tokens_per_second"]
    least, most = rate["range"]
    shown = {
        "tokens/s": f"{_number(rate['median'])} ±{(most - least) / 2 / rate['median']:.0%}",
        "times transformers eager": _ratio(result.get("speedup_over_eager")),
        **(
            {"times unshared": _ratio(result["speedup_over_unshared"])}
            if "speedup_over_unshared" in result
            else {}
        ),
        "first token, ms": _number(result["first_token_ms"]),
        "a token, ms": _number(result["token_ms"]),
    }
    if "gap_ms" in result:
        shown["gaps, ms, median and p99"] = " ".join(map(_number, result["gap_ms"].values()))
    if "of_limit" in result:
        shown["share of the limit"] = f"{result['of_limit']:.0%}"
    if "launches_per_step" in result:
        shown["kernels a step"] = f"{result['launches_per_step']:.0f}"
    if "peak_memory" in result:
        shown["peak memory, GiB"] = f"{result['peak_memory'] / 2**30:.2f}"
    if "same_on_all_ranks" in result:
        shown["same on all ranks"] = "yes" if result["same_on_all_ranks"] else "NO"
    shown["first call, s"] = f"{result['first_call_s']:.2f}"
    if "capture_s" in result:
        shown["captures, s"] = f"{result['capture_s']:.2f}"
    if "equal_tokens" in result:
        equal = result["equal_tokens"]
        shown["equal tokens, least and mean"] = f"{min(equal)} {statistics.mean(equal):.0f}"
    return shown


def _ratio(spread: dict[str, Any] | None) -> str:
    """The median, and what half of the rounds lie between."""
    if spread is None:
        return "-"
    low, high = spread["quartiles"]
    return f"{spread['median']:.2f} ({low:.2f}–{high:.2f})"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def remarks(record: dict[str, Any]) -> list[str]:
    """What failed and why, where texts part, and where ours ran without graphs."""
    lines = []
    for cell in record["cells"]:
        for name, result in cell["contenders"].items():
            where = f"{name}, {_title(cell)}"
            if "failed" in result:
                lines.append(f"failed: {where}: {result['failed']}")
            if name == OURS and result.get("capture_s") == 0:
                lines.append(f"not in CUDA graphs: {where}")
            if result.get("differences"):
                lines.append(f"texts part: {where}: {_partings(cell, result['differences'])}")
    return lines


def _partings(cell: dict[str, Any], differences: list[dict[str, Any]]) -> str:
    """How many texts part, and where that is the least due to rounding."""
    count = f"{len(differences)} of {cell['batch']}"
    known = [each for each in differences if "margin" in each]
    if not known:
        return count
    worst = max(known, key=lambda each: each["margin"] - each["error"])
    return (
        f"{count}; at most by a margin of {worst['margin']:.2g}, where logits are off by up to "
        f"{worst['error']:.2g} (against {cell['error_against']})"
    )


def markdown(record: dict[str, Any], dtype: str) -> str:
    """For a README: tokens per second of all contenders, and of ours what else is of interest."""
    measured = [cell for cell in record["cells"] if cell["dtype"] == dtype]
    named = dict.fromkeys((*WAYS, *itertools.chain(*(cell["contenders"] for cell in measured))))
    names = [name for name in named if any(name in cell["contenders"] for cell in measured)]
    lines = [
        ["model", "batch", "tokens", *names, "× the fastest other", "ms a token", "of the limit"]
    ]
    lines.append(["---"] * len(lines[0]))
    for cell in measured:
        results = cell["contenders"]
        rates = [results.get(name, {}).get("tokens_per_second") for name in names]
        ours = results.get(OURS, {})
        share = ours.get("of_limit")
        lines.append(
            [
                cell["model"],
                str(cell["batch"]),
                _lengths(cell),
                *("-" if rate is None else _number(rate["median"]) for rate in rates),
                _ratio(cell["speedup"]),
                _number(ours["token_ms"]) if "token_ms" in ours else "-",
                "-" if share is None else f"{share:.0%}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(record: dict[str, Any], path: Path, dtype: str) -> None:
    """How many times faster than transformers' eager loop each contender is, per model."""
    from matplotlib.figure import Figure

    measured = [cell for cell in record["cells"] if cell["dtype"] == dtype]
    models = list(dict.fromkeys(cell["model"] for cell in measured))
    names = [name for name in WAYS if name != EAGER]
    most = max(sum(cell["model"] == model for cell in measured) for model in models)
    figure = Figure(figsize=(max(7, 1.2 * most), 2.8 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    for model, axis in zip(models, axes, strict=True):
        groups = [cell for cell in measured if cell["model"] == model]
        for i, name in enumerate(names):
            bars = [
                (number + (i - 1) * 0.27, result["speedup_over_eager"]["median"])
                for number, cell in enumerate(groups)
                if "speedup_over_eager" in (result := cell["contenders"].get(name, {}))
            ]
            if bars:
                axis.bar(*zip(*bars, strict=True), width=0.25, color=f"C{i}", label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        labels = [f"{c['batch']} × ({_lengths(c)})" for c in groups]
        axis.set_xticks(range(len(groups)), labels, fontsize=7)
        axis.set(title=model, ylabel="× transformers eager")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{record['device']}, {dtype}: generate(), texts × (prompt + new tokens)")
    figure.savefig(path, dpi=130)
