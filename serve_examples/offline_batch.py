#!/usr/bin/env python3
"""Answer a file of prompts without a server, and write the answers as JSON lines.

    python serve_examples/offline_batch.py [PROMPTS] [--model MODEL] [--out answers.jsonl]

PROMPTS holds one prompt a line; in a file named *.jsonl each line is an object with the key "prompt".
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SMALL_MODEL = HERE.parent / ".cache" / "smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="?", type=Path, default=HERE / "prompts.txt", help="default: prompts.txt here")
    parser.add_argument("--model", default=str(SMALL_MODEL), help="default: the one that make quickstart made")
    parser.add_argument("--out", type=Path, default=Path("answers.jsonl"), help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=128, help="of each answer; default: %(default)s")
    parser.add_argument("--max-model-len", type=int, default=2048, help="prompt and answer; default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: %(default)s")
    parser.add_argument("--raw", action="store_true", help="continue the prompts as text, without the chat template")
    parser.add_argument("--enforce-eager", action="store_true", help="no torch.compile and CUDA graphs: starts sooner")
    arguments = parser.parse_args()

    try:
        prompts = read_prompts(arguments.prompts)
        if not arguments.out.parent.is_dir():
            raise ValueError(f"{arguments.out.parent} is not a directory: make it, or give another --out")
        if arguments.model == str(SMALL_MODEL) and not SMALL_MODEL.exists():
            raise ValueError(f"there is no model in {SMALL_MODEL}: run make quickstart once, or give --model")
    except ValueError as error:
        sys.exit(f"error: {error}")

    answers = generate(prompts, arguments)
    lines = (json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) for p, a in zip(prompts, answers, strict=True))
    arguments.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"wrote {len(prompts)} answers to {arguments.out}")


def read_prompts(path: Path) -> list[str]:
    """The prompts of the file, or a ValueError that names what is wrong, before a model is loaded."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give a file with one prompt a line")
    lines = [(n, line) for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise ValueError(f'{path}, line {number}: not of the form {{"prompt": "…"}}: {line[:80]}')
        prompts.append(prompt)
    return prompts


def generate(prompts: list[str], arguments: argparse.Namespace) -> list[str]:
    try:
        from vllm import LLM, SamplingParams  # here, because it takes seconds and --help does not need it
    except ModuleNotFoundError:
        sys.exit("error: vllm is missing: run make env, then this script with .venv/bin/python")

    llm = LLM(
        arguments.model,
        quantization="qwantize",
        max_model_len=arguments.max_model_len,
        enforce_eager=arguments.enforce_eager,
    )
    sampling = SamplingParams(temperature=arguments.temperature, max_tokens=arguments.max_tokens)
    if arguments.raw:  # both ways show vLLM's progress bar
        outputs = llm.generate(prompts, sampling)
    else:
        outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], sampling)
    return [output.outputs[0].text for output in outputs]


if __name__ == "__main__":
    main()
