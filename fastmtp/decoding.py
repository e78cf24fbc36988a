"""Reference speculative decoder for one MTP head: short enough to check by eye, lossless, CPU or GPU, one
stream.

A cycle: the head drafts K tokens from the last committed backbone state, the backbone verifies them in one
forward pass, the longest right prefix and one token of the backbone's own are kept. Greedy decoding keeps the
draft that equals the backbone's argmax; at a temperature the rule of Leviathan et al. (arXiv 2211.17192)
accepts a draft x with probability min(1, p(x)/q(x)) and otherwise samples from the residual, which leaves the
backbone's distribution. The head's keys of committed tokens always come from true backbone states
(recursion.py, `exact`).

    python -m fastmtp.decoding --model models/smollm2 --prompts examples/prompts.jsonl --split heldout --out out.jsonl
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from fastmtp import files
from fastmtp.chat import prompt_ids as chat_prompt_ids
from fastmtp.checkpoint import head_folder, read_head, weight_files
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.data.prompts import read_prompts
from fastmtp.fingerprint import fingerprint, machine
from fastmtp.head.modeling_mimo import MiMoConfig, MiMoForCausalLM, attention_of
from fastmtp.tau import position_rates
from fastmtp.vocab.draft_vocab import AUTO, DraftVocab, parse_maps, read
from fastmtp.vocab.token_map import load_token_map

ATTENTION = "fastmtp_decoding"  # transformers' name for the attention below


def attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_
) -> tuple[Tensor, None]:
    """transformers' attention interface: as its `sdpa`, without the copies of keys and values that it makes
    for a mask.

    query: [1, Hq, n, D]; key, value: [1, Hkv, T, D]; attention_mask: [n, T] bool, or None: causal. Returns
    [1, n, Hq, D].
    """
    causal = attention_mask is None and query.shape[2] > 1
    context = F.scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=causal, enable_gqa=True
    )
    return context.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


@dataclass
class Model:
    """A loaded model folder: the network, its tokenizer, and the ids that end an answer."""

    net: MiMoForCausalLM
    tokenizer: object
    eos_ids: set[int]


@dataclass
class Generation:
    """One answer. ids: output tokens, the end token included; histogram[j]: verify passes with j accepted
    drafts.
    """

    ids: list[int]
    verify_passes: int
    histogram: list[int]
    prefill_s: float
    decode_s: float


def load(folder: str | Path, dtype: str = "float32", device: str = "cpu") -> Model:
    """Load a MiMo-layout folder, head included. Raises InputError for a missing folder, head or device."""
    folder = files.existing(folder, "model folder")
    try:
        torch.empty(0, device=device)
    except (
        RuntimeError,
        AssertionError,
    ):  # a name that is none, a GPU that is not there, PyTorch's CPU build
        raise InputError(
            f"--device {device}: PyTorch cannot use it on this machine; give cpu, or cuda where there is a GPU"
        ) from None
    # the folder's type is qwen2, for engines; and our one line on an error is not to drown in the library's
    # report
    config = MiMoConfig.from_dict(
        {**files.read_json(folder / "config.json"), "model_type": MiMoConfig.model_type}
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    net, info = MiMoForCausalLM.from_pretrained(
        folder, config=config, dtype=getattr(torch, dtype), output_loading_info=True
    )
    if info["missing_keys"]:
        raise InputError(
            f"{folder}: {len(info['missing_keys'])} tensors are missing, such as {sorted(info['missing_keys'])[0]}; "
            "make the folder with fastmtp.prepare_model or fastmtp.export"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = net.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return Model(
        net.to(device).eval(), tokenizer, {e for e in [*ends, tokenizer.eos_token_id] if e is not None}
    )


class Drafter:
    """The head with its own key/value cache; slot = position, so a draft's keys are overwritten once it is
    decided.
    """

    def __init__(self, net: MiMoForCausalLM, capacity: int, token_map: Tensor | None):
        head = net.head
        shape = (1, net.config.num_key_value_heads, capacity, head.self_attn.head_dim)
        weight = net.lm_head.weight
        self.net, self.head = net, head
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.given: Tensor | None = None
        self.token_map, self.weight = None, weight
        self.use(token_map)

    def use(self, token_map: Tensor | None) -> None:
        """Draft from this map's ids [K] from now on; None: from all."""
        if token_map is not self.given:
            self.given = token_map
            self.token_map = token_map.to(self.weight.device)
            self.weight = self.net.lm_head.weight[self.token_map]

    def step(self, hidden: Tensor, tokens: Tensor, start: int) -> Tensor:
        """Run positions start..start+n-1 and keep their keys. hidden [1, n, H], tokens [1, n] -> last g [1,
        1, H].
        """
        n = tokens.shape[1]
        embeds = self.net.model.embed_tokens(tokens)
        if start == 0:
            embeds[:, 0] = 0  # as engines do: recursion.recurse
        positions = torch.arange(start, start + n, device=tokens.device)[None]
        fused = self.head.fuse(hidden, embeds)
        q, k, v = self.head.qkv(fused, *self.net.rope(positions))
        end = start + n
        self.keys[:, :, start:end], self.values[:, :, start:end] = k, v
        mask = None
        if n > 1:
            mask = torch.ones(n, end, dtype=torch.bool, device=tokens.device).tril(start)
        context = F.scaled_dot_product_attention(
            q, self.keys[:, :, :end], self.values[:, :, :end], attn_mask=mask, enable_gqa=True
        )
        return self.head.finish(fused[:, -1:], context[:, :, -1:])

    def logits(self, state: Tensor) -> Tensor:
        """g [1, 1, H] -> [V'], V' the token map's size or the vocabulary's."""
        return F.linear(state[0, -1], self.weight)

    def to_ids(self, row: Tensor) -> Tensor:
        """Rows of the draft's vocabulary -> token ids."""
        return row if self.token_map is None else self.token_map[row]


def accept_greedy(drafts: list[int], choices: list[int]) -> tuple[int, int]:
    """(accepted drafts, next token): the longest prefix of `drafts` that equals the backbone's argmaxes
    `choices`.
    """
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
        accepted += 1
    return accepted, choices[accepted]


def accept_sampled(drafts: list[int], q: Tensor, p: Tensor, generator: torch.Generator) -> tuple[int, int]:
    """(accepted drafts, next token) by speculative sampling (arXiv 2211.17192, algorithm 1).

    q: [K, V] draft distributions; p: [K+1, V] the backbone's; the kept tokens are distributed as p alone.
    """
    for i, token in enumerate(drafts):
        u = torch.rand((), generator=generator, device=generator.device).item()
        if u * q[i, token].item() >= p[i, token].item():
            residual = (p[i] - q[i]).clamp(min=0)
            if not residual.any():  # p and q equal but for rounding
                residual = p[i]
            return i, int(torch.multinomial(residual, 1, generator=generator))
    return len(drafts), int(torch.multinomial(p[len(drafts)], 1, generator=generator))


@torch.inference_mode()
def generate(
    model: Model,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    num_steps: int,
    temperature: float = 0.0,
    seed: int = 0,
    token_map: Tensor | DraftVocab | None = None,
    eos_ids: set[int] | None = None,
) -> Generation:
    """Decode one prompt with `num_steps` drafts a cycle; 0 is plain decoding, through the same code.

    Stops after a token of `eos_ids` (default: the model's) or at `max_new_tokens`. A DraftVocab as
    `token_map` chooses the map anew before each cycle.
    """
    net, device = model.net, model.net.lm_head.weight.device
    ends = model.eos_ids if eos_ids is None else eos_ids
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = list(prompt_ids)
    goal = len(tokens) + max_new_tokens
    cache = DynamicCache(config=net.config)
    follower = token_map.follow(prompt_ids) if isinstance(token_map, DraftVocab) else None
    drafter = Drafter(net, goal + num_steps + 1, None if follower else token_map) if num_steps else None
    histogram = [0] * (num_steps + 1)

    def forward(ids: list[int], start: int, keep: int) -> tuple[Tensor, Tensor]:
        """Backbone over `ids` at positions start...: states [1, n, H], logits [keep, V] of the last rows."""
        n = len(ids)
        mask = (
            torch.ones(n, start + n, dtype=torch.bool, device=device).tril(start) if start and n > 1 else None
        )
        with attention_of(net.config, ATTENTION):
            states = net.model(
                input_ids=torch.tensor([ids], device=device),
                attention_mask={"full_attention": mask},
                position_ids=torch.arange(start, start + n, device=device)[None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return states, net.lm_head(states[0, -keep:])

    def distribution(logits: Tensor) -> Tensor:
        return (logits.float() / temperature).softmax(-1)

    def draft(state: Tensor, position: int) -> tuple[list[int], Tensor | None]:
        """K tokens from g at `position`; with a temperature also their distributions [K, V]."""
        if follower:
            drafter.use(token_map.maps[follower.look(tokens[len(prompt_ids) :])])
        picked: list[Tensor] = []
        dists = []
        for step in range(num_steps):
            if step:
                state = drafter.step(state, picked[-1].view(1, 1), position + step)
            logits = drafter.logits(state)
            if temperature:
                small = distribution(logits)
                row = torch.multinomial(small, 1, generator=generator)[0]
                full = (
                    small
                    if drafter.token_map is None
                    else small.new_zeros(net.vocab_size).scatter_(0, drafter.token_map, small)
                )
                dists.append(full)
            else:
                row = logits.argmax()
            picked.append(drafter.to_ids(row))
        return torch.stack(picked).tolist(), torch.stack(dists) if temperature else None

    started = time.perf_counter()
    states, logits = forward(tokens, 0, 1)
    if temperature:
        first = int(torch.multinomial(distribution(logits[0]), 1, generator=generator))
    else:
        first = int(logits[0].argmax())
    tokens.append(first)
    state = drafter.step(states, torch.tensor([tokens[1:]], device=device), 0) if drafter else None
    prefilled = time.perf_counter()
    passes = 0
    while tokens[-1] not in ends and len(tokens) < goal:
        last = len(tokens) - 1  # position of the newest token, which the backbone has not read yet
        drafts, q = draft(state, last - 1) if drafter else ([], None)
        states, logits = forward([tokens[-1], *drafts], last, len(drafts) + 1)
        if temperature:
            accepted, extra = accept_sampled(drafts, q, distribution(logits), generator)
        else:
            accepted, extra = accept_greedy(drafts, logits.argmax(-1).tolist())
        if accepted < len(drafts):  # newer transformers count what to remove; older ones empty the cache at 0
            cache.crop(accepted - len(drafts))
        new = [*drafts[:accepted], extra]
        stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        kept = new[: min(stop, goal - len(tokens))]
        passes += 1
        histogram[min(accepted, len(kept))] += 1
        tokens += kept
        if drafter and len(kept) == len(new):
            state = drafter.step(
                states[:, : accepted + 1], torch.tensor([tokens[-len(new) :]], device=device), last
            )
    return Generation(
        tokens[len(prompt_ids) :], passes, histogram, prefilled - started, time.perf_counter() - prefilled
    )


def summarise(rows: list[dict]) -> dict:
    """Pooled figures over result rows (see `compare`): tau, rates, seconds, speed-up and identity."""
    histogram = [sum(column) for column in zip(*(row["histogram"] for row in rows), strict=True)]
    tokens, passes = sum(len(row["output_ids"]) for row in rows), sum(row["verify_passes"] for row in rows)
    plain_s, draft_s = sum(row["plain_s"] for row in rows), sum(row["draft_s"] for row in rows)
    return {
        "questions": len(rows),
        "output_tokens": tokens,
        "accept_length": tokens / passes if passes else 1.0,
        "position_rates": position_rates(histogram),
        "histogram": histogram,
        "plain_s": plain_s,
        "draft_s": draft_s,
        "speedup": plain_s / draft_s,
        "identical": sum(row["identical"] for row in rows),
    }


def compare(
    model: Model,
    prompts: list[dict],
    max_new_tokens: int,
    num_steps: int,
    token_map: Tensor | DraftVocab | None,
    out: Path,
    found: dict,
) -> list[dict]:
    """Decode every prompt greedily, plain and with drafts (order alternating); one row a prompt, resumable."""
    with files.growing(out, found) as (done, write):
        todo = [p for p in prompts if p["id"] not in done]
        if todo:  # the first pass through a network is slow, and belongs to nobody
            ids = chat_prompt_ids(model.tokenizer, todo[0]["messages"])
            generate(model, ids, 8, num_steps, token_map=token_map)
            generate(model, ids, 8, 0)
        for turn, prompt in enumerate(tqdm(todo, desc="decode plain and with drafts", unit="prompt")):
            ids = chat_prompt_ids(model.tokenizer, prompt["messages"])
            answers = {}
            for steps in (0, num_steps) if turn % 2 else (num_steps, 0):
                answers[steps] = generate(model, ids, max_new_tokens, steps, token_map=token_map)
            plain, drafted = answers[0], answers[num_steps]
            write(
                {
                    "id": prompt["id"],
                    "source": prompt.get("source", ""),
                    "lang": prompt.get("lang", ""),
                    "prompt_ids": ids,
                    "output_ids": drafted.ids,
                    "text": model.tokenizer.decode(drafted.ids, skip_special_tokens=True),
                    "identical": plain.ids == drafted.ids,
                    "plain_ids": plain.ids,
                    "verify_passes": drafted.verify_passes,
                    "histogram": drafted.histogram,
                    "plain_s": plain.decode_s,
                    "draft_s": drafted.decode_s,
                }
            )
    return [row for _, row in files.read_jsonl(out)]


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.decoding",
        "Decode prompts greedily, plain and with the head's drafts; print accept length, speed-up and identity.",
        "python -m fastmtp.decoding --model models/smollm2 --prompts examples/prompts.jsonl --split heldout \\\n"
        "    --num-steps 3 --token-map vocab/smollm2/en_8k.pt --dtype bfloat16 --out results/decoding.jsonl",
    )
    p.add_argument("--model", required=True, help="model folder in MiMo layout")
    p.add_argument("--head", help="a checkpoint or shipped head instead of the model's own")
    p.add_argument("--prompts", required=True, help="jsonl with `messages` or `prompt`")
    p.add_argument("--split", help="use only rows whose `split` is this")
    p.add_argument("--limit", type=int, help="use only the first N prompts")
    p.add_argument("--num-steps", type=int, default=3, help="drafts a cycle, K (default 3)")
    p.add_argument("--token-map", help="draft only tokens of this map (.pt)")
    p.add_argument(
        "--token-maps",
        metavar="EN=PATH,ZH=PATH",
        help="a map for each language; the draft follows the text's",
    )
    p.add_argument(
        "--vocab-policy", default=AUTO, metavar="auto|fixed:NAME|union", help="of --token-maps (default auto)"
    )
    p.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default 128)")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="identity needs float32"
    )
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", required=True, help="result rows, jsonl; an interrupted run continues")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "num_steps", "max_new_tokens")
    prompts = read_prompts(args.prompts, args.split, args.limit)
    head = read_head(args.head) if args.head else None
    model = load(args.model, args.dtype, args.device)
    if head:
        model.net.load_head(head)
    token_map = load_token_map(args.token_map, model.net.vocab_size) if args.token_map else None
    maps = [args.token_map] if args.token_map else []
    if args.token_maps:
        if maps:
            raise InputError("--token-map and --token-maps: give one of them")
        token_map = read(args.token_maps, args.vocab_policy, model.tokenizer, model.net.vocab_size)
        maps = list(parse_maps(args.token_maps).values())
    out = Path(args.out)
    depends = {"model": args.model, "prompts": args.prompts, "token maps": maps}
    depends["head"] = weight_files(head_folder(args.head)) if args.head else None
    asked = (
        "split",
        "limit",
        "num_steps",
        "vocab_policy",
        "max_new_tokens",
        "dtype",
        "device",
    )
    found = fingerprint(depends, {name: getattr(args, name) for name in asked} | machine())
    rows = compare(model, prompts, args.max_new_tokens, args.num_steps, token_map, out, found)
    files.write_provenance(out, vars(args), [args.prompts, *maps], found)
    figures = summarise(rows)
    rates = " ".join(f"{rate:.3f}" for rate in figures["position_rates"])
    print(
        f"tau={figures['accept_length']:.3f} speedup={figures['speedup']:.2f} "
        f"identical={figures['identical']}/{figures['questions']} rates={rates}"
    )


if __name__ == "__main__":
    run(main)
