#!/usr/bin/env bash
# From a fresh clone to a tuned model that answers, with nothing but Python 3.12, a C compiler and a CPU: environment,
# then examples/real_model.
#   bash launch/quickstart.sh [--fresh] [--out FOLDER]
# PYTHON=/path/to/python chooses the interpreter of a new environment.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/python.sh
source "$checkout/launch/python.sh"
case " $* " in *" -h "* | *" --help "*) exec bash "$checkout/examples/real_model/run.sh" --help ;; esac

venv=$checkout/.venv
if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    echo "Making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
# Installed by an earlier run, here or by tests/run.sh, for this setup.py?
if ! cmp -s "$checkout/setup.py" "$venv/installed-quickstart.py" && ! cmp -s "$checkout/setup.py" "$venv/installed-setup.py"; then
    echo "Installing megatron-idft with torch, megatron-core and reasoning-gym into $venv; a few minutes and gigabytes"
    "$venv/bin/python" -m pip install --disable-pip-version-check -e "${checkout}[train,examples,real]"
    cp "$checkout/setup.py" "$venv/installed-quickstart.py"
fi

if ! (cd "$checkout" && "$venv/bin/python" -m megatron_idft doctor); then
    echo "quickstart.sh: training cannot start; the report above names what is missing. To make a new environment:" >&2
    echo "    rm -rf $venv && bash launch/quickstart.sh" >&2
    exit 1
fi
PYTHON=$venv/bin/python exec bash "$checkout/examples/real_model/run.sh" "$@"
