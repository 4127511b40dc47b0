"""What a person should know of a job before its rows are labelled: no error, but it may make every answer wrong."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from batchq.config import Config
from batchq.plan.sample import Look
from batchq.records import Plan
from batchq.task import answers
from batchq.task.prompt import placeholders

JINJA = re.compile(r"\{\{|\{%")


def of_job(config: Config, draft: Plan, looked: Look) -> list[str]:
    """One line each. No row's text is in them."""
    found = [*of_words(config, draft), unknown_gold(config, looked.golds), *_thoughts(config, looked), *_turns(looked)]
    return [warning for warning in found if warning]


def of_words(config: Config, draft: Plan) -> Iterator[str]:
    """What the configuration and the columns' names tell, without a look at a row."""
    task = config.task
    if plain := placeholders(task.prompt, draft.columns):
        yield f"task.prompt has {', '.join(plain[:3])} as plain text; a column is written {{{{ name }}}}"
    for field, text in {"task.system": task.system, "task.answer_prefix": task.answer_prefix}.items():
        if JINJA.search(text):
            yield f"{field} is plain text for all rows: the braces in it stay as they are"
    folded: dict[str, list[str]] = defaultdict(list)
    for column in draft.columns:
        folded[column.casefold()].append(column)
    if same := [names for names in folded.values() if len(names) > 1]:
        yield f"columns {', '.join(same[0])} differ in case alone; DuckDB renames one of them, and Spark opens neither"


def unknown_gold(config: Config, golds: Sequence[str | None]) -> str:
    """A warning where sampled gold values are none of the labels, which says how many and not what they are, or where
    there are none; else empty."""
    column, labels = config.task.gold, answers.of(config.task).labels
    given = [gold for gold in golds if gold is not None]
    if not column or not golds:
        return ""
    if not given:
        return f"task.gold={column} is empty in all of the {len(golds):,} sampled rows, so no accuracy can be told"
    others = sum(gold not in labels for gold in given) if labels else 0
    if not others:
        return ""
    return (
        f"{others:,} of {len(given):,} sampled gold values in task.gold={column} are none of task.labels, however they "
        "are written (case, spaces around, 1.0 for 1); gate and report pass them over"
    )


def _thoughts(config: Config, looked: Look) -> Iterator[str]:
    """A model that thinks aloud before it answers, and hasn't been told whether to."""
    template, told = str(looked.task.tokenizer.chat_template), config.model.chat_template
    begun = looked.task.framed("").rstrip().endswith("<think>")
    if begun or ("enable_thinking" in template and "enable_thinking" not in told):
        space = answers.of(config.task)
        what = f"task.max_tokens={space.max_output_tokens} has to hold thoughts and answer"
        if not space.decodes:
            what = "labels are looked for where its thoughts would begin"
        yield f"the model's chat template lets it think before it answers: {what}, " + (
            "and task.answer_prefix=</think> ends its thoughts"
            if begun
            else "and model.chat_template={enable_thinking: false} stops it"
        )


def _turns(looked: Look) -> Iterator[str]:
    """Rows that hold what the chat template ends a turn with, where that is plain text and no token of its own."""
    for marker in looked.task.markers:
        if count := sum(marker in message for message in looked.messages):
            yield (
                f"the model's chat template writes {marker} as plain text between turns, and {count:,} of the "
                f"{len(looked.messages):,} sampled rows have it too: what follows it there may be read as another turn"
            )
