"""Train the four tiny checkpoints of the test suite on the King James Bible.

The text comes from the Debian package bible-kjv, one verse a line:

    apt-get install bible-kjv
    bible -f 'Ge1:1-Re22:21' | cut -d' ' -f2- > kjv.txt
    python tests/checkpoints/train.py --text kjv.txt
"""

import argparse
import math
import os
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SEED = 0
VOCAB = 1024
CONTEXT = 256
BATCH = 32
HELD_OUT_FRACTION = 0.02
HELD_OUT_FILE_BYTES = 6000
PEAK_LEARNING_RATE = {"gpt2": 3e-3, "bloom": 3e-3, "opt-pre-norm": 3e-3, "opt-post-norm": 1e-3}
PROMPT = "And the LORD said unto Moses,"
FOLDER_LIMIT = 4_000_000
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")

README = """\
# {name}

A tiny {family} ({variant}) for the tests of hf_triton_mlp:
{parameters:,} parameters in float32, hidden size {hidden}, {layers} layers, byte-level BPE of {vocab} tokens.

Trained with

    {command}

{steps} steps of {batch} x {context} tokens in {minutes:.1f} minutes on {device},
torch {torch}, transformers {transformers}.

| held-out text | tokens | perplexity, trained | perplexity, untrained |
|---|---|---|---|
| the last {percent:.0f} % of the verses | {tokens:,} | {trained:.2f} | {untrained:.0f} |
| heldout.txt, the first {file_bytes:,} bytes of those | {file_tokens:,} | {file_trained:.2f} | \
{file_untrained:.0f} |

Greedy continuation:

> {sample}

## Text and licence

The King James Version of the Bible, from the Debian package bible-kjv-text 4.38. The package's
copyright file: "The copyright for the King James Version text of the Bible is expired since the
translation was done in 1611" — the text is in the public domain. Only the text was used, none of
the package's programs. How to get it: the first lines of tests/checkpoints/train.py.
"""


def build_models() -> dict[str, tuple[str, PreTrainedModel]]:
    """Untrained models with a line on what is particular about each, by folder name."""
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    opt = dict(
        vocab_size=VOCAB,
        hidden_size=128,
        ffn_dim=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        **ids,
    )
    gpt2 = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **ids,
    )
    bloom = BloomConfig(vocab_size=VOCAB, hidden_size=128, n_layer=4, n_head=4, **ids)
    pre_norm = OPTConfig(**opt, word_embed_proj_dim=128, do_layer_norm_before=True)
    post_norm = OPTConfig(**opt, word_embed_proj_dim=64, do_layer_norm_before=False)
    return {
        "gpt2": ("tanh GELU, learned positions", GPT2LMHeadModel(gpt2)),
        "bloom": ("tanh GELU, ALiBi", BloomForCausalLM(bloom)),
        "opt-pre-norm": ("ReLU, norm before the MLP", OPTForCausalLM(pre_norm)),
        "opt-post-norm": (
            "ReLU, norm after the MLP, embeddings of 64 projected to 128",
            OPTForCausalLM(post_norm),
        ),
    }


def train_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, lines: list[str]) -> torch.Tensor:
    text = [line + "\n" for line in lines]
    return torch.tensor([i for ids in tokenizer(text)["input_ids"] for i in ids])


def train(
    model: PreTrainedModel, tokens: torch.Tensor, *, steps: int, peak: float, name: str
) -> None:
    device = model.device
    windows = tokens.to(device).unfold(0, CONTEXT, 1)
    generator = torch.Generator(device).manual_seed(SEED)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    warmup = min(200, steps // 10 + 1)

    def rate(step: int) -> float:
        done = (step - warmup) / max(1, steps - warmup)
        return (
            (step + 1) / warmup if step < warmup else 0.05 + 0.475 * (1 + math.cos(math.pi * done))
        )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    bar = tqdm(range(steps), desc=name)
    for step in bar:
        starts = torch.randint(len(windows), (BATCH,), generator=generator, device=device)
        batch = windows[starts]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood, in float32, over windows that do not overlap."""
    model.eval()
    total, count = 0.0, 0
    for window in tokens.to(model.device).split(CONTEXT):
        if len(window) > 1:
            predicted = len(window) - 1
            total += model(input_ids=window[None], labels=window[None]).loss.item() * predicted
            count += predicted
    return math.exp(total / count)


def greedy_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="plain text, one verse a line")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", choices=sorted(PEAK_LEARNING_RATE), help="train one model")
    parser.add_argument("--steps", type=int, default=4000)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    return parser.parse_args()


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args = parse_arguments()
    lines = args.text.read_text(encoding="utf-8").splitlines()
    split = len(lines) - round(len(lines) * HELD_OUT_FRACTION)
    held_out_lines = lines[split:]
    tokenizer = train_tokenizer(lines[:split])
    tokens = token_stream(tokenizer, lines[:split])
    held_out = token_stream(tokenizer, held_out_lines)

    excerpt = "\n".join(held_out_lines)[:HELD_OUT_FILE_BYTES].rpartition("\n")[0]
    file_tokens = token_stream(tokenizer, excerpt.splitlines())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "heldout.txt").write_text(excerpt + "\n", encoding="utf-8")
    on_gpu = args.device.type == "cuda"
    device_name = torch.cuda.get_device_name(args.device) if on_gpu else "a CPU"

    for name in [args.only] if args.only else PEAK_LEARNING_RATE:
        torch.manual_seed(SEED)
        variant, model = build_models()[name]
        model.to(args.device)
        untrained = perplexity(model, held_out), perplexity(model, file_tokens)
        started = time.perf_counter()
        train(model, tokens, steps=args.steps, peak=PEAK_LEARNING_RATE[name], name=name)
        minutes = (time.perf_counter() - started) / 60
        trained = perplexity(model, held_out), perplexity(model, file_tokens)
        sample = greedy_sample(model, tokenizer)

        folder = args.out / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        readme = README.format(
            name=name,
            family=type(model).__name__,
            variant=variant,
            parameters=model.num_parameters(),
            hidden=model.config.hidden_size,
            layers=model.config.num_hidden_layers,
            vocab=VOCAB,
            command="python tests/checkpoints/train.py "
            f"--text kjv.txt --only {name} --steps {args.steps}",
            steps=args.steps,
            batch=BATCH,
            context=CONTEXT,
            minutes=minutes,
            device=device_name,
            torch=torch.__version__,
            transformers=transformers.__version__,
            percent=HELD_OUT_FRACTION * 100,
            tokens=len(held_out),
            trained=trained[0],
            untrained=untrained[0],
            file_bytes=len(excerpt) + 1,
            file_tokens=len(file_tokens),
            file_trained=trained[1],
            file_untrained=untrained[1],
            sample=sample,
        )
        (folder / "README.md").write_text(readme, encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(
            f"{name}: perplexity {untrained[0]:.0f} -> {trained[0]:.2f}, {size:,} bytes: {sample}"
        )
        if size > FOLDER_LIMIT:
            raise SystemExit(f"{folder} has {size:,} bytes, more than {FOLDER_LIMIT:,}")


if __name__ == "__main__":
    main()
