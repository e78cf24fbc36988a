"""A start for a fresh head that is solved, not trained: the backbone's last layer, fed with a least-squares
guess of its input.

At position p the head has the backbone's state h_p and the embedding of token p+1. What enters the backbone's
last decoder layer at p+1 makes, through that layer and the final norm, the backbone's own choice of token
p+2. So the head takes over the layer and the norm, and its input matrix W is the linear map whose guess of
that input is best:

    minimise over W   sum over p of  |W [norm(h_p); norm(Emb(x_{p+1}))] - y_{p+1}|^2 / mean(y_{p+1}^2)

y: what enters the last layer. One pass over the model's own answers and one linear system; no step is taken.
Training continues from there (export it into the base, give that folder as the recipe's `model`), at a low
rate: in our one run 5e-4 undid it, 1.5e-4 did not.

    python -m fastmtp.fit_head --model models/qwen --data distilled.jsonl --out runs/qwen_start
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmtp import files, hub
from fastmtp.checkpoint import PREFIX, save_head
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.data.samples import read_samples
from fastmtp.formats.weights import check_finite
from fastmtp.head.modeling_mimo import MiMoForCausalLM
from fastmtp.reference.model import check, load, take_over
from fastmtp.show.progress import Bar
from fastmtp.tokenizer import load_tokenizer

SINKS = 4  # the first positions' states are huge (attention sinks, arXiv 2309.17453) and like no others
RIDGE = 1e-4  # of the mean square of a feature: directions that the text hardly shows stay small


@torch.inference_mode()
def equations(net: MiMoForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Features [T-5, 2H] and targets [T-5, H] of one text, float64, both over the target's root mean square.
    ids: [T].
    """
    result = net.model(input_ids=ids[None], output_hidden_states=True)
    states, entering = result.last_hidden_state[0], result.hidden_states[-2][0]
    embeds = net.model.embed_tokens(ids)
    head = net.head
    features = torch.cat([head.hidden_layernorm(states[:-1]), head.token_layernorm(embeds[1:])], dim=-1)
    features = features[SINKS:]
    targets = entering[1 + SINKS :].double()
    scale = targets.pow(2).mean(-1, keepdim=True).sqrt()
    return features.double() / scale, targets / scale


def fit(net: MiMoForCausalLM, texts: Sequence[list[int]]) -> tuple[dict[str, Tensor], float, int]:
    """Head tensors by full name, the share of the targets' square that W explains, and the number of
    positions.

    The head of `net` becomes the solved one. InputError for fewer positions than W has columns.
    """
    weight, width = net.lm_head.weight, net.config.hidden_size

    # One pass over the texts: the normal equations, with norms that only normalise.
    for norm in (net.head.hidden_layernorm, net.head.token_layernorm):
        norm.weight.data.fill_(1)
    square = torch.zeros(2 * width, 2 * width, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(2 * width, width, dtype=torch.float64, device=weight.device)
    total, positions = 0.0, 0
    for text in Bar(texts, desc="fit", unit="text"):
        if len(text) > SINKS + 1:
            x, y = equations(net, torch.tensor(text, device=weight.device))
            square += x.T @ x
            cross += x.T @ y
            total, positions = total + y.pow(2).sum().item(), positions + len(x)
    if positions < 2 * width:
        raise InputError(
            f"--data: {positions} positions for {2 * width} columns; give more samples, "
            "best 50 times as many positions"
        )

    # Solve them, and say how much of the target's square is explained.
    ridge = RIDGE * square.diagonal().mean() * torch.eye(2 * width, dtype=torch.float64, device=weight.device)
    solved = torch.linalg.solve(square + ridge, cross)
    left = total - 2 * (solved * cross).sum().item() + (solved * (square @ solved)).sum().item()

    # The head takes over the last layer and the final norm as they are.
    take_over(net.head, net.model.layers[-1].state_dict(), solved.T, net.model.norm.weight)
    head = {name: tensor.detach() for name, tensor in net.state_dict().items() if name.startswith(PREFIX)}
    return head, 1 - left / total, positions


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.fit_head",
        "Solve a start for a fresh head by least squares, from the model's own answers, for training.",
        "python -m fastmtp.fit_head --model models/qwen --data distilled.jsonl --out runs/qwen_start\n"
        "python -m fastmtp.export --base models/qwen --head runs/qwen_start --out models/qwen-start",
    )
    p.add_argument("--model", required=True, help="model folder, from fastmtp.prepare_model")
    p.add_argument(
        "--data", required=True, help="distilled or curated samples; about 500 of the model's own answers"
    )
    p.add_argument("--limit", type=int, help="use only the first N samples")
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="of the model (default %(default)s)",
    )
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", required=True, metavar="FOLDER", help="the head, as training would leave it")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "limit")

    # Everything that can be wrong is read before the weights are.
    files.check_output(args.out)
    args.model = str(hub.model(args.model))
    config, tokenizer = check(args.model, args.device), load_tokenizer(args.model)
    samples = read_samples(args.data, config.vocab_size, args.limit, tokenizer)
    texts = [sample["prompt_ids"] + sample["output_ids"] for sample in samples]

    model = load(args.model, args.dtype, args.device)
    head, explained, positions = fit(model.net, texts)
    check_finite(head.items(), args.out)
    with files.atomic(Path(args.out)) as folder:
        folder.mkdir()
        save_head(folder, head)
        facts = {"positions": positions, "explained": explained}
        files.write_provenance(folder, vars(args) | facts, [args.data])
    print(
        f"fitted {args.out}: {positions} positions, "
        f"{100 * explained:.1f} % of the last layer's input explained"
    )


if __name__ == "__main__":
    run(main)
