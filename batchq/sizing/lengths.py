"""Whether rows fit into the engine: tokens of prompts and answers beside engine.max_model_len."""

from __future__ import annotations

from batchq.config import Config
from batchq.model.folder import read_config, text_config
from batchq.plan.sample import Lengths
from batchq.task import answers


def answer_tokens(config: Config) -> int:
    """What an answer takes of engine.max_model_len."""
    return answers.of(config.task).max_output_tokens


def tokens_read(path: str) -> int | None:
    """The longest text that the model at `path` was made for, in tokens, if it says so."""
    longest = text_config(read_config(path)).get("max_position_embeddings")
    return int(longest) if longest else None


def too_long(config: Config, path: str, lengths: Lengths) -> str:
    """A warning where sampled rows don't fit into engine.max_model_len, and what would take them; empty otherwise."""
    limit, answer, most = config.engine.max_model_len, answer_tokens(config), tokens_read(path)
    over = lengths.above(limit - answer)
    if not over:
        return ""
    need = lengths.longest + answer
    enough = 1 << (need - 1).bit_length()
    if most and need > most:
        advice = f"the longest takes {need:,} tokens, and the model reads {most:,}: shorten it in task.prompt"
    else:
        advice = (
            f"the longest takes {need:,} tokens: engine.max_model_len={min(enough, most or enough)} would take them"
        )
    return (
        f"{over / len(lengths.tokens):.1%} of the sampled rows ({over:,} of {len(lengths.tokens):,}) are longer than "
        f"engine.max_model_len={limit} and would be failures (too_long); {advice}"
    )
