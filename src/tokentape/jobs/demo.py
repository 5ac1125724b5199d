"""The whole path in under a minute, with no GPU: capture, replay on a faster engine, compare.

Every step is the real command in a process of its own, and is told before it runs, so that a reader
can repeat it. All that it makes stays in one folder.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokentape.traces.errors import TokentapeError

Tell = Callable[[str], None]

FILES = {
    "traffic.toml": (
        'arrivals = "poisson 8/s for 16s"\n'
        'input = "lognormal mean=300 cv=1.1 min=20 max=4000"\n'
        'output = "lognormal mean=70 cv=0.8 min=4 max=400"\n'
        'prefixes = "count=2 tokens=768 share=67% zipf=0"\n'
        'chat = "50%"\n'
        "seed = 7\n"
    ),
    "today.toml": (
        "# about an 8B model on one H100\nprefill_tokens_per_s = 40000.0\nstep_ms = 6.1\n"
    ),
    "candidate.toml": "# a faster card\nprefill_tokens_per_s = 90000.0\nstep_ms = 3.6\n",
}

SAMPLE = ("capture.tape", "run.tape")


def sample_tapes() -> list[Path]:
    """The tapes that come with tokentape: vLLM on one H100, captured, and replayed at 1x."""
    folder = Path(__file__).resolve().parents[1] / "sample"
    return [folder / name for name in SAMPLE]


@dataclass(frozen=True)
class Demo:
    """What the demo left behind."""

    folder: Path
    capture: Path
    run: Path
    commands: list[list[str]]


def demo(folder: Path, tell: Tell) -> Demo:
    """Run it all in `folder`, which must be new or empty; TokentapeError when a step fails."""
    if folder.exists() and any(folder.iterdir()):
        raise TokentapeError(f"{folder}: is not empty; choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    steps = Steps(folder, tell)
    tell("1/4  generate: 16 s of described load, chat and completions, with shared prompts")
    steps.run("generate", "traffic.toml", "--tape", "traffic.tape")
    with steps.serving("engine", "--profile", "today.toml") as engine:
        tell("2/4  capture: a proxy in front of today's engine records what passes")
        with steps.serving("capture", "--upstream", engine, "--tape", "prod.tape") as proxy:
            steps.run("replay", "traffic.tape", "--to", proxy, "--tape", "clients.tape")
    with steps.serving("engine", "--profile", "candidate.toml") as engine:
        tell("3/4  replay: the captured traffic, twice as fast, against the candidate")
        steps.run("replay", "prod.tape", "--to", engine, "--tape", "run.tape", "--speed", "2x")
    tell("4/4  report: today's engine under today's load, the candidate under twice the load")
    return Demo(folder, folder / "prod.tape", folder / "run.tape", steps.commands)


class Steps:
    """Runs tokentape commands in the demo's folder, and remembers them."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        self.commands: list[list[str]] = []
        self._folder = folder
        self._tell = tell

    def _announce(self, *arguments: str) -> list[str]:
        self.commands.append(["tokentape", *arguments])
        self._tell("     $ tokentape " + " ".join(arguments))
        return [sys.executable, "-m", "tokentape", *arguments]

    def run(self, *arguments: str) -> None:
        """Run a command to its end."""
        command = self._announce(*arguments)
        done = subprocess.run(
            command, cwd=self._folder, capture_output=True, text=True, check=False
        )
        (self._folder / f"{arguments[0]}-{len(self.commands)}.log").write_text(
            done.stdout + done.stderr
        )
        if done.returncode:
            raise TokentapeError(f"{' '.join(arguments)}: {last_line(done.stderr)}")

    @contextlib.contextmanager
    def serving(self, *arguments: str) -> Iterator[str]:
        """A command that serves until the block ends; gives its URL."""
        log = self._folder / f"{arguments[0]}-{len(self.commands) + 1}.log"
        command = self._announce(*arguments, "--listen", "127.0.0.1:0")
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=self._folder, stdout=out, stderr=subprocess.PIPE, text=True
            )
        try:
            yield _address(process, arguments)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                _, rest = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                _, rest = process.communicate()
            with log.open("a") as out_text:
                out_text.write(rest or "")
        if process.returncode not in (0, -signal.SIGTERM):
            raise TokentapeError(f"{' '.join(arguments)}: {last_line(rest)}")


def _address(process: subprocess.Popen[str], arguments: tuple[str, ...]) -> str:
    """The URL that a serving command says it listens on."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        words = [w.rstrip("/.,;") for w in line.split() if w.startswith("http://127.0.0.1:")]
        fresh = [w for w in words if w not in arguments]
        if fresh:
            return fresh[0]
    raise TokentapeError(f"{' '.join(arguments)}: {last_line(said)}")


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "ended without a word"
