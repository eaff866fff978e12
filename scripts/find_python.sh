#!/bin/sh
# Prints a Python >= 3.12 that starts and can make virtual environments; without one, says so and fails.

works() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

for python in python3.14 python3.13 python3.12 python3 "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python; do
    if path=$(command -v "$python") && works "$path"; then
        echo "$path"
        exit
    fi
done

if command -v uv >/dev/null 2>&1; then
    find_by_uv() { uv python find --no-project --system '>=3.12,<3.15'; }
    if path=$(find_by_uv 2>/dev/null) && works "$path" ||
        { uv python install --quiet 3.13 >&2 && path=$(find_by_uv) && works "$path"; }; then
        echo "$path"
        exit
    fi
fi

echo 'jmoe needs Python >= 3.12 with its venv module, and found none: install python3.12 or newer, or uv' >&2
exit 1
