"""Asks a backend a task's questions: prompts through the model's chat template, finished answers kept."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from evaluation.answers import Answers
from evaluation.backends import BackendError, Rejected, Turn
from evaluation.questions import Task, question_keys
from fastmtp.chat import TemplateError, prompt_ids
from fastmtp.cli import InputError
from fastmtp.data.rendering import Refused, question_ids
from fastmtp.engines.client import together
from fastmtp.show.progress import Bar

WARM_UP_TOKENS = 32
NOTHING = contextlib.nullcontext()  # to hold


@dataclass(frozen=True)
class Settings:
    """How every question is asked. top_k 0 and top_p 1: from all tokens."""

    max_gen_length: int = 1024
    temperature: float = 0.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0

    def facts(self) -> dict[str, object]:
        """What answers depend on: of sampling only what is in use."""
        shared = {"max_gen_length": self.max_gen_length, "temperature": self.temperature, "seed": self.seed}
        if not self.temperature:
            return shared
        return shared | {"top_k": self.top_k, "top_p": self.top_p, "seeds": "one per question"}

    def sampling(self, key: str) -> dict[str, object]:
        """Of one question, as arguments of `ask`. Its seed is its own, and the same in all arms."""
        seed = (self.seed + int(key[:8], 16)) % 2**31
        return {"temperature": self.temperature, "seed": seed, "top_k": self.top_k, "top_p": self.top_p}


class Prompts:
    """Prompts of a task in a model's own chat format.

    A template without a system role gets the task's system text before the user's first turn. Raises
    InputError if there is no template or it refuses plain questions.
    """

    def __init__(self, tokenizer, task: Task):
        self.tokenizer, self.task, self.folded = tokenizer, task, False
        self.folded = bool(task.system) and not self._takes_system()
        try:
            question_ids(tokenizer, self.messages(["a question"]), 0, None)
        except Refused as refusal:
            raise InputError(
                f"{tokenizer.name_or_path}: a plain question of {task.name} {refusal}; give the model a"
                " chat_template.jinja that asks it"
            ) from None

    def _takes_system(self) -> bool:
        """Whether the template renders a system turn; some refuse it and some leave it out."""
        try:
            text = self.tokenizer.apply_chat_template(self.messages(["a question"]), tokenize=False)
        except Exception:
            return False
        return self.task.system in text

    def messages(self, user: list[str], answers: list[str] = ()) -> list[dict]:
        """The chat up to the last user turn."""
        system = self.task.system
        if self.folded:
            user = [f"{system}\n\n{user[0]}", *user[1:]]
        messages = [{"role": "system", "content": system}] if system and not self.folded else []
        for number, text in enumerate(user):
            messages.append({"role": "user", "content": text})
            messages += [{"role": "assistant", "content": a} for a in answers[number : number + 1]]
        return messages

    def check(self, questions: list[list[str]], context: int | None, source: object) -> None:
        """InputError for a question that cannot be asked whole, or fills the context (None: unknown) alone.

        source: the questions' file or data set. An answer that is longer than the rest of the context is the
        engine's affair: it cuts the answer or refuses the question.
        """
        for number, question in enumerate(questions, 1):
            try:
                turns = self.messages(question, ["an answer"] * (len(question) - 1))
                question_ids(self.tokenizer, turns, 1, context)
            except Refused as refusal:
                raise InputError(f"{source}: question {number} {refusal}; fix or remove it") from None

    def ids(self, user: list[str], answers: list[str] = ()) -> list[int]:
        """Token ids of the prompt for the last user turn, after the answers to the turns before it."""
        return prompt_ids(self.tokenizer, self.messages(user, answers))


async def collect(
    backend,
    prompts: Prompts,
    questions: list[list[str]],
    settings: Settings,
    answers: Answers,
    num_steps: int,
    parallel: int = 1,
    name: str = "",
    turn: contextlib.AbstractAsyncContextManager = NOTHING,
) -> list[dict]:
    """Answers of all questions in order; those that `answers` has are not asked again.

    Warm-up requests go first and are not kept; the prefix cache is emptied before the first question. `turn`,
    a lock that arms on one card share, is held for each question, or for all if requests overlap. Raises
    BackendError when the backend fails: what was finished is kept. If it refuses a question, the others are
    still asked.
    """
    keys = question_keys(prompts.task, questions)
    missing = {
        key: question for key, question in zip(keys, questions, strict=True) if key not in answers.rows
    }
    if not missing:
        return answers.to(keys)
    for_all, for_each = (turn, NOTHING) if parallel > 1 else (NOTHING, turn)
    free = asyncio.Semaphore(parallel)
    total = len(set(keys))
    rejected: list[tuple[str, Exception]] = []

    async def one(key: str, question: list[str]) -> None:
        async with free, for_each:
            try:
                answers.add(key, await _answer(backend, prompts, key, question, settings, num_steps))
            except (Rejected, TemplateError) as error:
                rejected.append((question[0], error))
            bar.update()

    async with for_all:
        async with for_each:
            await _warm_up(backend, prompts.ids(next(iter(missing.values()))[:1]))
        bar = Bar(total=total, initial=total - len(missing), desc=f"{name} {prompts.task.name}", unit="q")
        with contextlib.closing(bar):
            await together(one(key, question) for key, question in missing.items())
    if rejected:
        text, error = rejected[0]
        raise Rejected(
            f"{len(rejected)} of {total} questions of {prompts.task.name} were refused, the first "
            f"({' '.join(text.split())[:40]!r}): {error}; the others are answered"
        )
    return answers.to(keys)


async def _warm_up(backend, prompt: list[int]) -> None:
    for _ in range(2):
        with contextlib.suppress(Rejected):
            await backend.ask(prompt, WARM_UP_TOKENS)
    await backend.flush()


async def _answer(
    backend, prompts: Prompts, key: str, question, settings: Settings, num_steps: int
) -> list[Turn]:
    """All turns of one question; each turn's prompt holds the answers before it."""
    turns: list[Turn] = []
    for last in range(len(question)):
        ids = prompts.ids(question[: last + 1], [turn.text for turn in turns])
        turn = await backend.ask(ids, settings.max_gen_length, **settings.sampling(key))
        turns.append(checked(turn, num_steps))
    return turns


def checked(turn: Turn, num_steps: int) -> Turn:
    """A turn whose accounting fits the arm, and whose text the next turn's prompt can hold. An answer of one
    token comes from prefill alone: nothing was verified.
    """
    if turn.text is None:
        raise BackendError("the server gives no text; start it without --skip-tokenizer-init")
    if num_steps == 0:
        if turn.verify_passes:
            raise BackendError(
                "the server drafts although this arm is plain decoding; start it with --no-spec"
            )
        turn.verify_passes, turn.histogram = None, []
    if num_steps and not turn.verify_passes:
        if len(turn.output_ids) > 1:
            raise BackendError("the server reports no verify passes; it was started without speculation")
        turn.verify_passes = 0
    if num_steps and not 0 <= turn.verify_passes <= len(turn.output_ids) + 1:
        counts = f"{turn.verify_passes} verify passes for {len(turn.output_ids)} tokens"
        raise BackendError(f"the server reports {counts}; its accounting cannot be believed")
    if len(turn.histogram) > num_steps + 1:
        drafts = len(turn.histogram) - 1
        raise BackendError(
            f"a pass accepted {drafts} drafts in an arm of {num_steps} steps; the server's K is another"
        )
    return turn
