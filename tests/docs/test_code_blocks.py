"""Runs the code in README.md and docs/*.md.

- `python`: the blocks of a page are run in order, in one namespace, in a process of their own with eight
  virtual CPU devices, with warnings as errors.
- `bash`: each command is checked, not run: `_COMMANDS` says how for every command that may be there.
- `yaml`: is a file for `jmoe-train --config`, or describes an indexed job of Kubernetes that runs `jmoe-train`.
- `text` and `bibtex` are not code. No other block is allowed.
"""

import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from train.arguments import parse, split, with_file
from train.cli import EvalCommand, GenerateCommand, RunOptions, TokenizerCommand, TrainCommand
from train.config import preset

ROOT = Path(__file__).parents[2]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]

_BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)")


def blocks(page, language):
    """Blocks of a page in that language, each led by empty lines so that it keeps its line numbers."""
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        if match[1] == language:
            yield "\n" * text.count("\n", 0, match.start(2)) + match[2]


def with_blocks(language):
    pages = [page for page in PAGES if any(blocks(page, language))]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


# Bash: what may stand in a page, and how each command is checked.


def _check_jmoe_train(arguments):
    commands = {"eval": EvalCommand, "generate": GenerateCommand, "tokenizer": TokenizerCommand}
    if arguments and arguments[0] in commands:
        parse(commands[arguments[0]], arguments[1:])
    elif arguments != ["--help"]:
        options, _ = split(RunOptions, arguments)
        parse(TrainCommand, arguments, default=TrainCommand(fields=preset(options.preset or "tiny")))


def _check_make(arguments):
    subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _check_pip(arguments):
    assert arguments[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argument in arguments[1:]:
        if argument == "-c" or (ROOT / argument).is_file():
            continue
        requirement = re.fullmatch(r"(jmoe|\.)(?:\[(.+)\])?", argument)
        assert requirement or argument == "-e", f"pip install {argument}"
        if requirement and requirement[2]:
            assert set(requirement[2].split(",")) <= extras.keys()


def _check_python(arguments):
    assert arguments[0] == "-m"
    if arguments[1] == "train":
        _check_jmoe_train(arguments[2:])
    else:
        assert importlib.util.find_spec(arguments[1]), f"there is no module {arguments[1]}"


def _check_srun(arguments):
    _check_jmoe_train(arguments[arguments.index("jmoe-train") + 1 :])


def _accept(arguments):
    """A command of another program, which the pages only show."""


_COMMANDS = {
    "cd": _accept,
    "else": _accept,
    "fi": _accept,
    "git": _accept,
    "if": _accept,
    "jmoe-train": _check_jmoe_train,
    "make": _check_make,
    "pip": _check_pip,
    "python": _check_python,
    "srun": _check_srun,
    "tensorboard": _accept,
}


@with_blocks("bash")
def test_bash_blocks_hold_commands_that_exist(page):
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = list(itertools.dropwhile(_ASSIGNMENT.match, shlex.split(line, comments=True)))
            if not words:
                continue
            command = Path(words[0]).name
            assert command in _COMMANDS, f"{page.name} shows {command}, which no check knows"
            _COMMANDS[command](words[1:])


@with_blocks("python")
def test_python_blocks_run(page, environment, tmp_path):
    program = f"namespace = {{'__name__': '__main__'}}\nfor block in {list(blocks(page, 'python'))!r}:\n"
    program += f"    exec(compile(block, {str(page)!r}, 'exec'), namespace)\n"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_yaml_blocks_are_configurations(tmp_path):
    file = tmp_path / "config.yaml"
    for block in itertools.chain.from_iterable(blocks(page, "yaml") for page in PAGES):
        if "apiVersion:" in block:
            _check_kubernetes(block)
            continue
        file.write_text(block)
        with_file(preset("tiny"), file)


def _check_kubernetes(manifests):
    """Checks what JAX needs to find the processes of a job, and the commands in it."""
    by_kind = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(manifests)}
    service, job = by_kind["Service"], by_kind["Job"]
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    [container] = pod["containers"]
    commands = re.findall(r"jmoe-train ([^;]*)", " ".join(container["args"]))
    assert commands
    for command in commands:
        _check_jmoe_train(shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_in_a_language_that_is_checked(page):
    text = page.read_text()
    assert {match[1] for match in _BLOCK.finditer(text)} <= {"python", "bash", "yaml", "text", "bibtex"}
    assert len(_BLOCK.findall(text)) * 2 == len(re.findall("^ *```", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_of_the_project(page):
    for target in _LINK.findall(page.read_text()):
        assert not target or (page.parent / target).exists(), f"{page.name} links to {target}"
