#!/bin/sh
# Install the versions of requirements.lock into the virtual environment $1. Without an NVIDIA GPU torch comes as its CPU build,
# from pip's configured sources if they have one, else from where uv knows it to be.
set -eu
venv=$1
torch=$(grep '^torch==' requirements.lock)
"$venv/bin/python" -m pip install --quiet --upgrade $(grep -E '^(pip|setuptools|uv)==' requirements.lock)
if command -v nvidia-smi >/dev/null 2>&1; then
    "$venv/bin/python" -m pip install "$torch"
else
    "$venv/bin/python" -m pip install "$torch+cpu" 2>/dev/null \
        || VIRTUAL_ENV=$venv "$venv/bin/uv" pip install --torch-backend cpu "$torch"
fi
"$venv/bin/python" -m pip install --requirement requirements.lock
