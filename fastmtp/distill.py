"""The frozen model answers every prompt itself: the training set of FastMTP (arXiv 2509.18362, self-distillation).

In-process batched generation. Token ids are kept exactly; a killed run continues with the same command.

    python -m fastmtp.distill --model models/smollm2 --prompts examples/prompts.jsonl --split train --out distilled.jsonl
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from fastmtp import files
from fastmtp.chat import prompt_ids
from fastmtp.cli import InputError, Parser, run
from fastmtp.decoding import Model, load, read_prompts


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; the defaults are the paper's. temperature 0 is greedy."""

    max_new_tokens: int = 4096
    temperature: float = 0.6
    top_k: int = 20
    top_p: float = 0.95


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
    """Prompt rows in groups of `size` of like length, so that little is padded; the groups in random order, so that
    the estimate of the time left is fair and a run cut short is a fair sample."""
    lengths = {row["id"]: len(prompt_ids(model.tokenizer, turns(row["messages"])[0])) for row in prompts}
    ordered = sorted(prompts, key=lambda row: lengths[row["id"]])
    groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    random.Random(0).shuffle(groups)
    return groups


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next token of each row. logits: [B, V] -> [B] int64. Sorts the top k alone, not the vocabulary."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    values, ids = logits.float().topk(min(sampling.top_k, logits.shape[-1]))
    shares = (values / sampling.temperature).softmax(-1)
    before = shares.cumsum(-1) - shares  # mass in front of each token: the first one is always kept
    shares = shares.masked_fill(before >= sampling.top_p, 0.0)
    return ids.gather(1, torch.multinomial(shares, 1, generator=generator)).squeeze(1)


@torch.inference_mode()
def answer(model: Model, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[list[int]]:
    """Generate for a batch of prompts (token ids); answers end with an end token, or were cut at the limit.

    Rows that have ended leave the batch once they are a quarter of it, so that a few long answers stay cheap.
    """
    net, device = model.net, model.net.lm_head.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    padded = not bool(mask.all())
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=net.config)
    outputs: list[list[int]] = [[] for _ in prompts]
    rows, alive = list(range(len(prompts))), [True] * len(prompts)
    while True:
        states = net.model(
            input_ids=ids, attention_mask=mask if padded else None, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        ids = choose(net.lm_head(states[:, -1]), sampling, generator)[:, None]
        for i, token in enumerate(ids[:, 0].tolist()):
            if alive[i]:
                outputs[rows[i]].append(token)
                alive[i] = token not in model.eos_ids and len(outputs[rows[i]]) < sampling.max_new_tokens
        if not any(alive):
            return outputs
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if sum(alive) <= 0.75 * len(rows):
            keep = [i for i, going in enumerate(alive) if going]
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            ids, mask, positions = ids[index], mask[index], positions[index]
            rows, alive = [rows[i] for i in keep], [True] * len(keep)


def answer_batch(model: Model, rows: list[dict], sampling: Sampling, seed: int) -> list[dict]:
    """Answer every turn of every row, in order; one output line a row (the contract in the README).

    Raises InputError for a prompt that leaves no room for the longest answer in the model's context.
    """
    room = model.net.config.max_position_embeddings - sampling.max_new_tokens
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
        for i, ids, output in zip(where, asked, answer(model, asked, sampling, seed + turn), strict=True):
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


def distill(model: Model, prompts: list[dict], args, config: dict) -> None:
    """Answer all prompts into `args.out`; rows that an earlier run with the same `config` left there are kept."""
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    total = 0
    with (
        files.growing(args.out, config) as (done, write),
        tqdm(total=len(prompts), initial=len(done), desc="distill", unit="prompt") as bar,
    ):
        for number, batch in enumerate(batches(model, prompts, args.batch_size)):
            if all(row["id"] in done for row in batch):
                continue
            for sample in answer_batch(model, batch, sampling, args.seed + 1000 * number):
                if sample["id"] not in done:
                    write(sample)
                    bar.update()
                    total += sum(len(m.get("token_ids", ())) for m in sample["messages"])
            bar.set_postfix_str(f"{total / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")


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
    default = Sampling()
    p.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="longest answer (default %(default)s)")
    p.add_argument("--temperature", type=float, default=default.temperature, help="0 is greedy (default %(default)s)")
    p.add_argument("--top-k", type=int, default=default.top_k, help="keep the k likeliest tokens (default %(default)s)")
    p.add_argument("--top-p", type=float, default=default.top_p, help="of those, keep this mass (default %(default)s)")
    p.add_argument("--batch-size", type=int, default=32, help="prompts generated together (default 32)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    for flag in ("max_new_tokens", "batch_size", "top_k"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(args, flag)}")
    if args.temperature < 0:
        raise InputError(f"--temperature must be 0 or more, not {args.temperature}")
    prompts = read_prompts(args.prompts, args.split, args.limit)
    config = files.settings(args)
    distill(load(args.model, args.dtype, args.device), prompts, args, config)
    files.write_provenance(args.out, config, [args.prompts])
    print(f"distilled {args.out}")


if __name__ == "__main__":
    run(main)
