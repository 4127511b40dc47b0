"""A model's tokenizer as JSON on stdout, by a process of its own that is run by path: before it opens one, transformers
imports torch and all that generates text, 350 MB and some seconds. Imports nothing of batchq."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from typing import Any


def opened(path: str, trusted: bool = False) -> Any:
    """The tokenizer in that folder, as transformers has it; its own code runs only if it is `trusted`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trusted)


def exported(path: str) -> dict[str, Any]:
    """What batchq needs of it, or {"error": why}, or {"slow": its class} where it isn't of the tokenizers library."""
    try:
        tokenizer = opened(path)
    except Exception as error:  # tokenizers raises a bare one for a tokenizer.json that is newer than it is
        return {"error": str(error).strip() or type(error).__name__}
    if not hasattr(tokenizer, "backend_tokenizer"):
        return {"slow": type(tokenizer).__name__}
    return {
        "backend": tokenizer.backend_tokenizer.to_str(),
        "chat_template": tokenizer.chat_template,
        "special_tokens": tokenizer.special_tokens_map,
        "unk_token_id": tokenizer.unk_token_id,
    }


def main() -> None:
    with redirect_stdout(sys.stderr):
        found = exported(sys.argv[1])
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # to take it all apart again would take as long as some imports


if __name__ == "__main__":
    main()
