#!/usr/bin/env bash
# Serve a model, quantized to NVFP4 while it loads, behind an API that the OpenAI client speaks.
#
#   serve_examples/serve.sh [MODEL] [any option of vllm serve]
#
# MODEL is a name on the Hugging Face Hub or a directory; default: the small model that `make quickstart` made.
# The settings of the quantization are in the variable SETTINGS, as JSON; vLLM hands them to the plugin as they are:
#   SETTINGS='{"quant_method": "qwantize", "scale_search": "naive"}' serve_examples/serve.sh
# Settings in a file work as well: serve_examples/serve.sh MODEL --hf-overrides '{"quantization_config_file": "x.yaml"}'
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

settings=${SETTINGS:-'{"quant_method": "qwantize", "scale_search": "optimal", "block_size": 16}'}

exec "$vllm" serve "$model" --quantization qwantize --hf-overrides "{\"quantization_config\": $settings}" "$@"
