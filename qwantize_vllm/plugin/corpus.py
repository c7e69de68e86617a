"""Texts to calibrate on, as windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def read_windows(
    model: str,
    texts: Sequence[Path],
    num_tokens: int,
    seq_len: int,
    first_token: int = 0,
    each_line: bool = False,
) -> list[list[int]]:
    """Consecutive windows of seq_len tokens of every text, until num_tokens are reached; the last one may be shorter.

    first_token: where to begin, the texts taken one after the other.
    each_line: every chat or text of a .jsonl file begins a window of its own, with the special tokens that the
        tokenizer gives to one, which is how an encoder reads sentences. Otherwise they follow each other without.

    Raises:
        ValueError: a line of a .jsonl file is neither a chat nor a text; the texts end before first_token.
    """
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(model)
    windows: list[list[int]] = []
    skip, left = first_token, num_tokens
    for everything in _pieces(tokenizer, texts, each_line):
        tokens = everything[skip : skip + left]
        skip, left = max(0, skip - len(everything)), left - len(tokens)
        windows += [tokens[i : i + seq_len] for i in range(0, len(tokens), seq_len)]
        if not left:
            break
    if not windows:
        raise ValueError(f"there is no token in {', '.join(map(str, texts))} from number {first_token} on")
    return windows


def check_context(model_config: Any, longest: int) -> None:
    """See that vLLM lets a model have windows of at most so many tokens, the generated one included. What it says
    itself does not name the options of these commands.

    model_config: vLLM's ModelConfig, made without max_model_len.

    Raises:
        ValueError: it does not.
    """
    try:
        model_config.get_and_verify_max_len(longest)
    except ValueError as error:
        raise ValueError(
            f"windows of up to {longest} tokens, the one behind them included, are more than the "
            f"{model_config.max_model_len} of this model: make them shorter (eval --window-tokens, calibrate --seq-len)"
        ) from error


def _pieces(tokenizer: Any, texts: Sequence[Path], each_line: bool) -> Iterator[list[int]]:
    """Token ids of what is cut into windows: a whole file, or with each_line a line of a .jsonl file."""
    for path in texts:
        if path.suffix != ".jsonl":
            yield _tokens(tokenizer, path.read_text("utf-8"))
        elif each_line:
            for text in _jsonl_texts(tokenizer, path):
                yield _tokens(tokenizer, text, special=True)
        else:
            yield [token for text in _jsonl_texts(tokenizer, path) for token in _tokens(tokenizer, text)]


def _tokens(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=special))


def _jsonl_texts(tokenizer: Any, path: Path) -> Iterator[str]:
    """Of every line: {"messages": [...]} through the model's chat template, or {"text": "..."}."""
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if isinstance(record, dict) and isinstance(record.get("messages"), list):
            yield tokenizer.apply_chat_template(record["messages"], tokenize=False)
        elif isinstance(record, dict) and isinstance(record.get("text"), str):
            yield record["text"]
        else:
            raise ValueError(f'{path}, line {number}: needs the key "messages" (a chat) or "text"')
