"""What the scripts share at their edges: command lines made from a table of knobs, refusals in one line, files that are
never half-written, and the record of what made a result.
"""
import argparse
import contextlib
import difflib
import math
import operator
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch


class Stop(Exception):
    """Ends the run with one line for the person at the terminal, and an exit code."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def nearest(word: str, words) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; allowed: {', '.join(words)}"


def checked(name: str, allowed, text: str):
    """The value of a knob from the command line's text; raises Stop when it is not allowed."""
    flag = "--" + name.replace("_", "-")
    if allowed is str:
        return text
    if isinstance(allowed, tuple):
        if text not in allowed:
            raise Stop(f"{flag} {text}: unknown{nearest(text, allowed)}")
        return text
    kind, *bounds = allowed.split()
    try:
        value = {"int": int, "float": float}[kind](text)
        compare = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
        fits = all(compare[op](value, float(bound)) for op, bound in zip(bounds[::2], bounds[1::2]))
        if not fits or not math.isfinite(value):
            raise ValueError
    except (ValueError, OverflowError):
        raise Stop(f"{flag} {text}: give {kind} {' and '.join(map(' '.join, zip(bounds[::2], bounds[1::2])))}") from None
    return value


def parse(argv: list[str], description: str, knobs: dict, dataset_defaults: dict,
          words: str | None = None) -> tuple[dict, set[str]]:
    """Values of all knobs from the words of a command line, and the names of those that were given.

    knobs: name -> (default, allowed, help). allowed: a tuple of words, str, bool (a switch), or a kind with bounds such
    as "int >= 1" or "float > 0 <= 1".  dataset_defaults: value of the knob `dataset` -> defaults of its own.
    words: name under which words that belong to no knob are returned, a list; None allows none.
    Raises Stop with one line that names what was given and what is allowed.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, exit_on_error=False,
                                     usage=f"%(prog)s {words.upper()} ... [--KNOB VALUE ...]" if words else None,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, allowed, text) in knobs.items():
        values = {d[name] for d in dataset_defaults.values() if name in d}
        if values:
            text += f" (default: {', '.join(f'{d[name]} {key}' for key, d in dataset_defaults.items() if name in d)})"
        elif default is not None and default is not False:
            text += f" (default: {default})"
        action = {"action": "store_true"} if allowed is bool else {"metavar": (
            "|".join(allowed) if isinstance(allowed, tuple) else "WORD" if allowed is str else allowed.split()[0])}
        parser.add_argument("--" + name.replace("_", "-"), default=None, help=text.replace("%", "%%"), **action)
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise Stop(f"{error.argument_name}: {error.message}; see --help") from None
    free = [word for word in unknown if words and not word.startswith("-")]
    unknown = [word for word in unknown if word not in free]
    if unknown:
        flags = ["--" + name.replace("_", "-") for name in knobs]
        raise Stop(f"{unknown[0]}: unknown{nearest(unknown[0].split('=')[0], flags)}")
    values = {words: free} if words else {}
    for name, (default, allowed, _) in knobs.items():
        text = getattr(given, name)
        values[name] = default if text is None else True if allowed is bool else checked(name, allowed, text)
    for name, value in dataset_defaults.get(values.get("dataset"), {}).items():
        values[name] = value if values[name] is None else values[name]
    return values, {name for name in knobs if getattr(given, name) is not None}


def pick_device(name: str) -> torch.device:
    """The device of this name; auto takes CUDA where there is one. Raises Stop where it cannot be used."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{device.type} is not supported")
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise Stop(f"--device {name}: {str(error).splitlines()[0]}; give cpu, cuda or auto") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, the old one or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}.tmp")  # the same name each time: a killed process leaves no heap of them
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Stop(f"cannot write {path}: {error.strerror or error}; free some space or give another folder"
                   + (f" ({path.name} as last saved is whole)" if path.exists() else "")) from None


def provenance(device: torch.device) -> dict:
    """What made a result: command, commit, versions, device."""
    def git(*words):
        done = subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""
    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")  # of code: results are made by it
        commit = git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except OSError:  # no git on this machine
        commit = ""
    try:
        processor = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or of other words
        processor = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor}, {torch.get_num_threads()} threads"
    return {"command": shlex.join(["python", *sys.argv]), "commit": commit or "unknown", "device": f"{device} ({name})",
            "versions": {"python": platform.python_version(),
                         **{name: version(name) for name in ("torch", "torchvision", "numpy", "scipy")}},
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
