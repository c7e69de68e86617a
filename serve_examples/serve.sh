#!/usr/bin/env bash
# Serve a model, quantized to NVFP4 while it loads, behind an API that the OpenAI client speaks.
#
#   serve_examples/serve.sh [MODEL] [any option of vllm serve]
#
# MODEL is a name on the Hugging Face Hub or a directory; default: the small model that `make quickstart` made.
# Settings of the quantization may be in the variable SETTINGS, as JSON:
#   SETTINGS='{"scale_search": "naive"}' serve_examples/serve.sh
# or in a file:
#   QWANTIZE_CONFIG=configs/block32.yaml serve_examples/serve.sh
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)

case "${1:-}" in
  -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit ;;
  "" | -*) model=$root/.cache/smollm2-135m-instruct ;;
  *) model=$1; shift ;;
esac
if [[ $model == /* && ! -d $model ]]; then
  echo "error: there is no model in $model: run make quickstart once, or name a model" >&2
  exit 1
fi

vllm=$root/.venv/bin/vllm
[[ -x $vllm ]] || vllm=$(command -v vllm) || { echo "error: vllm is not installed: run make env" >&2; exit 1; }

options=(--quantization qwantize)
[[ -z ${SETTINGS:-} ]] || options+=(--additional-config "{\"qwantize\": $SETTINGS}")

exec "$vllm" serve "$model" "${options[@]}" "$@"
