"""The search for an interpreter that `make` builds its environments with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "find_python.sh"

BROKEN = "#!/bin/sh\nexit 127\n"
OLD = '#!/bin/sh\necho "SyntaxError" >&2\nexit 1\n'
WORKING = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
# A distribution's Python without its venv package: all works but the import.
WITHOUT_VENV = f"""#!/bin/sh
exec "{sys.executable}" -c 'import sys
sys.modules["ensurepip"] = None
exec(sys.argv[2])' "$@"
"""


@pytest.fixture
def find(tmp_path):
    """Runs the script where nothing is on PATH, and nothing at home, but the given programs."""

    def find(programs):
        home, path = tmp_path / "home", tmp_path / "bin"
        home.mkdir()
        path.mkdir()
        for name, text in programs.items():
            program = home / name if name.startswith(".pyenv") else path / name
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text(text)
            program.chmod(0o755)
        environment = {"HOME": str(home), "PATH": str(path), "LOG": str(tmp_path / "log")}
        result = subprocess.run(["/bin/sh", SCRIPT], env=environment, capture_output=True, text=True, check=False)
        found = Path(result.stdout.strip())
        for parent in (path, home):
            if found.is_relative_to(parent):
                return found.relative_to(parent).as_posix()
        return result

    return find


def test_the_newest_working_interpreter_on_path_comes_first(find):
    assert (
        find({"python3.14": BROKEN, "python3.13": WORKING, "python3.12": WORKING, "python3": WORKING}) == "python3.13"
    )


@pytest.mark.parametrize("useless", [BROKEN, OLD, WITHOUT_VENV], ids=["shim", "old", "without venv"])
def test_an_interpreter_that_fails_does_not_count(find, useless):
    assert find({"python3.12": useless, "python3": WORKING}) == "python3"


def test_pyenv_is_searched_after_the_path(find):
    versions = {f".pyenv/versions/{v}/bin/python": WORKING for v in ("3.9.18", "3.11.7", "3.13.0")}
    assert find({"python3": OLD, **versions}) == ".pyenv/versions/3.13.0/bin/python"


def test_uv_is_asked_last(find, tmp_path):
    managed = tmp_path / "managed"
    managed.write_text(WORKING)
    managed.chmod(0o755)
    # Like uv without an interpreter: finds none until it has installed one.
    uv = f"""#!/bin/sh
case "$*" in
    "python install"*) : > "$LOG" ;;
    "python find"*) [ -e "$LOG" ] && echo "{managed}" ;;
esac
"""
    result = find({"python3.12": BROKEN, "uv": uv})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(managed)


def test_without_any_interpreter_one_line_says_what_to_install(find):
    result = find({"python3.12": BROKEN, "python3": OLD, ".pyenv/versions/3.12.1/bin/python": BROKEN, "uv": BROKEN})
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "install python3.12 or newer, or uv" in result.stderr


def test_the_interpreter_found_here_starts():
    result = subprocess.run(["/bin/sh", SCRIPT], env=os.environ, capture_output=True, text=True, check=True)
    version = subprocess.check_output([result.stdout.strip(), "-c", "import sys; print(sys.version_info[:2])"])
    assert version >= b"(3, 12)"
