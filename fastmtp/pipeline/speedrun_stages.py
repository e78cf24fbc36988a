"""The stages of `fastmtp speedrun`, each made when its turn comes: only a prepared model shows what it is.

Everything lies in one folder: `base` (the model as prepared), `distilled.jsonl`, `data` (curated), `fit` and
`start` (a fresh head's start, if the model came without a head), `maps`, `train`, `model` (the result),
`acceptance.json`, `evaluation`, `lossless` and `report`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastmtp.engines.sglang_flags import FLOAT32, values, without
from fastmtp.fingerprint import machine
from fastmtp.inputs import read_json, resource
from fastmtp.pipeline.stages import Stage
from fastmtp.vocab.token_map import map_name

NAMES = ("prepare", "distil", "curate", "fit", "start", "maps", "train", "export")
NAMES += ("acceptance", "evaluate", "report", "lossless")
MAP_SIZES = (32768, 16384)
DRAFT_STEPS = 5  # arms fastmtp:1 to fastmtp:5, or to the recipe's K
IN_FLIGHT = 2048  # chats per GPU that distilling keeps under way
FIT_SAMPLES = 600
OF_OTHER_ARMS = "all of another command"


@dataclass(frozen=True)
class Plan:
    """What a run is asked for. `gpus` 0: everything on the CPU, with our own decoder in the engines' place.

    data: a data set list, or files of prompts. steps: the recipe's K. processes: that train, over all nodes.
    languages: of the maps. recipe_flags: overrides of the recipe. train_flags: of the training command.
    flags: of the engine, for every server.
    """

    model: str
    data: list[str]
    questions: str
    out: Path
    gpus: int
    recipe: str
    recipe_flags: list[str]
    steps: int
    accumulation: int
    processes: int
    languages: list[str]
    prompts: int | None = None
    max_new_tokens: int | None = None
    num_questions: int = 40
    tasks: str = "all"
    arms: str | None = None
    flags: list[str] = field(default_factory=list)
    smoke: bool = False
    train_flags: list[str] = field(default_factory=list)

    def path(self, name: str) -> str:
        return str(self.out / name)

    @property
    def listed(self) -> bool:
        """Whether `data` is a data set list, not files of prompts."""
        return self.data[0].endswith((".yaml", ".yml"))

    def question_files(self) -> list[str]:
        """No prompt that holds one of their questions is trained on."""
        files = sorted(Path(self.questions).iterdir())
        return [str(path) for path in files if path.name.endswith((".jsonl", ".jsonl.gz"))]


def words(*parts: object, **named: object) -> str:
    """A command's arguments as a shell writes them: `words("a", max_len=3)` is "a --max-len 3".

    None and [] leave a name out; a list gives it several values.
    """
    out = [str(part) for part in parts]
    for name, value in named.items():
        values = value if isinstance(value, list) else [value]
        if values and values != [None]:
            out += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(out)


def after_dashes(flags: list[str]) -> str:
    return shlex.join(["--", *flags]) if flags else ""


def stages(plan: Plan) -> Iterator[Stage]:
    """Every stage in order. One that depends on what an earlier stage made is right only after that stage."""
    yield prepare(plan)
    yield distil(plan)
    yield curate(plan)
    start = plan.path("base")
    if is_fresh(plan):
        yield from first_head(plan)
        start = plan.path("start")
    yield maps(plan)
    yield train(plan, start)
    yield export(plan)
    yield acceptance(plan, start)
    yield evaluate(plan, start)
    yield report(plan)
    yield lossless(plan)


def stages_until(plan: Plan, last: str | None) -> Iterator[Stage]:
    """The stages up to the one named `last`, which a model with a head of its own may not have; None: all."""
    for stage in stages(plan):
        if last and NAMES.index(stage.name) > NAMES.index(last):
            return
        yield stage


def prepare(plan: Plan) -> Stage:
    # A GGUF file would become float32, which no GPU run needs.
    dtype = "bfloat16" if plan.model.endswith(".gguf") and plan.gpus else None
    base, model = plan.path("base"), Path(plan.model)
    text = words(model=plan.model, out=base, dtype=dtype)
    return Stage("prepare", "fastmtp.prepare_model", text, base, (plan.model,) if model.exists() else ())


def distil(plan: Plan) -> Stage:
    base, out = plan.path("base"), plan.path("distilled.jsonl")
    asked = {"data": plan.data[0]} if plan.listed else {"prompts": plan.data}
    text = words(model=base, **asked, limit=plan.prompts, max_new_tokens=plan.max_new_tokens, out=out)
    how = words(engines=plan.gpus, in_flight=IN_FLIGHT * plan.gpus) if plan.gpus else words(batch_size=16)
    plain = without(plan.flags, [name for name in values(plan.flags) if name.startswith("--speculative-")])
    how += f" {after_dashes(plain)}" if plan.gpus else ""
    # Answers are kept by what was asked: another number of prompts asks only those that are new.
    return Stage("distil", "fastmtp.distill", text, out, (base, *plan.data), how, keeps="all")


def curate(plan: Plan) -> Stage:
    distilled, out = plan.path("distilled.jsonl"), plan.path("data")
    recipe = "configs/quickstart_curate.yaml" if plan.smoke else "configs/curate.yaml"
    questions = plan.question_files()
    listed = plan.data[0] if plan.listed else None
    share = 0.25 if plan.smoke else None
    text = words(input=distilled, recipe=recipe, data=listed, exclude=questions, eval_share=share, out=out)
    reads = (distilled, recipe, *([listed] if listed else []), *questions)
    return Stage("curate", "fastmtp.curate", text, out, reads)


def is_fresh(plan: Plan) -> bool:
    """Whether the prepared model's head is a fresh one, which needs a start; True before it is prepared."""
    record = plan.out / "base" / "run.json"
    config = read_json(record).get("config", {}) if record.exists() else {"head": None}
    return "head" in config and config["head"] is None  # a released MiMo's record names no head


def first_head(plan: Plan) -> Iterator[Stage]:
    """A start for a fresh head from the model's own answers, solved and not trained."""
    base, data = plan.path("base"), plan.path("data/train.jsonl")
    fit, start = plan.path("fit"), plan.path("start")
    text = words(model=base, data=data, limit=FIT_SAMPLES, out=fit)
    yield Stage("fit", "fastmtp.fit_head", text, fit, (base, data))
    yield Stage("start", "fastmtp.export", words(base=base, head=fit, out=start), start, (base, fit))


def map_sizes(plan: Plan) -> list[int]:
    """Sizes that are at most half of the vocabulary, largest first; one of nine tenths for a tiny one."""
    config = plan.out / "base" / "config.json"
    if not config.exists():
        return list(MAP_SIZES)
    rows = read_json(config)["vocab_size"]
    return [size for size in MAP_SIZES if 2 * size <= rows] or [rows * 9 // 10]


def maps(plan: Plan) -> Stage:
    base, data, out = plan.path("base"), plan.path("distilled.jsonl"), plan.path("maps")
    sizes = ",".join(map(str, map_sizes(plan)))
    text = words(tokenizer=base, input=data, lang=",".join(plan.languages), sizes=sizes, out=out)
    return Stage("maps", "fastmtp.build_vocab", text, out, (base, data))


def own_map(plan: Plan) -> str:
    """The largest map of the model's own answers, of all languages together."""
    lang = "union" if len(plan.languages) > 1 else plan.languages[0]
    return plan.path(f"maps/{map_name(lang, map_sizes(plan)[0])}.pt")


def all_maps(plan: Plan) -> dict[str, str]:
    """{name in an arm: path}: `own`, and u32k and u16k, those that come with the project for the tokenizer.

    Tokenizers are compared as the maps' descriptions give them; the model's own map has one, too.
    """
    result, own = {"own": own_map(plan)}, Path(own_map(plan)).with_suffix(".json")
    if not own.exists():
        return result
    key = read_json(own)["tokenizer"]["sha256_of_vocabulary"]
    for path in sorted(resource("vocab").glob("*/union_*.json")):
        about = read_json(path)
        if about["tokenizer"]["sha256_of_vocabulary"] == key and about["size"] in map_sizes(plan):
            result[f"u{about['size'] // 1024}k"] = str(path.with_suffix(".pt"))
    return result


def train(plan: Plan, start: str) -> Stage:
    data, held_out, out = plan.path("data/train.jsonl"), plan.path("data/eval.jsonl"), plan.path("train")
    flags = ["--model", start, "--dataset", data, "--output_dir", out, "--mtp_eval_data", held_out]
    accumulation = max(1, plan.accumulation // plan.processes)  # the same step on any number of GPUs
    if accumulation != plan.accumulation:
        flags += ["--gradient_accumulation_steps", str(accumulation)]
    text = words(plan.recipe, *flags, *plan.recipe_flags)
    environment = {"NPROC_PER_NODE": str(plan.gpus)} if plan.gpus > 1 else {}
    reads = (plan.recipe, start, data, held_out)
    # The command refuses to go on with other data or another recipe, and says how to start over.
    how = shlex.join(plan.train_flags)
    return Stage("train", "fastmtp.train", text, out, reads, how, environment, keeps="all")


def export(plan: Plan) -> Stage:
    base, head, out = plan.path("base"), plan.path("train/best-checkpoint"), plan.path("model")
    return Stage("export", "fastmtp.export", words(base=base, head=head, out=out), out, (base, head))


def acceptance(plan: Plan, start: str) -> Stage:
    model, data, out = plan.path("model"), plan.path("data/eval.jsonl"), plan.path("acceptance.json")
    token_maps = list(all_maps(plan).values())
    steps = max(plan.steps, DRAFT_STEPS)
    at = ",".join(map(str, range(1, steps)))
    text = words(model=model, data=data, num_steps=steps, at=at, out=out)
    text += "".join(f" {words(head=head)}" for head in (start, model))
    text += "".join(f" {words(token_map=path)}" for path in token_maps)
    return Stage("acceptance", "fastmtp.acceptance", text, out, (model, start, data, *token_maps))


def evaluate(plan: Plan, start: str) -> Stage:
    model, out, maps = plan.path("model"), plan.path("evaluation"), all_maps(plan)
    arms = plan.arms or ",".join(default_arms(plan, list(maps)))
    named = [name for name in maps if any(arm.endswith(f"+{name}") for arm in arms.split(","))]
    text = words(model=model, vanilla_model=start, arms=arms) + asking(plan, plan.num_questions, 512)
    text += "".join(f" {words(token_map=f'{name}={maps[name]}')}" for name in named)
    text += f" {words(repeat_questions=0)}" * plan.smoke + f" {words(out=out)}"
    how = on_engines(plan, plan.flags)
    reads = (model, start, *plan.question_files(), *(maps[name] for name in named))
    return Stage("evaluate", "evaluation.run", text, out, reads, how, keeps=OF_OTHER_ARMS)


def default_arms(plan: Plan, maps: list[str]) -> list[str]:
    """The paper's arms: plain decoding, the head before training, K=1 to 5, and K with every map."""
    vanilla = [f"vanilla:{plan.steps}"]
    drafted = [f"fastmtp:{k}" for k in range(1, max(plan.steps, DRAFT_STEPS) + 1)]
    if plan.smoke:
        vanilla, drafted = [], [f"fastmtp:{plan.steps}"]
    return ["baseline", *vanilla, *drafted, *(f"fastmtp:{plan.steps}+{name}" for name in maps)]


def lossless(plan: Plan) -> Stage:
    """In float32 every answer with drafts must be the plain one; a few questions of each task show it."""
    model, out = plan.path("model"), plan.path("lossless")
    count = min(plan.num_questions, 4)
    text = words(model=model, arms=f"baseline,fastmtp:{plan.steps}", dtype="float32")
    text += asking(plan, count, 256) + f" {words(out=out)}"
    how = on_engines(plan, without(plan.flags, FLOAT32))  # float32 has its own kernels
    reads = (model, *plan.question_files())
    return Stage("lossless", "evaluation.lossless", text, out, reads, how, keeps=OF_OTHER_ARMS)


def asking(plan: Plan, questions: int, tokens: int) -> str:
    """What the two commands of `evaluation` share, a space before it. tokens: the longest answer."""
    text = words(
        tasks=plan.tasks,
        question_folder=plan.questions,
        num_questions=questions,
        max_gen_length=min(plan.max_new_tokens or tokens, tokens),
        backend=None if plan.gpus else "reference",
    )
    return f" {text}"


def on_engines(plan: Plan, flags: list[str]) -> str:
    """The arms spread over the GPUs, one server on each, and the servers' flags; nothing on the CPU."""
    spread = words(gpus=plan.gpus if plan.gpus > 1 else None)
    return f"{spread} {after_dashes(flags)}".strip() if plan.gpus else ""


def report(plan: Plan) -> Stage:
    run, figures, evaluation = plan.path("train"), plan.path("acceptance.json"), plan.path("evaluation")
    out = plan.path("report")
    text = words(train=run, acceptance=figures, evaluation=evaluation, out=out)
    return Stage("report", "fastmtp.report", text, out, (run, figures, evaluation))


def settings_of(plan: Plan, stage: Stage) -> dict[str, object]:
    """What a stage's result depends on beside its command and its inputs: a speed, on machine and engine.

    Answers and heads stay what they are with a newer version; remove an output to have it made again.
    """
    return machine() | {"flags": plan.flags} if stage.module.startswith("evaluation.") else {}
