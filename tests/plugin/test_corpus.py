from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs

from qwantize_vllm.plugin import corpus

TINY = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 1024},
    **{"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32},
}


class Letters:
    """A tokenizer: a token for each letter."""

    def encode(self, text, add_special_tokens):
        return [ord(letter) for letter in (f"^{text}$" if add_special_tokens else text)]

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr("vllm.tokenizers.get_tokenizer", lambda model: Letters())


def read(*paths, num_tokens=100, seq_len=4, first_token=0, each_line=False):
    windows = corpus.read_windows("model", paths, num_tokens, seq_len, first_token, each_line)
    return ["".join(map(chr, window)) for window in windows]


def test_windows_follow_each_other_and_stop_at_the_number_of_tokens(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("abcdefghij")
    two.write_text("klmno")
    assert read(one, two) == ["abcd", "efgh", "ij", "klmn", "o"]
    assert read(one, two, num_tokens=12) == ["abcd", "efgh", "ij", "kl"]
    assert read(one, two, num_tokens=6) == ["abcd", "ef"]
    assert read(one, two, num_tokens=7, first_token=6) == ["ghij", "klm"]
    assert read(one, two, num_tokens=3, first_token=11) == ["lmn"]
    with pytest.raises(ValueError, match=r"no token in .* from number 15 on"):
        read(one, two, first_token=15)


def test_chats_and_texts_of_jsonl(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n\n{"text": "bye"}\n')
    assert read(path, seq_len=100) == ["<user>hibye"]
    assert read(path, seq_len=8, each_line=True) == ["^<user>h", "i$", "^bye$"]
    assert read(path, seq_len=8, num_tokens=12, each_line=True) == ["^<user>h", "i$", "^b"]


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 1: not JSON"), ('{"a": 1}', 'needs the key "messages"'), ("[]", "line 1: needs")]
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_empty_texts_are_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("")
    with pytest.raises(ValueError, match="there is no token in"):
        read(path)


def test_lines_of_jsonl_end_where_json_says(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one\u2028two\u0085"}\n', "utf-8")
    assert read(path, seq_len=100) == ["one\u2028two\u0085"]


def test_windows_that_are_longer_than_a_model_takes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    model_config = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True).create_model_config()
    corpus.check_context(model_config, 1024)
    with pytest.raises(ValueError, match=r"windows of up to 1025 tokens, .*the 1024 of this model.*--window-tokens"):
        corpus.check_context(model_config, 1025)
