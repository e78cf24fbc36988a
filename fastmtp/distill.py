"""The frozen model answers every prompt itself: the training set of FastMTP (arXiv 2509.18362, self-distillation).

In-process batched generation. Token ids are kept exactly; a killed run continues with the same command.

    python -m fastmtp.distill --model models/smollm2 --prompts examples/prompts.jsonl --split train --out distilled.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from fastmtp import files
from fastmtp.chat import prompt_ids
from fastmtp.cli import InputError, Parser, run
from fastmtp.decoding import Model, load, read_prompts


def turns(messages: list[dict]) -> list[list[dict]]:
    """The messages to hand over before each answer; answers that the prompt file holds are left out, to be redone."""
    parts: list[list[dict]] = [[]]
    for message in messages:
        if message["role"] == "assistant":
            parts.append([])
        else:
            parts[-1].append(message)
    return [part for part in parts if part]


def batches(model: Model, prompts: list[dict], size: int) -> list[list[dict]]:
    """Prompt rows in groups of `size`, short first prompts first, so that little is padded."""
    lengths = {row["id"]: len(prompt_ids(model.tokenizer, turns(row["messages"])[0])) for row in prompts}
    ordered = sorted(prompts, key=lambda row: lengths[row["id"]])
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


@torch.inference_mode()
def answer(model: Model, prompts: list[list[int]], config: GenerationConfig, seed: int) -> list[list[int]]:
    """Generate for a batch of prompts (token ids); answers end with an end token, or were cut at the limit."""
    longest = max(map(len, prompts))
    device = model.net.lm_head.weight.device
    pad = config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    torch.manual_seed(seed)
    out = model.net.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
    return [row[: next((i + 1 for i, t in enumerate(row) if t in model.eos_ids), len(row))] for row in out]


def answer_batch(model: Model, rows: list[dict], config: GenerationConfig, seed: int) -> list[dict]:
    """Answer every turn of every row, in order; one output line a row (the contract in the README).

    Raises InputError for a prompt that leaves no room for the longest answer in the model's context.
    """
    room = model.net.config.max_position_embeddings - config.max_new_tokens
    parts = [turns(row["messages"]) for row in rows]
    chats: list[list[dict]] = [[] for _ in rows]
    samples: list[dict] = [{} for _ in rows]
    for turn in range(max(map(len, parts))):
        where = [i for i, part in enumerate(parts) if turn < len(part)]
        for i in where:
            chats[i] += parts[i][turn]
        asked = [prompt_ids(model.tokenizer, chats[i]) for i in where]
        for i, ids in zip(where, asked, strict=True):
            if len(ids) > room:
                raise InputError(
                    f"prompt '{rows[i]['id']}' has {len(ids)} tokens, the model's context leaves {room}; "
                    "shorten it or lower --max-new-tokens"
                )
        for i, ids, output in zip(where, asked, answer(model, asked, config, seed + turn), strict=True):
            text = model.tokenizer.decode(output, skip_special_tokens=True)
            chats[i].append({"role": "assistant", "content": text, "token_ids": output})
            samples[i] = {
                "id": rows[i]["id"],
                "source": rows[i].get("source", ""),
                "lang": rows[i].get("lang", ""),
                "messages": chats[i],
                "prompt_ids": ids,
                "output_ids": output,
                "finish": "stop" if output[-1] in model.eos_ids else "length",
            }
    return samples


def distill(model: Model, prompts: list[dict], args) -> int:
    """Answer all prompts into `args.out`; returns the number of output tokens."""
    ends = sorted(model.eos_ids)
    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature > 0,
        temperature=args.temperature if args.temperature > 0 else None,
        top_k=args.top_k if args.temperature > 0 else None,
        top_p=args.top_p if args.temperature > 0 else None,
        eos_token_id=ends,
        pad_token_id=model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else ends[0],
    )
    total = 0
    with (
        files.growing(args.out, vars(args)) as (done, write),
        tqdm(total=len(prompts), initial=len(done), desc="distill", unit="prompt") as bar,
    ):
        for number, batch in enumerate(batches(model, prompts, args.batch_size)):
            if all(row["id"] in done for row in batch):
                continue
            for sample in answer_batch(model, batch, config, args.seed + 1000 * number):
                if sample["id"] not in done:
                    write(sample)
                    bar.update()
                    total += sum(len(m.get("token_ids", ())) for m in sample["messages"])
            bar.set_postfix_str(f"{total / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
    return total


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.distill",
        "Let the model answer every prompt; write its answers with exact token ids.",
        "python -m fastmtp.distill --model models/smollm2 --prompts examples/prompts.jsonl --split train \\\n"
        "    --max-new-tokens 128 --out data/distilled.jsonl",
    )
    p.add_argument("--model", required=True, help="model folder")
    p.add_argument("--prompts", required=True, help="jsonl with `messages` or `prompt`, and optionally id, source, lang")
    p.add_argument("--split", help="use only rows whose `split` is this")
    p.add_argument("--limit", type=int, help="use only the first N prompts")
    p.add_argument("--out", required=True, help="distilled samples, jsonl")
    p.add_argument("--max-new-tokens", type=int, default=4096, help="longest answer (default 4096, as the paper)")
    p.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default 0.6, as the paper)")
    p.add_argument("--top-k", type=int, default=20, help="default 20, as the paper")
    p.add_argument("--top-p", type=float, default=0.95, help="default 0.95, as the paper")
    p.add_argument("--batch-size", type=int, default=32, help="prompts generated together (default 32)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    for flag in ("max_new_tokens", "batch_size"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(args, flag)}")
    if args.temperature < 0:
        raise InputError(f"--temperature must be 0 or more, not {args.temperature}")
    prompts = read_prompts(args.prompts, args.split, args.limit)
    distill(load(args.model, args.dtype, args.device), prompts, args)
    files.write_provenance(Path(args.out), vars(args), [args.prompts])
    print(f"distilled {args.out}")


if __name__ == "__main__":
    run(main)
