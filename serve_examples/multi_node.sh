#!/usr/bin/env bash
# Serve one model from several machines, each of which holds and quantizes its own part of it.
#
#   serve_examples/multi_node.sh MODEL MACHINES RANK FIRST [any option of vllm serve]
#
# MACHINES is how many there are, RANK this one's number from 0, FIRST the address of number 0, which all the others
# must reach; there the API listens. Start it on every machine, with the same options. Two machines of 8 GPUs each:
#   machine 10.0.0.1:  serve_examples/multi_node.sh MODEL 2 0 10.0.0.1 --tensor-parallel-size 8 --pipeline-parallel-size 2
#   machine 10.0.0.2:  serve_examples/multi_node.sh MODEL 2 1 10.0.0.1 --tensor-parallel-size 8 --pipeline-parallel-size 2
#
# Every machine needs this package, vLLM and the checkpoint, in the same versions and under the same path. It is vLLM's
# own launch. With Ray instead (`pip install ray` everywhere; `ray start --head` on the first machine, on the others
# `ray start --address 10.0.0.1:6379`) one command on one of them does:
#   vllm serve MODEL --quantization qwantize --distributed-executor-backend ray --tensor-parallel-size 8 --pipeline-parallel-size 2
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit
fi
if [[ $# -lt 4 ]]; then
  echo "error: give MODEL MACHINES RANK FIRST, see $0 --help" >&2
  exit 2
fi
model=$1 machines=$2 rank=$3 first=$4
shift 4

root=$(cd "$(dirname "$0")/.." && pwd)
vllm=$root/.venv/bin/vllm
[[ -x $vllm ]] || vllm=$(command -v vllm) || { echo "error: vllm is not installed: run make env" >&2; exit 1; }

launch=(--nnodes "$machines" --node-rank "$rank" --master-addr "$first")
[[ $rank == 0 ]] || launch+=(--headless) # the API is that of the first machine

exec "$vllm" serve "$model" --quantization qwantize "${launch[@]}" "$@"
