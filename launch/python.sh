# shellcheck shell=bash
# Sourced: `find_python` prints a Python that is new enough, or explains how to get one and fails.

find_python() {
    local candidate
    # pyenv's versions are found even where another one is active; the newest comes last in the glob, so it is tried last.
    for candidate in "${PYTHON:-}" python3.12 python3.13 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
        [ -n "$candidate" ] || continue
        # Not `command -v`: pyenv's shims exist for versions that they then refuse to run.
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    cat >&2 <<'EOF'
Python 3.12 or newer is needed and none was found. Any of these installs it:
  Ubuntu, Debian   sudo apt-get install python3.12 python3.12-venv
  pyenv            pyenv install 3.12
  uv               uv python install 3.12
  conda            conda create -n idft python=3.12
Then run this again, with PYTHON=/path/to/python if it is not on PATH.
EOF
    return 1
}
