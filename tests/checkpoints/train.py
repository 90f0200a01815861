"""Train the tiny models that the demo and the tests run on; writes a folder for each.

The text is the King James Bible, in the public domain, as Debian's package bible-kjv-text ships it:

    apt-get install bible-kjv
    bible -f 'gen1:1-rev22:21' < /dev/null | sed -E 's/^[0-9A-Za-z]+:[0-9]+ //' > kjv.txt
    python tests/checkpoints/train.py --text kjv.txt

The last 2 % of the verses are held out; their beginning is written to heldout.txt.
"""

import argparse
import math
import shutil
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

VOCABULARY, CONTEXT, HIDDEN, LAYERS, HEADS = 1024, 256, 128, 4, 4
#: As many weights in a gated MLP as the others have, and no multiple of a kernel's block.
GATED = 344
PROMPT = "And the LORD said unto"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **IDS,
        )
    )  # fmt: skip


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, **IDS)
    )


def opt(post_norm: bool = False) -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, hidden_size=HIDDEN,
            ffn_dim=4 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, dropout=0.0,
            do_layer_norm_before=not post_norm,
            word_embed_proj_dim=HIDDEN // 2 if post_norm else HIDDEN, **IDS,
        )
    )  # fmt: skip


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, hidden_size=HIDDEN,
            intermediate_size=GATED, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2, tie_word_embeddings=True, **IDS,
        )
    )  # fmt: skip


def gemma() -> PreTrainedModel:
    return GemmaForCausalLM(
        GemmaConfig(
            vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, hidden_size=HIDDEN,
            intermediate_size=GATED, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=1, head_dim=HIDDEN // HEADS, **IDS,
        )
    )  # fmt: skip


MODELS = {
    "gpt2": gpt2,
    "bloom": bloom,
    "opt-pre-norm": opt,
    "opt-post-norm": lambda: opt(post_norm=True),
    "llama": llama,
    "gemma": gemma,
}


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with VOCABULARY tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", model_max_length=CONTEXT, **SPECIAL
    )


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """exp of the mean loss over consecutive windows of CONTEXT tokens."""
    model.eval()
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT).to(model.device)
    losses = [model(batch, labels=batch).loss.item() for batch in windows.split(16)]
    model.train()
    return math.exp(sum(losses) / len(losses))


def train(model: PreTrainedModel, tokens: torch.Tensor, steps: int, batch: int) -> None:
    """AdamW, linear warm-up and cosine decay, random windows."""
    cuda = model.device.type == "cuda"
    tokens = tokens.to(model.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=cuda
    )
    warmup = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    window = torch.arange(CONTEXT, device=model.device)
    model.train()
    for _ in track(range(steps), description="training"):
        start = torch.randint(len(tokens) - CONTEXT, (batch, 1), device=model.device)
        inputs = tokens[start + window]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=cuda):
            loss = model(inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


def write(name: str, out: Path, text: str, arguments: argparse.Namespace) -> None:
    set_seed(0)
    lines = text.splitlines(keepends=True)
    split = len(lines) * 98 // 100
    training, held_out = "".join(lines[:split]), "".join(lines[split:])
    tokenizer = train_tokenizer(training)
    encode = lambda part: torch.tensor(tokenizer(part, verbose=False)["input_ids"])  # noqa: E731
    train_tokens, test_tokens = encode(training), encode(held_out)

    model = MODELS[name]().to(arguments.device)
    before = perplexity(model, test_tokens)
    train(model, train_tokens, arguments.steps, arguments.batch)
    after = perplexity(model, test_tokens)
    model.eval()
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    greedy = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    sample = tokenizer.decode(greedy[0], skip_special_tokens=True)

    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    quoted = sample.replace("\n", "\n> ")
    options = f"--only {name} --steps {arguments.steps} --batch {arguments.batch}"
    command = f"python tests/checkpoints/train.py --text kjv.txt {options}"
    (folder / "README.md").write_text(f"""\
# {name}

{type(model).__name__} with {model.num_parameters():,} parameters, trained by

    {command}

on the King James Bible (public domain; Debian package bible-kjv-text; see train.py).
Perplexity per token on the held-out text: {after:.1f} (untrained: {before:.0f}).
Greedy text:

> {quoted}
""")
    (out / "heldout.txt").write_text(held_out[:4000].rsplit("\n", 1)[0] + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: perplexity {before:.0f} -> {after:.1f}, {size:,} bytes\n{sample}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="one verse a line")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    text = arguments.text.read_text()
    for name in arguments.only:
        write(name, arguments.out, text, arguments)


if __name__ == "__main__":
    main()
