"""Training speed of the head: tokens per second, useful TFLOP/s against the card's matrix rate, memory.

Dummy weights of the real shape (bfloat16 backbone, float32 head under autocast), synthetic documents of 32 to
4,096 tokens with a mean near 700, a quarter of each a prompt; the same documents and the same AdamW for both

    ours         documents packed into rows of --packed-length, frozen backbone without a graph, --attention
                 on torch's flash kernels, cross-entropy at targets alone; one optimiser step per row
    flash-attn   the same through FlashAttention 4 (`mtp_flash_attn: true`)
    paper-style  as the paper's code and `swift sft`'s defaults have it: one document per batch, backward with
                 gradient checkpointing through the frozen backbone, next-token logits computed (and weighted
                 0), float32 logits of every position at each step, `paper` attention; one optimiser step per
                 eight documents

Useful operations are those that the result needs, whichever way it is computed: 2 a weight and token for the
backbone's forward pass, and 4 * heads * head width for each visible pair of its attention; for the head three
times that (forward and backward), at all tokens for step 1 and at anchors with a target for later steps; 4 a
weight of the output matrix for each target (logits, and the gradient of their input). Padding, recomputation
and logits of prompts count nothing.

    python -m benchmarks.train_throughput --shape mimo-7b --out results/train_throughput/mimo-7b.json
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2ForCausalLM

from benchmarks.shapes import SHAPES
from fastmtp import files
from fastmtp.cli import InputError, Parser, run
from fastmtp.data.recipe_check import flash_attn_fault
from fastmtp.head.losses import IGNORE, step_targets, step_weights
from fastmtp.head.modeling_mimo import MiMoConfig, MiMoForCausalLM
from fastmtp.head.recursion import ATTENTIONS, layout, recurse
from fastmtp.head.varlen import use_flash_attn

IMPLEMENTATIONS = ("ours", "flash-attn", "paper-style")
ACCUMULATED = 8  # documents a step of the optimiser, in the paper's recipe


def build(shape: dict, num_steps: int, device: str, attention: str = "exact") -> MiMoForCausalLM:
    """Random weights on the device, as the ms-swift plugin loads them: all frozen but the float32 head."""
    rope = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
    settings = {"mtp_num_steps": num_steps, "mtp_attention": attention, "attn_implementation": "sdpa"}
    config = MiMoConfig(**shape, rope_parameters=rope, **settings)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            net = MiMoForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    net.requires_grad_(False)
    net.head.float().requires_grad_(True)
    return net.train()


def make_documents(count: int, vocab_size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of each document: lengths log-normal, the first quarter a prompt."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = max(32, min(4096, int(rng.lognormvariate(6.17, 0.9))))
        ids = torch.randint(0, vocab_size, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 4] = IGNORE
        rows.append((ids, labels))
    return rows


def pack(documents: list[tuple[Tensor, Tensor]], length: int) -> list[dict[str, Tensor]]:
    """Rows of whole documents, as many as fit, in order; position_ids restart with each. No padding."""
    rows: list[list[tuple[Tensor, Tensor]]] = [[]]
    for document in documents:
        if rows[-1] and sum(len(ids) for ids, _ in rows[-1]) + len(document[0]) > length:
            rows.append([])
        rows[-1].append(document)
    return [
        {
            "input_ids": torch.cat([ids for ids, _ in row])[None],
            "labels": torch.cat([labels for _, labels in row])[None],
            "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in row])[None],
        }
        for row in rows
    ]


def paper_style_loss(net: MiMoForCausalLM, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The loss of one document, everything by autograd."""
    hidden = net.model(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False
    ).last_hidden_state
    positions, segments = layout(input_ids.shape, input_ids.device, None, None)
    steps = net.config.mtp_num_steps
    states = recurse(
        net.head, net.rope, hidden, net.model.embed_tokens(input_ids), positions, segments, steps, "paper"
    )
    shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    targets = [shifted, *step_targets(labels, segments, steps)]
    total = torch.zeros((), device=hidden.device)
    for weight, state, target in zip(
        [0.0, *step_weights(steps, 0.6)], [hidden, *states], targets, strict=True
    ):
        logits = net.lm_head(state).float()
        total = total + weight * F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE)
    return total


def useful_operations(shape: dict, documents: list[tuple[Tensor, Tensor]], num_steps: int) -> float:
    """Multiplications and additions that training on `documents` needs; see the module's text."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    queries, keys = heads * shape["head_dim"], shape["num_key_value_heads"] * shape["head_dim"]
    layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * shape["intermediate_size"]
    head = layer + 2 * hidden * hidden
    total = 0.0
    for ids, labels in documents:
        length = len(ids)
        pairs = 4 * queries * length * (length + 1) / 2
        total += shape["num_hidden_layers"] * (2 * layer * length + pairs)
        for step, target in enumerate(step_targets(labels[None], torch.ones(1, length).long(), num_steps), 1):
            count = int((target != IGNORE).sum())
            share = 1.0 if step == 1 else count / length
            total += 3 * share * (2 * head * length + pairs)
            total += 4 * hidden * shape["vocab_size"] * count
    return total


def matrix_rate(device: str) -> float:
    """Operations a second of bfloat16 products of two 8192 x 8192 matrices, after a warm-up."""
    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    for count in (20, 100):
        wait(device)
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        wait(device)
        seconds = time.perf_counter() - start
    return 2 * size**3 * count / seconds


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Trainer:
    """One implementation's step over a list of batches, the optimiser included."""

    def __init__(self, net: MiMoForCausalLM, impl: str, device: str, recompute: bool):
        self.net, self.stock, self.device = net, impl == "paper-style", device
        self.optimiser = torch.optim.AdamW(net.head.parameters(), lr=1e-5, fused=True)
        if self.stock:  # stock Qwen2's checkpointing, all through the backbone; ours leaves that out
            Qwen2ForCausalLM.gradient_checkpointing_enable(
                net, gradient_checkpointing_kwargs={"use_reentrant": True}
            )
            net.enable_input_require_grads()
        elif recompute:
            net.gradient_checkpointing_enable()

    def step(self, batches: Sequence[dict[str, Tensor]]) -> None:
        """Forward and backward of each batch, then one step of the optimiser."""
        for batch in batches:
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            with torch.autocast(self.device, torch.bfloat16):
                loss = paper_style_loss(self.net, **batch) if self.stock else self.net(**batch).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.net.head.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()


def steps_of(
    impl: str, documents: list[tuple[Tensor, Tensor]], packed_length: int
) -> list[list[dict[str, Tensor]]]:
    """The batches of each step of the optimiser."""
    if impl != "paper-style":
        return [[row] for row in pack(documents, packed_length)]
    singles = [{"input_ids": ids[None], "labels": labels[None]} for ids, labels in documents]
    return [singles[start : start + ACCUMULATED] for start in range(0, len(singles), ACCUMULATED)]


def measure(
    impl: str,
    shape: dict,
    documents: list[tuple[Tensor, Tensor]],
    num_steps: int,
    packed_length: int,
    compiled: bool,
    recompute: bool,
    attention: str = "exact",
) -> dict:
    """Seconds, tokens/s, useful TFLOP/s and peak memory over the weights, of one pass over `documents`."""
    use_flash_attn(impl == "flash-attn")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    net = build(shape, num_steps, device, attention)
    if compiled and impl == "ours":
        net.compile_layers()
    weights = torch.cuda.memory_allocated() if device == "cuda" else 0
    trainer = Trainer(net, impl, device, recompute)
    steps = steps_of(impl, documents, packed_length)
    longest = max(range(len(steps)), key=lambda n: max(b["input_ids"].shape[1] for b in steps[n]))
    for n in (0, longest, min(1, len(steps) - 1)):  # compiled code, the allocator's and cuBLAS' workspaces
        trainer.step(steps[n])
    wait(device)
    start = time.perf_counter()
    for batches in tqdm(steps, desc=impl, unit="step", disable=None):
        trainer.step(batches)
    wait(device)
    seconds = time.perf_counter() - start
    tokens = sum(len(ids) for ids, _ in documents)
    return {
        "impl": impl,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "useful_tflops": round(useful_operations(shape, documents, num_steps) / seconds / 1e12, 2),
        "peak_gib_above_weights": round((torch.cuda.max_memory_allocated() - weights) / 2**30, 2)
        if weights
        else None,
    }


def table(config: dict, rows: list[dict]) -> str:
    """The figures as markdown, with what they were measured on."""
    lines = [
        f"# Training throughput: {config['shape']}, K={config['num_steps']}",
        "",
        f"{config['card']}, torch {config['torch']}. `python -m benchmarks.train_throughput --shape "
        f"{config['shape']} --attention {config['attention']} "
        f"--packed-length {config['packed_length']} --num-steps {config['num_steps']} --documents "
        f"{config['documents']}"
        f"{' --compile' if config['compile'] else ''}{' --recompute' if config['recompute'] else ''} "
        f"--seed {config['seed']}`",
        "",
        "| | tokens/s | useful TFLOP/s | share of the matrix rate | peak GiB above the weights |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (
            row["tokens_per_second"],
            row["useful_tflops"],
            f"{row['share_of_matrix_rate']:.1%}",
            row["peak_gib_above_weights"],
        )
        lines.append(f"| {row['impl']} | " + " | ".join(str(cell) for cell in cells) + " |")
    lines += ["", f"Matrix rate, bfloat16, 8192 x 8192, in the same run: {rows[0]['matrix_tflops']} TFLOP/s."]
    for row in rows[1:]:
        speed = rows[0]["tokens_per_second"] / row["tokens_per_second"]
        lines += [f"{rows[0]['impl']} over {row['impl']}: {speed:.2f} times the tokens per second."]
    return "\n".join(lines) + "\n"


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.train_throughput",
        "Training speed and memory of the head, ours beside the paper's way, on dummy weights.",
        "python -m benchmarks.train_throughput --shape mimo-7b --out results/train_throughput/mimo-7b.json",
    )
    p.add_argument(
        "--shape", choices=("mimo-7b", "smollm2"), default="mimo-7b", help="model shape (default mimo-7b)"
    )
    p.add_argument(
        "--impl",
        choices=IMPLEMENTATIONS,
        nargs="+",
        default=["ours", "paper-style"],
        help="default: ours paper-style",
    )
    p.add_argument("--attention", choices=ATTENTIONS, default="exact", help="of ours (default exact)")
    p.add_argument("--packed-length", type=int, default=8192, help="tokens of a row, ours (default 8192)")
    p.add_argument("--num-steps", type=int, default=3, help="recursive steps K (default 3)")
    p.add_argument("--documents", type=int, default=200, help="documents to train on (default 200)")
    p.add_argument("--compile", action="store_true", help="torch.compile the layers, ours")
    p.add_argument("--recompute", action="store_true", help="gradient checkpointing of the head, ours")
    p.add_argument("--seed", type=int, default=0, help="of lengths and tokens (default 0)")
    p.add_argument("--out", help="JSON file for the figures; a table goes beside it as .md")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    for name, least in (("packed_length", 4096), ("num_steps", 1), ("documents", 1)):
        if getattr(args, name) < least:
            raise InputError(
                f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}"
            )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[args.shape]
    outputs = [Path(args.out), Path(args.out).with_suffix(".md")] if args.out else []
    for path in outputs:
        files.claim(path)
    if device == "cpu" and args.shape != "smollm2":
        raise InputError(f"no GPU here, and --shape {args.shape} needs one; give --shape smollm2")
    if "flash-attn" in args.impl and (fault := "no GPU" if device == "cpu" else flash_attn_fault()):
        raise InputError(
            f"--impl flash-attn: it does not load here ({fault}); run: pip install -e '.[flash]'"
        )
    documents = make_documents(args.documents, shape["vocab_size"], args.seed)
    rate = matrix_rate(device) / 1e12
    rows = []
    for impl in args.impl:
        row = measure(
            impl,
            shape,
            documents,
            args.num_steps,
            args.packed_length,
            args.compile,
            args.recompute,
            args.attention,
        )
        row |= {
            "matrix_tflops": round(rate, 1),
            "share_of_matrix_rate": round(row["useful_tflops"] / rate, 4),
        }
        rows.append(row)
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if args.out:
        card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        config = {**vars(args), "card": card, "torch": torch.__version__}
        files.write_json(args.out, {"config": config, "results": rows})
        with files.atomic(Path(args.out).with_suffix(".md")) as path:
            path.write_text(table(config, rows), encoding="utf-8")
        for path in outputs:
            files.write_provenance(path, config)


if __name__ == "__main__":
    run(main)
