"""Texts to calibrate on, as windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_windows(
    model: str, texts: Sequence[Path], num_tokens: int, seq_len: int, first_token: int = 0
) -> list[list[int]]:
    """Consecutive windows of seq_len tokens of every text, until num_tokens are reached; the last one may be shorter.

    first_token: where to begin, the texts taken one after the other.

    Raises:
        ValueError: a line of a .jsonl file is neither a chat nor a text; the texts end before first_token.
    """
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(model)
    windows: list[list[int]] = []
    skip, left = first_token, num_tokens
    for path in texts:
        read = _jsonl_tokens if path.suffix == ".jsonl" else _text_tokens
        everything = read(tokenizer, path)
        tokens = everything[skip : skip + left]
        skip, left = max(0, skip - len(everything)), left - len(tokens)
        windows += [tokens[i : i + seq_len] for i in range(0, len(tokens), seq_len)]
    if not windows:
        raise ValueError(f"there is no token in {', '.join(map(str, texts))} from number {first_token} on")
    return windows


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _text_tokens(tokenizer: Any, path: Path) -> list[int]:
    return _tokens(tokenizer, path.read_text("utf-8"))


def _jsonl_tokens(tokenizer: Any, path: Path) -> list[int]:
    """All lines, one after the other: {"messages": [...]} through the model's chat template, or {"text": "..."}."""
    tokens: list[int] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if isinstance(record, dict) and isinstance(record.get("messages"), list):
            text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        elif isinstance(record, dict) and isinstance(record.get("text"), str):
            text = record["text"]
        else:
            raise ValueError(f'{path}, line {number}: needs the key "messages" (a chat) or "text"')
        tokens += _tokens(tokenizer, text)
    return tokens
