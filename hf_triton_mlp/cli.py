"""hf-triton-mlp: demo, validate, quantize, tune, bench, info."""

import copy
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import transformers
import triton
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import hf_triton_mlp
from hf_triton_mlp import (
    autotune,
    bench,
    bench_generate,
    bench_parallel,
    bench_quantized,
    bench_sparse,
    quality,
    support,
    tuning,
    validation,
)
from hf_triton_mlp.density import densities, texts
from hf_triton_mlp.kernels.activations import ACTIVATIONS, SPARSE
from hf_triton_mlp.launchers import linear_of
from hf_triton_mlp.measure import CASES, Case
from hf_triton_mlp.patching import patch_model, patch_report, relu_projections, unpatch_model
from hf_triton_mlp.quality import QualityReport
from hf_triton_mlp.quantization import CODES
from hf_triton_mlp.quantizer import TritonMLPConfig, quantization_of
from hf_triton_mlp.ranks import Ranks
from hf_triton_mlp.reading import read_projection
from hf_triton_mlp.specs import specs
from hf_triton_mlp.validation import DEFAULT_TEXT, ValidationReport

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fused Triton MLPs for Hugging Face Transformers models.",
)
benchmarks = typer.Typer(
    no_args_is_help=True, help="Measure the kernels, or whole calls of generate()."
)
app.add_typer(benchmarks, name="bench")
console = Console()

DTYPES = ("float32", "float16", "bfloat16")
PROMPTS = (
    "In the beginning God created",
    "And the LORD said unto Moses, Go",
    "The king",
)

#: How long a process waits for the others.
PATIENCE = timedelta(minutes=5)

Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: the GPU if any")]
NewTokens = Annotated[int, typer.Option(min=1, help="greedy tokens to compare")]
Seconds = Annotated[float, typer.Option(help="start no cell after so many")]
Record = Annotated[
    Path | None, typer.Option("--json", help="the record; cells that it holds already are kept")
]
Plot = Annotated[Path | None, typer.Option(help="draw a plot here (needs matplotlib)")]


@app.command()
def demo(
    names: Annotated[list[str] | None, typer.Argument(help="checkpoints; default: all")] = None,
    checkpoints: Annotated[Path, typer.Option(help="their folder")] = Path("tests/checkpoints"),
    device: Device = None,
    max_new_tokens: NewTokens = 40,
) -> None:
    """Patch and validate the bundled checkpoints, and generate text with both models."""
    with _errors_in_one_line():
        found = sorted(path.parent.name for path in checkpoints.glob("*/config.json"))
        if not found:
            raise ValueError(
                f"no checkpoints in {checkpoints}: run this in a checkout of hf_triton_mlp, "
                "or give their folder with --checkpoints"
            )
        heldout = checkpoints / "heldout.txt"
        reports: dict[str, list[ValidationReport]] = {}
        for name in names or found:
            if name not in found:
                raise ValueError(f"no checkpoint {name!r}; there are {', '.join(found)}")
            console.rule(name)
            reports[name] = []
            for dtype in _dtypes("all", device):
                report, _ = _validate(
                    str(checkpoints / name),
                    dtype=dtype,
                    device=device,
                    text=heldout.read_text() if heldout.exists() else None,
                    prompts=PROMPTS,
                    max_new_tokens=max_new_tokens,
                    depth="layer",
                    show=not reports[name],
                )
                reports[name].append(report)
            console.print(_table(reports[name]))
        _finish(reports)


@app.command()
def validate(
    path_or_name: Annotated[str, typer.Argument(help="a folder, or a name on the model hub")],
    dtype: Annotated[
        str, typer.Option(help="float32, float16, bfloat16 or all that the device computes in")
    ] = "all",
    device: Device = None,
    text: Annotated[Path | None, typer.Option(help="a text file for the perplexity")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="may be given several times")] = None,
    max_new_tokens: NewTokens = 40,
    depth: Annotated[str, typer.Option(help="layer or mlp")] = "layer",
    quantization: Annotated[
        str | None,
        typer.Option(help="int8, int4 or fp8: patch a quantized model, and say what that costs"),
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="write the reports here")] = None,
) -> None:
    """Compare a patched model with the original; exit status 1 when it is out of bounds."""
    with _errors_in_one_line(), _mp_group(device) as group:
        _need_folders(output)
        found = [
            _validate(
                path_or_name,
                dtype=one,
                device=device,
                text=None if text is None else text.read_text(),
                prompts=tuple(prompt or PROMPTS),
                max_new_tokens=max_new_tokens,
                depth=depth,
                show=False,
                quantization=quantization,
                group=group,
            )
            for one in _dtypes(dtype, device)
        ]
        reports = [report for report, _ in found]
        console.print(_table(reports))
        for report, cost in found:
            if cost is not None:
                console.print(_quality_table(cost, f"{quantization}, {report.dtype}"))
        if output is not None and _is_first(group):
            written = [
                asdict(report) | ({} if cost is None else {"quality": asdict(cost)})
                for report, cost in found
            ]
            output.write_text(json.dumps(written, indent=2) + "\n")
        _finish({path_or_name: reports})


@app.command()
def quantize(
    path_or_name: Annotated[str, typer.Argument(help="a folder, or a name on the model hub")],
    output: Annotated[Path, typer.Argument(help="the folder for the quantized model")],
    format: Annotated[str, typer.Option(help="int8, int4 or fp8")] = "int8",
    group_size: Annotated[int | None, typer.Option(help="codes that share a scale")] = None,
    symmetric: Annotated[
        bool | None, typer.Option(help="codes on both sides of 0; default: all but int4")
    ] = None,
    refine: Annotated[
        bool, typer.Option(help="int4: search scales and zeros, which takes longer")
    ] = False,
    activations: Annotated[str | None, typer.Option(help="fp8: inputs too, with fp8")] = None,
    include: Annotated[list[str] | None, typer.Option(help="layers; may be repeated")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="layers; may be repeated")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float16",
    device: Device = None,
    text: Annotated[Path | None, typer.Option(help="a text file for the perplexity")] = None,
    report: Annotated[Path | None, typer.Option("--json", help="write the report here")] = None,
) -> None:
    """Quantize the MLPs of a model, compare it with the original, and save it."""
    with _errors_in_one_line():
        _need_folders(report)
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} is not empty")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        config = TritonMLPConfig(
            format=format,
            group_size=group_size,
            symmetric=symmetric,
            refine=refine,
            activations=activations,
            include=include,
            exclude=exclude,
        )
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; supported: {', '.join(DTYPES)}")
        options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        with _progress(f"{path_or_name}: quantizing"):
            tokenizer = _loaded(transformers.AutoTokenizer, path_or_name)
            model = transformers.AutoModelForCausalLM
            original = _loaded(model, path_or_name, **options).to(_device(device)).eval()
            quantized = _loaded(model, path_or_name, **options, quantization_config=config)
            quantized = quantized.to(_device(device)).eval()
        words = DEFAULT_TEXT if text is None else text.read_text()
        ids = tokenizer(words, return_tensors="pt", verbose=False)["input_ids"][0]
        with _progress(f"{path_or_name}: comparing"):
            try:
                for each in (original, quantized):
                    patch_model(each, cuda_graphs=each.device.type == "cuda")
            except (ValueError, RuntimeError) as error:  # what is quantized need not be patched
                console.print(f"compared as they are: {escape(str(error))}", soft_wrap=True)
                original, quantized = unpatch_model(original), unpatch_model(quantized)
            found = quality.compare(original, quantized, ids)
        console.print(_quality_table(found))
        unpatch_model(quantized).save_pretrained(output)
        tokenizer.save_pretrained(output)
        if report is not None:
            report.write_text(json.dumps(asdict(found), indent=2) + "\n")


@app.command()
def tune(
    models: Annotated[
        list[str] | None, typer.Argument(help="folders, or names on the model hub")
    ] = None,
    case: Annotated[list[str] | None, typer.Option(help="a shape of `bench mlp`")] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="may be repeated")] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="try only this one, beside the plans in use")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16: one serves both")] = "float16",
    quantization: Annotated[
        list[str] | None,
        typer.Option(help="int8, int4 or fp8, instead of 16-bit weights; may be repeated"),
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="the part of one of so many GPUs that share the weights")
    ] = 1,
    output: Annotated[
        Path | None, typer.Option("--json", help="the table; default: where it is looked for")
    ] = None,
) -> None:
    """Find the fastest plans of this GPU for the MLPs of models; weights are not needed."""
    with _errors_in_one_line():
        if dtype not in DTYPES[1:]:
            raise ValueError(f"plans are tuned for float16 or bfloat16, found {dtype!r}")
        if not models and not case:
            raise ValueError("name a model, or a shape by --case")
        _known("case", case, CASES)
        _known("kernel", kernel, tuning.KERNELS)
        _known("quantization", quantization, CODES)
        _need_gpu()
        cases = [CASES[name] for name in case or ()]
        for name in models or ():
            config = transformers.AutoConfig.from_pretrained(name)
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
            cases += autotune.cases_of(model, name)
        cases = [_part(one, ranks) for one in cases]
        if quantization:
            formats = [quantization_of(each) for each in quantization]
            cases = [replace(each, quantization=form) for each in cases for form in formats]
        path = output or tuning.user_file()
        with _bar() as show:
            found = autotune.tune(
                cases,
                getattr(torch, dtype),
                path,
                rows=rows or autotune.ROWS,
                kernels=kernel or tuning.KERNELS,
                progress=show,
            )
        table = Table("MLP", "rows", "up", "down", "µs a layer", box=SIMPLE)
        for one, M, measured in found:
            form = "" if one.quantization is None else f", {one.quantization.format}"
            sizes = f"{one.name} {one.hidden}, {one.intermediate}{form}"
            plans = str(measured.up), str(measured.down)
            table.add_row(sizes, str(M), *plans, f"{measured.us:.1f}")
        console.print(table)
        console.print(f"written: {escape(str(path))}", soft_wrap=True)


def _part(case: Case, ranks: int) -> Case:
    """What each of so many ranks has of an MLP."""
    if case.intermediate % ranks:
        raise ValueError(
            f"{case.name}: the intermediate size {case.intermediate} is not a multiple of {ranks}"
        )
    return replace(case, intermediate=case.intermediate // ranks)


@benchmarks.command("mlp")
def bench_mlp(
    case: Annotated[list[str] | None, typer.Option(help="one of them; may be repeated")] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="may be repeated")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float16, bfloat16 or both")] = None,
    compiled: Annotated[bool, typer.Option(help="torch.compile too, which takes longest")] = True,
    seconds: Seconds = math.inf,
    output: Record = None,
    plot: Plot = None,
) -> None:
    """Time one layer's residual + norm + MLP + residual, ours and everyone's."""
    with _errors_in_one_line():
        _known("case", case, CASES)
        _known("dtype", dtype, DTYPES[1:])
        _need_folders(output, plot)
        kept = bench.read(output) if output is not None and output.exists() else None
        _need_gpu()
        dtypes = tuple(dtype or DTYPES[1:])
        with _bar() as show:
            record = bench.bench_mlp(
                tuple(case or CASES),
                tuple(rows or bench.ROWS),
                dtypes,
                compiled=compiled,
                seconds=seconds,
                kept=kept,
                progress=show,
                save=lambda record: None if output is None else bench.write(record, output),
            )
        for run in record["runs"][-1:]:
            for name, most in run["ceilings"].items():
                console.print(
                    f"{record['device']}, {name}: share of {most['read_tb_s']:.2f} TB/s read "
                    f"or of {most['product_tflop_s']:.0f} TFLOP/s"
                )
        for table in bench.tables(record):
            console.print(table)
        for group, mean in bench.geometric_means(record).items():
            console.print(f"{group}: {mean:.2f} × the best of the others (geometric mean)")
        for failure in bench.failures(record):
            console.print(escape(failure), soft_wrap=True)
        if record["skipped"]:
            console.print(f"skipped for lack of time: {', '.join(record['skipped'])}")
        if plot is not None:
            bench.plot(record, plot, dtypes[0])


@benchmarks.command("quantized")
def bench_quantized_(
    case: Annotated[list[str] | None, typer.Option(help="one of them; may be repeated")] = None,
    format: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(bench_quantized.FORMATS)}; all")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="may be repeated")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16")] = "float16",
    peers: Annotated[bool, typer.Option(help="other libraries too, if installed")] = True,
    seconds: Seconds = math.inf,
    output: Record = None,
) -> None:
    """Time one layer's residual + norm + MLP + residual with quantized weights."""
    with _errors_in_one_line():
        _known("case", case, CASES)
        _known("format", format, bench_quantized.FORMATS)
        _known("dtype", [dtype], DTYPES[1:])
        _need_folders(output)
        kept = bench.read(output) if output is not None and output.exists() else None
        _need_gpu()
        with _bar() as show:
            record = bench_quantized.bench_quantized(
                tuple(case or bench_quantized.CASES_OF_BARS),
                tuple(format or bench_quantized.FORMATS),
                tuple(rows or bench_quantized.ROWS),
                dtype,
                peers=peers,
                seconds=seconds,
                kept=kept,
                progress=show,
                save=lambda record: None if output is None else bench.write_lines(record, output),
            )
        for table in bench_quantized.tables(record):
            console.print(table)
        for failure in bench.failures(record):
            console.print(escape(failure), soft_wrap=True)
        if record["skipped"]:
            console.print(f"skipped for lack of time: {', '.join(record['skipped'])}")


@benchmarks.command("sparse")
def bench_sparse_(
    case: Annotated[list[str] | None, typer.Option(help="one of them; may be repeated")] = None,
    zeros: Annotated[
        list[float] | None, typer.Option(min=0, max=0.999, help="their part; may be repeated")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, max=16, help="may be repeated")] = None,
    format: Annotated[
        list[str] | None, typer.Option(help="of weights: 16 bits, int8, int4; may be repeated")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16")] = "float16",
    seconds: Seconds = math.inf,
    output: Record = None,
) -> None:
    """Time one layer's residual + norm + ReLU MLP + residual, dense and with zeros skipped."""
    with _errors_in_one_line():
        _known("case", case, bench_sparse.SHAPES)
        _known("format", format, (bench_sparse.PLAIN, *bench_quantized.FORMATS))
        _known("dtype", [dtype], DTYPES[1:])
        _need_folders(output)
        kept = bench.read(output) if output is not None and output.exists() else None
        _need_gpu()
        with _bar() as show:
            record = bench_sparse.bench_sparse(
                tuple(case or bench_sparse.SHAPES),
                tuple(zeros or bench_sparse.ZEROS),
                tuple(rows or bench_sparse.ROWS),
                dtype,
                tuple(format or (bench_sparse.PLAIN,)),
                seconds=seconds,
                kept=kept,
                progress=show,
                save=lambda record: None if output is None else bench.write_lines(record, output),
            )
        for table in bench_sparse.tables(record):
            console.print(table)
        if record["skipped"]:
            console.print(f"skipped for lack of time: {', '.join(record['skipped'])}")


@benchmarks.command("parallel")
def bench_parallel_(
    case: Annotated[list[str] | None, typer.Option(help="one of them; may be repeated")] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="may be repeated")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16")] = "float16",
    seconds: Seconds = math.inf,
    output: Record = None,
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="measure nothing: how whole models scale, with a record's all-reduces"
        ),
    ] = False,
    all_reduce_us: Annotated[
        float | None, typer.Option(help="for --table, where no record tells it")
    ] = None,
) -> None:
    """Time one layer's residual + norm + MLP + residual, shared by the processes of torchrun."""
    with _errors_in_one_line(), _mp_group(None) as group:
        _known("case", case, bench_parallel.SHAPES)
        _known("dtype", [dtype], DTYPES[1:])
        _need_folders(output)
        kept = bench.read(output) if output is not None and output.exists() else None
        if table:
            known = {} if kept is None else bench_parallel.latencies(kept)
            default = {} if all_reduce_us is None else dict.fromkeys((2, 4, 8), all_reduce_us)
            print(bench_parallel.scaling_markdown(bench_parallel.scaling({**default, **known})))
            return
        if group is None:
            raise ValueError(
                "this measures processes that share an MLP: torchrun --nproc-per-node 2 -m "
                "hf_triton_mlp bench parallel"
            )
        _need_gpu()
        with _bar() as show:
            record = bench_parallel.bench_parallel(
                Ranks(group),
                tuple(case or bench_parallel.MEASURED),
                tuple(rows or bench_parallel.ROWS),
                dtype,
                seconds=seconds,
                kept=kept,
                progress=show,
                save=lambda record: None if output is None else bench.write_lines(record, output),
            )
        if record is None:
            return
        for shown in bench_parallel.tables(record):
            console.print(shown)
        if record["skipped"]:
            console.print(f"skipped for lack of time: {', '.join(record['skipped'])}")


@benchmarks.command("generate")
def bench_generate_(
    models: Annotated[
        list[str],
        typer.Argument(
            help=f"{', '.join(bench_generate.MODELS)} with random weights; or a folder, or a name "
            "on the model hub"
        ),
    ],
    batch: Annotated[list[int] | None, typer.Option(min=1, help="may be repeated; 1")] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(min=1, help="its tokens; may be repeated; 32")
    ] = None,
    new_tokens: Annotated[
        list[int] | None, typer.Option(min=2, help="may be repeated; 128")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="may be repeated; float16, on the CPU float32")
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="temperature 0.8, top-k 50, top-p 0.95; not greedily")
    ] = False,
    device: Device = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile", help="transformers' compiled steps, which take longest"
        ),
    ] = True,
    quantization: Annotated[
        list[str] | None, typer.Option(help="int8, int4 or fp8: a contender more; may be repeated")
    ] = None,
    zeros: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.999,
            help="random weights, of a ReLU model: so many hidden values are 0; a contender more, "
            "which skips none",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="calls of each contender")] = 5,
    seconds: Seconds = math.inf,
    output: Record = None,
    plot: Plot = None,
) -> None:
    """Time whole calls of generate(), ours and transformers', and compare their texts."""
    with _errors_in_one_line(), _mp_group(device) as group:
        _known("dtype", dtype, DTYPES)
        _known("quantization", quantization, CODES)
        _need_folders(output, plot)
        kept = bench.read(output) if output is not None and output.exists() else None
        where = _device(device)
        dtypes = tuple(dtype or ("float16" if where.type == "cuda" else "float32",))
        if group is not None and seconds < math.inf:
            raise ValueError("--seconds is for one process: each of more has a clock of its own")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

        def load(name: str, dtype: str) -> Any:
            if name in bench_generate.MODELS:
                return bench_generate.random_model(name, dtype, where, zeros)
            if zeros is not None:
                raise ValueError(f"--zeros is for random weights, and {name} has its own")
            model = _loaded(transformers.AutoModelForCausalLM, name, dtype=getattr(torch, dtype))
            return model.to(where).eval()

        on_gpu = where.type == "cuda"
        with _bar() as show, torch.cuda.device(where) if on_gpu else nullcontext():
            record = bench_generate.bench_generate(
                bench_generate.cells(
                    models, dtypes, batch or (1,), prompt or (32,), new_tokens or (128,), (sample,)
                ),
                load,
                device=where,
                compiled=compiled,
                quantizations=quantization or (),
                zeros=zeros,
                rounds=rounds,
                seconds=seconds,
                mp_group=group,
                kept=kept,
                progress=show,
                save=lambda record: (
                    bench.write_lines(record, output)
                    if output is not None and _is_first(group)
                    else None
                ),
            )
        for table in bench_generate.tables(record):
            console.print(table)
        for remark in bench_generate.remarks(record):
            console.print(escape(remark), soft_wrap=True)
        if record["skipped"]:
            console.print(f"skipped for lack of time: {', '.join(record['skipped'])}")
        if plot is not None and _is_first(group):
            bench_generate.plot(record, plot, dtypes[0])


@app.command()
def info(
    density: Annotated[
        str | None,
        typer.Option(help="a folder, or a name on the model hub: how many zeros ReLU makes there"),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="a text file for --density")] = None,
    device: Device = None,
) -> None:
    """Versions, the device, and what can be patched: families, and every causal language model."""
    with _errors_in_one_line():
        if density is not None:
            console.print(_density_table(density, text, _device(device)))
            return
        versions = Table("package", "version")
        versions.add_row("python", platform.python_version())
        for module in (hf_triton_mlp, torch, triton, transformers):
            versions.add_row(module.__name__, module.__version__)
        console.print(versions)
        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
            console.print(
                f"device: {gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
                f"{gpu.total_memory / 2**30:.0f} GiB"
            )
        else:
            console.print("device: CPU (patched models run PyTorch here)")
        table = Table("family", "layer", "MLP", "depths", title="supported architectures")
        for spec in sorted(specs(), key=lambda spec: spec.family):
            owner = "" if spec.mlp is None else f"{spec.mlp}."
            names = [name for name in (spec.gate, spec.up, spec.down) if name is not None]
            layer = spec.layer_class.rpartition(".")[2]
            table.add_row(spec.family, layer, owner + ", ".join(names), ", ".join(spec.depths))
        console.print(table)
        console.print("activations:", ", ".join(ACTIVATIONS))
        with _progress("looking at every causal language model of transformers"):
            every = support.every_support()
        table = Table("model type", "patched", "by", title="causal language models")
        for each in every:
            table.add_row(each.model_type, each.kind, escape(each.detail))
        console.print(table)
        for kind in (*support.KINDS, "unknown"):
            count = sum(each.kind == kind for each in every)
            if count:
                console.print(f"{kind}: {count} of {len(every)}", highlight=False)


def _density_table(path: str, text: Path | None, device: torch.device) -> Table:
    """What 1, 4 and 16 texts have that is not zero behind each ReLU, drawn for one."""
    batches = (1, 4, 16)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = _loaded(transformers.AutoModelForCausalLM, path, dtype="auto").to(device).eval()
    tokenizer = _loaded(transformers.AutoTokenizer, path)
    downs = relu_projections(model)
    if not downs:
        raise ValueError(f"{path} has no {' or '.join(SPARSE)}, which make zeros")
    written = DEFAULT_TEXT if text is None else text.read_text()
    tokens = tokenizer(written, return_tensors="pt").input_ids[0]
    longest = getattr(model.config, "max_position_embeddings", None) or len(tokens)
    found = densities(model, downs, texts(tokens, batches[-1], longest), batches)
    table = Table("layer", *(f"{n} text{'s' * (n > 1)}" for n in batches), "", "decode steps")
    for name, of_texts in found.items():
        read = read_projection(downs[name])
        pays = False
        if read is not None:
            linear = linear_of(1, read[0], False)
            linear = linear._replace(dtype=torch.float16)
            pays = tuning.pays_to_skip(linear, of_texts[1])
        parts = (f"{of_texts[n]:.1%}" for n in batches)
        bar = "█" * round(40 * of_texts[1])
        table.add_row(name, *parts, bar, "zeros are skipped" if pays else "dense")
    return table


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """What a user can meet (no such model, not supported, no such file) shows no traceback."""
    try:
        yield
    except typer.Exit:  # a RuntimeError too
        raise
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error


@contextmanager
def _mp_group(device: str | None) -> Iterator[Any]:
    """Under torchrun, the group of all its processes, of which the first prints; else None.

    A GPU of the machine for each, or its CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    options: dict[str, Any] = {"backend": "gloo"}
    if _device(device).type == "cuda":
        index = int(os.environ["LOCAL_RANK"])
        if _device(device).index is not None or index >= torch.cuda.device_count():
            raise ValueError(
                f"each process has a GPU: start one for each of the {torch.cuda.device_count()}, "
                "without a number in --device"
            )
        torch.cuda.set_device(index)
        options = {"backend": "nccl", "device_id": torch.device("cuda", index)}
    dist.init_process_group(**options, timeout=PATIENCE)
    quiet, console.quiet = console.quiet, dist.get_rank() != 0
    try:
        yield dist.group.WORLD
    finally:
        console.quiet = quiet
        dist.destroy_process_group()


def _is_first(group: Any) -> bool:
    """Whether this process writes files: the first of a group, and one alone."""
    return group is None or group.rank() == 0


@contextmanager
def _progress(description: str) -> Iterator[None]:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        progress.add_task(description, total=None)
        yield


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar, as a function of what is done, how much of it and of how much."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield show


def _known(what: str, names: Iterable[str] | None, known: Collection[str]) -> None:
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; there are {', '.join(known)}")


def _need_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"no folder {path.parent} to write {path.name} in")


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise ValueError("this needs an NVIDIA GPU, and torch sees none")


def _device(device: str | None) -> torch.device:
    """The named device, or the GPU if there is one; ValueError when it is not there."""
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {device}: torch sees {torch.cuda.device_count()} GPUs")
    return found


def _dtypes(dtype: str, device: str | None) -> tuple[str, ...]:
    if dtype == "all":
        return DTYPES if _device(device).type == "cuda" else ("float32", "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; supported: {', '.join(DTYPES)}, all")
    return (dtype,)


def _loaded(cls: Any, path: str, **options: Any) -> Any:
    try:
        return cls.from_pretrained(path, **options)
    except Exception as error:  # safetensors, tokenizers and json have their own
        raise ValueError(f"cannot load {path}: {error}") from error


def _validate(
    path: str,
    *,
    dtype: str,
    device: str | None,
    text: str | None,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    depth: str,
    show: bool,
    quantization: str | None = None,
    group: Any = None,
) -> tuple[ValidationReport, QualityReport | None]:
    """Load, patch a copy, compare; `show` prints the patch report and both texts too.

    With a quantization, of a quantized model, beside which what it costs is told. group: whose
    ranks share the weights of the copy.
    """
    options: dict[str, Any] = {"depth": depth}
    if group is not None:
        options["mp_group"] = group
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = _device(device)
    with _progress(f"{path}: {dtype}: loading"):
        tokenizer = _loaded(transformers.AutoTokenizer, path)
        original = _loaded(transformers.AutoModelForCausalLM, path, dtype=getattr(torch, dtype))
        original = plain = original.to(where).eval()
        if quantization is not None:
            loading = {"quantization_config": TritonMLPConfig(format=quantization)}
            loading["dtype"] = getattr(torch, dtype)
            original = _loaded(transformers.AutoModelForCausalLM, path, **loading)
            original = original.to(where).eval()
        model = patch_model(copy.deepcopy(original), **options)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for each in (original, model):
        each.generation_config.pad_token_id = tokenizer.pad_token_id
    cases = {"single": tokenizer(prompts[0], return_tensors="pt")}
    if len(prompts) > 1:
        cases["left-padded"] = tokenizer(list(prompts), return_tensors="pt", padding=True)
    cases = {
        name: {key: case[key] for key in ("input_ids", "attention_mask")}
        for name, case in cases.items()
    }
    words = DEFAULT_TEXT if text is None else text
    ids = tokenizer(words, return_tensors="pt", verbose=False)["input_ids"][0]
    with _progress(f"{path}: {dtype}: validating"):
        report = validation.validate(
            original, model, cases, text=ids, max_new_tokens=max_new_tokens
        )
        cost = None
        if quantization is not None:
            cost = quality.compare(patch_model(plain, **options), model, ids)
    if show:
        console.print(str(patch_report(model)), highlight=False, soft_wrap=True)
        for name, each in (("original", original), ("patched", model)):
            prompt = {key: value.to(each.device) for key, value in cases["single"].items()}
            tokens = each.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)[0]
            console.print(f"[bold]{name}:[/] ", end="")
            console.print(tokenizer.decode(tokens), markup=False, highlight=False)
    return report, cost


def _quality_table(found: QualityReport, title: str | None = None) -> Table:
    table = Table("", "original", "quantized", "", title=title, box=SIMPLE)
    before, after = found.perplexity_original, found.perplexity_quantized
    table.add_row(
        "perplexity", f"{before:.3f}", f"{after:.3f}", f"{100 * (after / before - 1):+.2f} %"
    )
    table.add_row("KL divergence", "", f"{found.kl_divergence:.2e}", "nats a token")
    sizes = [size / 1e6 for size in (found.bytes_original, found.bytes_quantized)]
    table.add_row("MB", *(f"{size:.1f}" for size in sizes), f"{sizes[1] / sizes[0]:.2f} x")
    times = found.ms_per_token_original, found.ms_per_token_quantized
    table.add_row("ms a token", *(f"{t:.2f}" for t in times), f"{times[1] / times[0]:.2f} x")
    table.add_section()
    for name, error in found.weight_errors.items():
        table.add_row(escape(name), "", f"{error:.2e}", "RMS error of the weight, relative")
    return table


def _table(reports: list[ValidationReport]) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in (
        "dtype,\ncase",
        "error\nmax, RMS",
        "torch's\nown",
        "ratio\n(RMS)",
        "perplexity\nof both",
        "greedy\ntokens",
        "",
    ):
        table.add_column(column, no_wrap=True)
    for report in reports:
        both = (report.perplexity_patched, report.perplexity_original)
        perplexities = "\n".join("-" if value is None else f"{value:.3f}" for value in both)
        for case in report.cases:
            errors, place = case.logits, case.difference
            greedy = f"{case.new_tokens} equal"
            if place is not None:
                greedy = f"row {place.row} @ {place.position}\nmargin {place.margin:.2g}"
            failed = any(failure.startswith(f"{case.case}:") for failure in report.failures)
            table.add_row(
                f"{report.dtype}\n{case.case}",
                f"{errors.patched_max:.2e}\n{errors.patched_rms:.2e}",
                f"{errors.torch_max:.2e}\n{errors.torch_rms:.2e}",
                f"{errors.ratio:.2f}",
                perplexities,
                greedy,
                "[red]failed[/]" if failed else "[green]ok[/]",
            )
    return table


def _finish(reports: dict[str, list[ValidationReport]]) -> None:
    """Name what failed and exit with 1, or say that all is within the bound."""
    every = [(name, report) for name, of_one in reports.items() for report in of_one]
    failures = [
        f"{name}, {report.dtype}, {what}" for name, report in every for what in report.failures
    ]
    for failure in failures:
        console.print(f"[red]failed:[/] {escape(failure)}", soft_wrap=True)
    if failures:
        raise typer.Exit(1)
    console.print(
        f"[green]validated:[/] {len(every)} comparisons, every error at most twice torch's own"
    )


def main() -> None:
    """Entry point of the console script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
