#!/usr/bin/env python3
"""Chat with a running server through the OpenAI client; answers stream in as they are made.

    python serve_examples/chat_client.py                       a conversation; an empty line or Ctrl-D ends it
    python serve_examples/chat_client.py --prompt "Hello!"     one question, one answer

serve_examples/serve.sh starts such a server.
"""

import argparse
import os
import sys

try:
    import openai
except ModuleNotFoundError:
    sys.exit("error: the openai package is missing: pip install openai, or run this with .venv/bin/python")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    parser.add_argument("--model", help="default: the first that the server offers")
    parser.add_argument("--prompt", help="one question, instead of a conversation")
    parser.add_argument("--system", help="a system message before the first question")
    parser.add_argument("--max-tokens", type=int, default=256, help="of each answer; default: %(default)s")
    parser.add_argument("--temperature", type=float, help="default: the server's")
    arguments = parser.parse_args()

    client = openai.OpenAI(base_url=arguments.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        chat(client, arguments)
    except openai.APIConnectionError:
        sys.exit(f"error: no server at {arguments.base_url}: start serve_examples/serve.sh, or give --base-url")
    except openai.APIStatusError as error:
        sys.exit(f"error: the server refused ({error.status_code}): {error.message}")
    except KeyboardInterrupt:
        sys.exit(130)


def chat(client: openai.OpenAI, arguments: argparse.Namespace) -> None:
    model = arguments.model or client.models.list().data[0].id
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    while prompt := arguments.prompt or ask():
        messages.append({"role": "user", "content": prompt})
        messages.append({"role": "assistant", "content": answer(client, model, messages, arguments)})
        if arguments.prompt:
            return


def ask() -> str:
    try:
        return input("you> ").strip()
    except EOFError:
        return ""


def answer(client: openai.OpenAI, model: str, messages: list, arguments: argparse.Namespace) -> str:
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=arguments.max_tokens,
        temperature=openai.omit if arguments.temperature is None else arguments.temperature,
        stream=True,
    )
    text = ""
    for chunk in stream:
        piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


if __name__ == "__main__":
    main()
