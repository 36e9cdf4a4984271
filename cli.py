"""What the scripts share at their edges: command lines made from a table of knobs, refusals in one line,
files that are never half-written, the record of what made a result, progress, and the style of figures.
"""
import argparse
import contextlib
import difflib
import functools
import io
import math
import operator
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch

COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
# One colour a sampler in every figure; distinct also without colour vision (Okabe and Ito).
COLOURS = {"random": "#555555", "osgd": "#E69F00", "osgd-replacement": "#CC79A7", "spectral": "#0072B2",
           "refined": "#009E73"}


class Stop(Exception):
    """Ends the run with one line for the person at the terminal, and an exit code."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def run(main: Callable[[list[str]], None], script: str, argv: list[str] | None = None) -> int:
    """The exit code of main(words of the command line); a Stop becomes one line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:] if argv is None else argv)
    except Stop as stop:
        say(f"{stop}" if stop.code > 2 else f"{script}: error: {stop}", sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        return 128 + signal.SIGINT
    return 0


def say(line: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Prints on stdout or `stream`; a closed terminal, a full disk behind it or `| head` costs no run."""
    stream = stream or sys.stdout
    try:
        print(line, end=end, file=stream, flush=True)
    except OSError:  # the rest goes nowhere, also what Python still holds when it ends
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def nearest(word: str, words) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; allowed: {', '.join(words)}"


def checked(flag: str, allowed, text: str):
    """The value of a knob from the command line's text; raises Stop when it is not allowed."""
    if allowed is str or isinstance(allowed, tuple) and text in allowed:
        return text
    if isinstance(allowed, tuple):
        raise Stop(f"{flag} {text}: unknown{nearest(text, allowed)}")
    kind, *bounds = allowed.split()
    limits = list(zip(bounds[::2], bounds[1::2]))
    with contextlib.suppress(ValueError, OverflowError):
        value = {"int": int, "float": float}[kind](text)
        if math.isfinite(value) and all(COMPARE[op](value, float(bound)) for op, bound in limits):
            return value
    raise Stop(f"{flag} {text}: give {kind} {' and '.join(map(' '.join, limits))}")


def parse(argv: list[str], description: str, knobs: dict, dataset_defaults: dict,
          words: str | None = None) -> tuple[dict, set[str]]:
    """Values of all knobs from the words of a command line, and the names of those that were given.

    knobs: name -> (default, allowed, help). allowed: a tuple of words, str, bool (a switch), or a kind with
    bounds such as "int >= 1" or "float > 0 <= 1".  dataset_defaults: data set -> defaults of its own.
    words: name under which words that belong to no knob are returned, a list; None allows none.
    Raises Stop with one line that names what was given and what is allowed.
    """
    usage = f"%(prog)s {words.upper()} ... [--KNOB VALUE ...]" if words else None
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, exit_on_error=False, usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    flags = {name: "--" + name.replace("_", "-") for name in knobs}
    for name, (default, allowed, text) in knobs.items():
        own = [f"{defaults[name]} {key}" for key, defaults in dataset_defaults.items() if name in defaults]
        if own or default is not None and default is not False:
            text += f" (default: {', '.join(own) or default})"
        kind = "|".join(allowed) if isinstance(allowed, tuple) else "WORD" if allowed is str else None
        action = {"action": "store_true"} if allowed is bool else {
            "metavar": kind or allowed.split()[0], "type": functools.partial(checked, flags[name], allowed)}
        parser.add_argument(flags[name], default=None, help=text.replace("%", "%%"), **action)
    try:
        found, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise Stop(f"{error.argument_name}: {error.message}; see --help") from None
    free = [word for word in unknown if words and not word.startswith("-")]
    for word in unknown:
        if word not in free:
            raise Stop(f"{word}: unknown{nearest(word.split('=')[0], flags.values())}")
    given = {name: value for name, value in vars(found).items() if value is not None}
    values = {name: default for name, (default, *_) in knobs.items()} | given
    values = values | dataset_defaults.get(values.get("dataset"), {}) | given
    return values | ({words: free} if words else {}), set(given)


def expand(path: str | Path) -> Path:
    """The path with ~ as the user's home; of a user that there is not, as it stands."""
    return Path(os.path.expanduser(path))


def pick_device(name: str) -> torch.device:
    """The device of this name; auto takes CUDA where there is one. Raises Stop where it cannot be used."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{device.type} is not supported")
        return torch.empty(1, device=device).device  # with its number
    except (RuntimeError, AssertionError) as error:
        raise Stop(f"--device {name}: {str(error).splitlines()[0]}; give cpu, cuda or auto") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, the old one or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}.tmp")  # the same one: killed processes leave no heap
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
    def git(*words: str) -> str:
        command = ["git", "-C", Path(__file__).parent, *words]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git here, no repository
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return ""
    # Results are made by the code, so that new ones do not count as changes.
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    try:
        processor = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or of other words
        processor = platform.processor() or platform.machine()
    name = (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{processor}, {torch.get_num_threads()} threads")
    return {"command": shlex.join(["python", *sys.argv]),
            "commit": (git("rev-parse", "HEAD") or "unknown") + "+changes" * bool(changes),
            "device": f"{device} ({name})", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": {"python": platform.python_version(),
                         **{name: version(name) for name in ("torch", "torchvision", "numpy", "scipy")}}}


def clock(seconds: float) -> str:
    """Seconds as a person reads them: 0:07, 12:34, 3:20:00."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}" if minutes >= 60 else f"{minutes}:{s:02d}"


def progress(what: str, total: float, unit: str = "") -> Callable[[float], None]:
    """tick(done): after five seconds how far it is and how long it still takes, on stderr: a line rewritten
    in place on a terminal, else one every ten seconds. What ends sooner prints nothing."""
    began = shown = time.perf_counter()
    live = sys.stderr is not None and sys.stderr.isatty()

    def tick(done: float) -> None:
        nonlocal shown
        now, ends = time.perf_counter(), done >= total
        if now - began > 5 and done > 0 and (now - shown > (0.5 if live else 10) or ends and live):
            shown = now
            left = clock((now - began) / done * (total - done))
            line = f"{what}: {done:,.0f} of {total:,.0f}{' ' * bool(unit)}{unit}, {left} left"
            say(line.ljust(78), sys.stderr, end="\r" if live and not ends else "\n")
    return tick


def canvas(rows: int, columns: int, width: float, height: float, **options):
    """A figure of width x height inches and its axes [rows, columns]; drawn without a display."""
    os.environ["MPLBACKEND"] = "Agg"  # one inherited from a notebook would fail here
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "font.size": 8, "axes.titlesize": 8, "legend.fontsize": 8, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.2, "pdf.fonttype": 42})
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False,
                        **options)


def save_figure(figure, path: Path) -> None:
    """Write path.png and path.pdf, and let the figure go."""
    import matplotlib.pyplot as plt
    for kind in ("png", "pdf"):
        metadata = {"CreationDate": None} if kind == "pdf" else None
        figure.savefig(buffer := io.BytesIO(), dpi=160, format=kind, metadata=metadata)
        write_atomically(Path(f"{path}.{kind}"), buffer.getbuffer())
    plt.close(figure)
