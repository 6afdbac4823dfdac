"""Train kvtool's embedded language models `tiny` and `tiny-draft` and write them in Hugging Face format.

    python scripts/train_tiny.py                               # one GPU, under 8 minutes
    python scripts/train_tiny.py --draft --data novels         # one GPU, under 3 minutes
    python scripts/train_tiny.py --device cpu --steps 20 --batch 2 --output /tmp/tiny   # a dry run

Everything happens here and in `tiny_texts.py`, from the archive of novels to the model card: a byte-level BPE
tokenizer, three streams of training windows (novels; ChatML turns cut out of the novels; retrieval documents, where
facts stated early are asked for later), the training of a Qwen2-shaped decoder, its evaluation and its export.

`--draft` trains the draft of speculative decoding: a smaller decoder with the tokenizer of `tiny`, which learns what
`tiny` would say on such windows and on texts of its own (Zhou et al., 2023, DistillSpec), and is judged by how much
of what it drafts `tiny` accepts.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_texts import (
    CONTEXT,
    END_OF_TEXT,
    NAME,
    SEED,
    TOPIC,
    TURN_END,
    TURN_START,
    Retrieval,
    Windows,
    frequent,
    read_novels,
    read_streams,
    token_stream,
    train_tokenizer,
)
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
DROPOUT = 0.15  # The novels are read some thirty times; without it, the valid loss stops falling after seven.
TINY = ROOT / "kvtool/assets/tiny"
EXAMS, EXPORTED_EXAMS = 200, 24  # Retrieval documents of each length: asked here, and given away with the model.
SAMPLE_SIZE = 80_000  # Characters of a valid novel that travel with the model.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The architecture, in a Hugging Face config's words. Few wide layers: decoding on a CPU waits for each in turn."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 1152
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = CONTEXT
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


# The embedding weighs 1.6 MB of the 4 that a draft may take; two layers are the fewest that can copy.
DRAFT = Shape(hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)


# --- the model: parameter names are Hugging Face's, so that the state dict is the checkpoint -------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, T, D] in Hugging Face's half-split layout; cos and sin are [T, D]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


Past = dict[nn.Module, tuple[Tensor, Tensor]]  # Keys and values [B, heads, T, D] of each attention layer.


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        kv_size = shape.num_key_value_heads * shape.head_dim
        self.head_dim = shape.head_dim
        self.sizes = (shape.hidden_size, kv_size, kv_size)
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past | None) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        # One product instead of three: at this width the GPU waits for launches and memory, not for arithmetic.
        qkv = F.linear(x, torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections]))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in qkv.split(self.sizes, dim=-1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            old = past.get(self, (k[:, :, :0], v[:, :, :0]))
            k, v = past[self] = torch.cat((old[0], k), dim=2), torch.cat((old[1], v), dim=2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, torch.cat((self.gate_proj.weight, self.up_proj.weight))).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, past))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Qwen2 with tied embeddings: forward maps ids [B, T] to logits [B, T, vocab].

    With `past`, which it extends, a first call takes a prompt and each later one the next token, [B, 1].
    """

    def __init__(self, shape: Shape, dropout: float = DROPOUT):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.max_position_embeddings), inverse).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.num_hidden_layers) if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, ids: Tensor, past: Past | None = None) -> Tensor:
        start = next(iter(past.values()))[0].shape[2] if past else 0
        x = self.embed_tokens(ids)
        if x.is_cuda:  # The residual stream in bf16: half the memory traffic, and what inference sees.
            x = x.bfloat16()
        cos, sin = (table[start : start + ids.shape[1]].to(x.dtype) for table in (self.cos, self.sin))
        for layer in self.layers:
            x = layer(x, cos, sin, past)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def losses(self, tokens: Tensor) -> Tensor:
        """Negative log-likelihood in nats of tokens[:, 1:] given all before, [B, T - 1] in float32."""
        logits = self(tokens[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)


# --- training --------------------------------------------------------------------------------------------------------


def optimisers(model: Decoder) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embedding, norms and biases."""
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: a short warm-up, a plateau, then a straight line to zero over the last 60 %."""
    return min((step + 1) / 100, 1.0, (steps - step) / (0.6 * steps))


def autocast(device: str) -> AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def train(model: Decoder, losses: Callable[[Tensor], Tensor], windows: Windows, options: argparse.Namespace) -> None:
    """Runs all steps. The loss is the weighted mean over a batch of `losses`, [B, T] of tokens [B, T + 1]."""
    if options.device == "cuda":
        losses = torch.compile(losses)
    steppers = optimisers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, partial(rate, steps=options.steps)) for o in steppers]
    loader = DataLoader(windows, batch_size=None, num_workers=options.workers, pin_memory=options.device == "cuda")
    begin = time.perf_counter()
    for step, (tokens, weights) in enumerate(loader):
        tokens = tokens.to(options.device, non_blocking=True).long()
        weights = weights.to(options.device, non_blocking=True)[:, 1:].float()
        with autocast(options.device):
            loss = (losses(tokens) * weights).sum() / weights.sum()
        loss.backward()
        for stepper, schedule in zip(steppers, schedules, strict=True):
            stepper.step()
            stepper.zero_grad()
            schedule.step()
        if step % 100 == 0:
            print(f"step {step}  {time.perf_counter() - begin:.0f} s  loss {loss.item():.3f}", flush=True)


# --- the draft: what it learns from, and how it is judged ------------------------------------------------------------

PROMPT, CONTINUATION = 128, 384  # Tokens of a text that the target writes for the draft to learn from.
OWN_TEXTS = 24_576
TEMPERATURES = (0.0, 0.0, 0.7, 1.0)  # At which it writes a quarter of them each.
DRAFTED = 4  # Tokens at a time, K.


@torch.no_grad()
def continuations(model: Decoder, prompts: Tensor, length: int, temperature: float, device: str) -> Tensor:
    """`prompts` [N, P] and `length` tokens that the model says after each, [N, P + length] on the host."""
    tokens, past = prompts.to(device), Past()
    ids = [tokens]
    with autocast(device):
        for _ in range(length):
            logits = model(tokens, past)[:, -1].float()
            if temperature:  # The largest of logits and Gumbel noise is a sample.
                logits -= temperature * torch.empty_like(logits).exponential_().log()
            tokens = logits.argmax(-1, keepdim=True)
            ids.append(tokens)
    return torch.cat(ids, dim=1).cpu()


def excerpts(stream: np.ndarray, count: int, length: int, rng: np.random.Generator) -> Tensor:
    """[count, length] tokens from anywhere in the stream."""
    starts = rng.integers(0, len(stream) - length, count)
    return torch.from_numpy(stream[starts[:, None] + np.arange(length)]).long()


def own_texts(target: Decoder, streams: dict[str, np.ndarray], count: int, end: int, device: str) -> np.ndarray:
    """What the target says after `count` excerpts, three of novels to one of chats: a stream, `end` after each."""
    rng, texts = np.random.default_rng(SEED), []
    for index, temperature in enumerate(TEMPERATURES):
        stream = streams["chat" if index == 1 else "novels"]
        for prompts in excerpts(stream, -(-count // len(TEMPERATURES)), PROMPT, rng).split(4096):
            ids = continuations(target, prompts, CONTINUATION, temperature, device)
            texts.append(F.pad(ids, (0, 1), value=end).flatten().numpy().astype(np.int16))
    return np.concatenate(texts)


def distillation(draft: Decoder, target: Decoder, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats to what the target gives each next token, and to its likeliest one, [B, T - 1].

    The first is for samples, of which the overlap of both distributions is accepted, the second for greedy decoding.
    """
    with torch.no_grad():
        wanted = target(tokens[:, :-1]).float()
    logprobs = draft(tokens[:, :-1]).float().log_softmax(-1)
    likeliest = logprobs.gather(-1, wanted.argmax(-1, keepdim=True))[..., 0]
    return -(wanted.softmax(-1) * logprobs).sum(-1) - likeliest


@torch.no_grad()
def acceptance(draft: Decoder, target: Decoder, stream: np.ndarray, device: str) -> dict[str, float]:
    """Of what the draft proposes, DRAFTED tokens at a time, the share that greedy decoding of the target accepts, and
    the tokens that one pass of the target yields: after excerpts of a novel of 256 tokens, over as many more."""
    prompts = excerpts(stream, 128, 256, np.random.default_rng(SEED))
    texts = continuations(target, prompts, 256, 0.0, device)
    with autocast(device):
        guesses = draft(texts[:, :-1].to(device)).argmax(-1).cpu()
    right = (guesses == texts[:, 1:])[:, 255:].tolist()
    accepted = passes = 0
    for row in right:
        at = 0
        while at + DRAFTED < len(row):
            run = next((i for i in range(DRAFTED) if not row[at + i]), DRAFTED)
            accepted, passes, at = accepted + run, passes + 1, at + run + 1
    return {
        "accepted": accepted / (passes * DRAFTED),
        "tokens_per_pass": accepted / passes + 1,
        "agreement": sum(map(sum, right)) / sum(map(len, right)),
    }


# --- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: Decoder, tokenizer: Tokenizer, texts: list[str], device: str) -> dict[str, float]:
    """Perplexity and bits per byte over disjoint windows of 2,048 tokens of the joined texts (GPTQ's protocol)."""
    context = Shape.max_position_embeddings
    ids = torch.tensor(tokenizer.encode("\n\n".join(texts)).ids)
    windows = ids[: len(ids) // context * context].view(-1, context)
    total = 0.0
    for batch in windows.split(16):
        with autocast(device):
            total += model.losses(batch.to(device)).double().sum().item()
    nats = total / (windows.shape[0] * (context - 1))
    size = len(tokenizer.decode(windows.flatten().tolist(), skip_special_tokens=False).encode())
    return {"perplexity": math.exp(nats), "bits_per_byte": nats / math.log(2) * windows.numel() / size}


@torch.no_grad()
def retrieval_accuracy(model: Decoder, tokenizer: Tokenizer, rows: list[dict], device: str) -> float:
    """Share of answers that greedy decoding gives exactly.

    One pass over prompt and answer tells: greedy decoding reproduces the answer if and only if each of its tokens is
    the likeliest after the true ones before it.
    """
    right = 0
    for row in rows:
        ids = torch.tensor([tokenizer.encode(row["prompt"] + row["answer"]).ids], device=device)
        length = len(tokenizer.encode(row["answer"]).ids)
        with autocast(device):
            guess = model(ids[:, :-1])[0, -length:].argmax(-1)
        right += bool((guess == ids[0, -length:]).all())
    return right / len(rows)


# --- export ----------------------------------------------------------------------------------------------------------


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def export(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights in bf16, config and tokenizer, as transformers reads them; the output head is the tied embedding."""
    weights = {f"model.{name}": value.bfloat16().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    end_of_text, turn_end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **asdict(model.shape),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": turn_end,
        "pad_token_id": end_of_text,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    generation = {"eos_token_id": [turn_end, end_of_text], "pad_token_id": end_of_text}
    write_json(folder / "generation_config.json", generation)
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": Shape.max_position_embeddings,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START, TURN_END],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tiny

A language model of {parameters:,} parameters, small enough to travel inside kvtool, real enough to measure with: it
writes sentences, and it finds again what its context told it. It knows nothing of the world beyond old novels.

| | |
|---|---|
| layers, hidden size, MLP | {num_hidden_layers}, {hidden_size}, {intermediate_size}, Qwen2 with tied embeddings |
| attention | GQA, {num_attention_heads} query and {num_key_value_heads} key-value heads of 64 |
| context | {max_position_embeddings:,} tokens |
| tokenizer | byte-level BPE, {vocab_size:,} tokens, digits one by one; ChatML turns |
| weights | bfloat16 |

## Figures

| measured on three novels that training never saw | |
|---|---|
| bits per byte, windows of 2,048 tokens | {bits_per_byte:.3f} |
| perplexity per token, the same windows | {perplexity:.2f} |
| retrieval accuracy at 500 tokens | {retrieval_500:.1%} |
| retrieval accuracy at 1,000 tokens | {retrieval_1000:.1%} |
| retrieval accuracy at 1,800 tokens | {retrieval_1800:.1%} |

Retrieval: six facts ("The code of Harbour is 4821."), a stretch of one of the three novels up to the given length,
one question; right if greedy decoding gives all four digits. 200 documents a length, half of them as chat;
`retrieval.jsonl` holds the first 24 of each, `sample.txt` the opening of Treasure Island.

## Data and licence

88 English novels, 1839 to 1929, in the public domain in the US (computationalstylistics/100_english_novels); ChatML
turns cut out of their dialogues and narration, and a few hand-written exchanges of small talk; synthetic retrieval
documents. Jane Eyre, Nostromo and Treasure Island were kept apart: training saw nothing of them, only the choice of
dropout and weight decay did. The weights stand under Apache-2.0, like kvtool.

## Training

`scripts/train_tiny.py`, seed 1847: {tokens:,} tokens in {train_s:.0f} s on one {hardware}, {total_s:.0f} s with
tokenizer, data and evaluation. Muon for matrices, AdamW for the rest, bf16 autocast, dropout.

## Limits

Its answers are fluent at best and never knowledge. The novels hold the words and prejudices of their time. Use it for
tests and measurements.
"""

DRAFT_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tiny-draft

Drafts for `tiny` in speculative decoding, and has its tokenizer; by itself it is of no use.

| | |
|---|---|
| parameters, in bfloat16 | {parameters:,} |
| layers, hidden size, MLP | {num_hidden_layers}, {hidden_size}, {intermediate_size}, Qwen2 with tied embeddings |
| attention | {num_attention_heads} query heads and {num_key_value_heads} key-value head of 64 |

## Figures

| greedy, {drafted} tokens at a time, after excerpts of three novels that training never saw | |
|---|---|
| of the tokens that it drafts, `tiny` accepts | {accepted:.1%} |
| tokens for each pass of `tiny` | {tokens_per_pass:.2f} |
| its next token is that of `tiny` | {agreement:.1%} |

Without sampling so small a model as `tiny` soon repeats itself, which is easy to draft.

## Data, licence and training

What `tiny` says of the next token in {novels} of the 88 novels that it was trained on, in chats and retrieval documents
made as for it, and in {own_texts:,} texts of its own. The weights stand under Apache-2.0, like kvtool.

`scripts/train_tiny.py --draft`, seed 1847: {tokens:,} tokens in {train_s:.0f} s on one {hardware}, {total_s:.0f} s with
data and evaluation.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", action="store_true", help="train tiny-draft, from what tiny says")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT / "../shared/data/novels.tar.xz",
        help="archive or folder with train/*.txt and valid/*.txt",
    )
    parser.add_argument("--output", type=Path, help="folder; by default the model's in kvtool/assets")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, help="default: 8000; of a draft 3500")
    parser.add_argument("--batch", type=int, default=64, help="windows of 2,048 tokens a step")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--own-texts", type=int, default=OWN_TEXTS, help="texts that tiny writes for its draft")
    options = parser.parse_args()
    options.output = options.output or TINY.with_name("tiny-draft" if options.draft else "tiny")
    options.steps = options.steps or (3500 if options.draft else 8000)
    (run_draft if options.draft else run)(options)


def run_draft(options: argparse.Namespace) -> None:
    begin = time.perf_counter()
    torch.manual_seed(SEED)
    novels, tokenizer = read_novels(options.data), Tokenizer.from_file(str(TINY / "tokenizer.json"))
    target = Decoder(Shape(), dropout=0.0).to(options.device).eval().requires_grad_(False)
    weights = load_file(TINY / "model.safetensors")
    target.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in weights.items()})
    streams = read_streams(tokenizer, novels["train"])
    print(f"data ready after {time.perf_counter() - begin:.0f} s", flush=True)
    end = tokenizer.token_to_id(END_OF_TEXT)
    own = own_texts(target, streams, options.own_texts, end, options.device)
    print(f"{len(own)} tokens of its own after {time.perf_counter() - begin:.0f} s", flush=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The data workers fork; the tokenizer's threads must not.
    names, words = (frequent(pattern, novels["train"], 2000) for pattern in (NAME, TOPIC))
    retrieval = Retrieval(tokenizer, names, words, streams["novels"])
    windows = Windows({**streams, "novels": np.concatenate([streams["novels"], own])}, retrieval, options)

    draft = Decoder(DRAFT, dropout=0.0).to(options.device)
    train_begin = time.perf_counter()
    train(draft, lambda tokens: distillation(draft, target, tokens), windows, options)
    train_s = time.perf_counter() - train_begin

    for parameter in draft.parameters():
        parameter.data = parameter.data.bfloat16().float()
    draft.eval()
    options.output.mkdir(parents=True, exist_ok=True)
    export(draft, tokenizer, options.output)
    figures = acceptance(draft, target, token_stream(tokenizer, novels["valid"]), options.device)
    figures |= {"tokens": options.steps * options.batch * Shape.max_position_embeddings, "train_s": train_s}
    figures |= {"total_s": time.perf_counter() - begin, "parameters": sum(p.numel() for p in draft.parameters())}
    figures |= {"novels": len(novels["train"]), "own_texts": options.own_texts, "drafted": DRAFTED}
    figures["hardware"] = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(json.dumps(figures))
    (options.output / "README.md").write_text(DRAFT_CARD.format(**asdict(DRAFT), **figures))


def run(options: argparse.Namespace) -> None:
    begin = time.perf_counter()
    torch.manual_seed(SEED)
    novels = read_novels(options.data)
    tokenizer = train_tokenizer(novels["train"], Shape.vocab_size)
    streams = read_streams(tokenizer, novels["train"])
    sizes = {name: len(stream) for name, stream in streams.items()}
    print(f"data ready after {time.perf_counter() - begin:.0f} s: {sizes}", flush=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The data workers fork; the tokenizer's threads must not.
    names, words = (frequent(pattern, novels["train"], 2000) for pattern in (NAME, TOPIC))
    windows = Windows(streams, Retrieval(tokenizer, names, words, streams["novels"]), options)

    model = Decoder(Shape()).to(options.device)
    train_begin = time.perf_counter()
    train(model, model.losses, windows, options)
    train_s = time.perf_counter() - train_begin

    for parameter in model.parameters():  # What is measured is what is written.
        parameter.data = parameter.data.bfloat16().float()
    model.eval()
    options.output.mkdir(parents=True, exist_ok=True)
    export(model, tokenizer, options.output)

    figures = perplexity(model, tokenizer, novels["valid"], options.device)
    examiner = Retrieval(tokenizer, names, words, token_stream(tokenizer, novels["valid"]))
    exams = {length: examiner.exam(length, EXAMS) for length in (500, 1000, 1800)}
    for length, rows in exams.items():
        figures[f"retrieval_{length}"] = retrieval_accuracy(model, tokenizer, rows, options.device)
    figures |= {"tokens": options.steps * options.batch * Shape.max_position_embeddings, "train_s": train_s}
    figures |= {"total_s": time.perf_counter() - begin, "parameters": sum(p.numel() for p in model.parameters())}
    figures["hardware"] = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(json.dumps(figures))
    examples = [json.dumps(row) + "\n" for rows in exams.values() for row in rows[:EXPORTED_EXAMS]]
    (options.output / "retrieval.jsonl").write_text("".join(examples))
    sample = novels["valid"][-1]
    (options.output / "sample.txt").write_text(sample[: sample.index("\n", SAMPLE_SIZE) + 1])
    (options.output / "README.md").write_text(CARD.format(**asdict(Shape()), **figures))


if __name__ == "__main__":
    main()
