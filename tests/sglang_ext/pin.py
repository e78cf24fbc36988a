"""What our model package and our command lines rely on in SGLang, read from its sources without running them.

    pip download sglang==0.5.23 --no-deps; unzip sglang-*.whl 'sglang/srt/*' -d sources
    python tests/sglang_ext/pin.py sources/sglang > tests/sglang_ext/sglang_0.5.23.json

Signatures of what is overridden or wrapped, texts that must occur in a class or file, digests of functions
that are replaced, and all flags.
"""

import ast
import json
import sys
from pathlib import Path

from fastmtp.sglang_ext import fast_tree

SIGNATURES = {
    "layers/logits_processor.py": ["LogitsProcessor.__init__", "LogitsProcessor._compute_lm_head"],
    "models/mimo_mtp.py": ["MiMoMTP.__init__", "MiMoMTP.set_embed_and_head", "MiMoMTP.load_weights"],
    "runtime_context.py": ["get_parallel"],
    "speculative/eagle_worker_v2.py": [
        "EagleDraftWorker.draft",
        "EagleDraftWorker._draft_extend_for_prefill",
        "EagleDraftWorker._draft_extend_for_decode",
    ],
}
MENTIONS = {
    "models/mimo_mtp.py MiMoMTP": ["self.logits_processor(", "self.lm_head"],
    "models/registry.py": ["SGLANG_EXTERNAL_MODEL_PACKAGE"],
    "speculative/eagle_worker_v2.py EagleDraftWorker": [
        "set_embed_and_head(embed, head)",
        "self.draft_runner",
        "self.speculative_num_draft_tokens",
        "self.topk",
    ],
    "managers/schedule_batch.py Req": ["self.origin_input_ids", "self.output_ids", "self.sampling_params"],
    "sampling/sampling_params.py SamplingParams": ["custom_params"],
    "layers/vocab_parallel_embedding.py VocabParallelEmbedding": ["shard_indices", "org_vocab_start_index"],
    "runtime_context.py": ["tp_rank", "attn_dp_size"],
}


def definition(tree: ast.AST, path: str) -> ast.AST | None:
    """A class or function by its dotted path in a module; None if it is gone."""
    for name in path.split("."):
        kinds = ast.ClassDef | ast.FunctionDef
        tree = next((n for n in ast.walk(tree) if isinstance(n, kinds) and n.name == name), None)
        if tree is None:
            return None
    return tree


def signature(function: ast.FunctionDef) -> dict:
    """Names of the arguments, without types; how many at the end have a default."""
    a = function.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    return {"names": names, "defaults": len(a.defaults), "keywords": [arg.arg for arg in a.kwonlyargs]}


def flags(srt: Path) -> dict[str, list[str]]:
    """Every flag with its aliases: annotated fields of ServerArgs, and what is added to a parser by hand."""
    result: dict[str, list[str]] = {}
    for path in [srt / "server_args.py", *sorted((srt / "arg_groups").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("A["):
                keywords = {k.arg: k.value for k in ast.walk(node.annotation) if isinstance(k, ast.keyword)}
                name = "--" + node.target.id.replace("_", "-")
                name = ast.literal_eval(keywords["cli_name"]) if "cli_name" in keywords else name
                result[name] = ast.literal_eval(keywords.get("aliases", ast.List([])))
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                names = [a.value for a in node.args if isinstance(a, ast.Constant)]
                if names and names[0].startswith("--"):
                    result.setdefault(names[0], names[1:])
    return dict(sorted(result.items()))


def facts(root: Path) -> dict:
    """Of the folder that holds `srt/`."""
    srt = root / "srt"

    def tree(path: str) -> ast.AST:
        return ast.parse((srt / path).read_text(encoding="utf-8"))

    signatures = {}
    for path, names in SIGNATURES.items():
        for name in names:
            function = definition(tree(path), name)
            signatures[f"{path} {name}"] = function and signature(function)
    mentions = {}
    for place, texts in MENTIONS.items():
        path, _, name = place.partition(" ")
        part = definition(tree(path), name) if name else tree(path)
        source = ast.unparse(part) if part else ""
        mentions[place] = [text for text in texts if text in source]
    digests = {}
    for place, functions in fast_tree.KNOWN.values():
        path, _, owner = place.partition(" ")
        source = (srt / path).read_text(encoding="utf-8")
        for name in functions:
            function = definition(tree(path), f"{owner}.{name}")
            digests[name] = function and fast_tree.digest(ast.get_source_segment(source, function))
    return {"signatures": signatures, "mentions": mentions, "digests": digests, "flags": flags(srt)}


if __name__ == "__main__":
    print(json.dumps(facts(Path(sys.argv[1])), indent=1))
