"""What a measurement is kept with: the machine, the versions, the method and the date, in one JSON file."""

import argparse
import datetime
import fnmatch
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import subprocess
import types
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

type Record = dict[str, Any]

RESULTS = Path(__file__).parent / "results"


def describe_environment(torch: types.ModuleType | None = None) -> Record:
    """Describes the device that JAX computes on, and the software: torch too, if it takes part."""
    versions = _versions()
    if torch:
        versions |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    return {"hardware": _hardware(), "versions": versions}


@functools.cache
def commit() -> str | None:
    """Names the commit of the code that is measured, where git knows it; "-dirty" if files were changed since."""
    return _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")


def default_path(program: str, hardware: Record) -> Path:
    """Where a program keeps today's results: `results/<program>-<device>-<date>.json`."""
    device = re.sub(r"[^a-z0-9]+", "-", hardware["device"].lower()).strip("-")
    return RESULTS / f"{program}-{device}-{datetime.date.today().isoformat()}.json"


class Results:
    """A results file, whole on the disk after each change.

    Args:
        path: The file. What is there is replaced, unless `resume`.
        header: What holds for all records: program, method, hardware and versions.
        resume: Whether to go on with the records in the file, if it exists.

    Raises:
        ValueError: The file to resume was measured on other hardware, with other versions or by another
            method.
    """

    def __init__(self, path: Path, header: Record, *, resume: bool = False):
        self.path = path
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._content: Record = {"date": now, **header, "records": []}
        if resume and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if differing := [name for name in header if content.get(name) != header[name]]:
                raise ValueError(
                    f"{path} cannot be resumed: it differs from this run in {' and '.join(differing)}; "
                    "choose another file with --out"
                )
            self._content = content

    @property
    def records(self) -> list[Record]:
        """The records so far; change them through `replace` only."""
        return self._content["records"]

    def replace(self, records: list[Record]) -> None:
        """Writes these records in place of those so far.

        A process that dies meanwhile leaves the file as it was.
        """
        self._content["records"] = records
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f"{self.path.name}.tmp")
        draft.write_text(json.dumps(self._content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(self.path)


def make_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """Starts the command line of a program, with what `open_results` reads."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{program}", description=description)
    default = f"benchmarks/results/{program}-DEVICE-DATE.json"
    parser.add_argument("--out", type=Path, help=f"results file; {default} if none is given")
    parser.add_argument("--resume", action="store_true", help="keep the file's results, and measure the rest")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def open_results(
    parser: argparse.ArgumentParser, options: argparse.Namespace, method: str, environment: Record
) -> Results:
    """Opens the results file that a command line asks for."""
    path = options.out or default_path(parser.prog.rpartition(".")[2], environment["hardware"])
    header = {"program": parser.prog, "method": " ".join(method.split()), **environment}
    try:
        return Results(path, header, resume=options.resume)
    except ValueError as error:
        parser.error(str(error))


def chosen[Name: str](parser: argparse.ArgumentParser, option: str, value: str, known: Iterable[Name]) -> list[Name]:
    """Reads the value of an option: names or patterns such as "E*", separated by commas.

    It ends the program if one of these is or fits no known name.
    """
    by_name = {str(name): name for name in known}
    fitting = {pattern: fnmatch.filter(by_name, pattern) for pattern in value.split(",")}
    if unknown := [pattern for pattern, names in fitting.items() if not names]:
        parser.error(f"{option}: there is no {unknown[0]!r}; there are {', '.join(by_name)}")
    return [by_name[name] for name in dict.fromkeys(itertools.chain(*fitting.values()))]


def new_process() -> Executor:
    """A process, started with its first task, so that this one need not touch the device."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def make_console(environment: Record) -> Console:
    """Makes the console of a program, and says first if what it will show is no GPU's."""
    console = Console()
    console = console if console.is_terminal else Console(width=130)
    if environment["hardware"]["platform"] != "gpu":
        console.print("No GPU here: this is XLA on another device, and says nothing of a GPU's speed.")
    return console


def describe_failure(error: Exception) -> str:
    """Describes an error in one line, which starts with "out of memory" if that is what it says."""
    lines = str(error).strip().splitlines() or [""]
    line = lines[0][:300]
    if isinstance(error, MemoryError) or re.search(r"RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
        return f"out of memory: {line}"
    return f"{type(error).__name__}: {line}"


def custom_calls(compiled: jax.stages.Compiled) -> list[str]:
    """Names what a compiled function runs beside XLA's own code: cuBLAS, cuDNN, Mosaic kernels."""
    return sorted(set(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text() or "")))


def _hardware() -> Record:
    device = jax.devices()[0]
    hardware: Record = {
        "device": device.device_kind,
        "platform": device.platform,
        "cpu_cores": os.cpu_count(),
    }
    if device.platform == "gpu":
        hardware["multiprocessors"] = device.core_count
        hardware["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        hardware["memory"] = _output("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader", "--id=0")
    else:
        hardware["machine"] = platform.machine()
    return hardware


def _versions() -> Record:
    versions: Record = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    runtime = re.search(r"cuda (\d+)", jax.devices()[0].client.platform_version)
    versions["cuda"] = runtime and f"{int(runtime[1]) // 1000}.{int(runtime[1]) % 1000 // 10}"
    return versions


def _output(*command: str) -> str | None:
    """What a command prints, or None if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
