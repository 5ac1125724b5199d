"""What stands between client and server in the bench of the proxy, each as processes of its own.

A target is pinned to core 1; tokentape's writer, which is niced, to core 0, where load and truth
have real-time priority. `direct` is the control: no target at all.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from proxy_load import LOAD_CORE, START_S, free_port, wait_until_served

TARGET_CORE = 1
HERE = Path(__file__).parent
LITELLM = os.environ.get("LITELLM", "/tmp/litellm/venv/bin/litellm")
NGINX = """daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
worker_rlimit_nofile 20000; events {{ worker_connections 9000; }}
http {{ access_log off; client_max_body_size 0; keepalive_requests 10000000;
client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
upstream up {{ server 127.0.0.1:{upstream}; keepalive 2048; keepalive_requests 10000000; }}
server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ proxy_pass http://up;
proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 1d; }} }} }}
"""
LITELLM_CONFIG = """model_list:
  - model_name: m
    litellm_params: {{model: openai/m, api_base: "http://127.0.0.1:{upstream}/v1", api_key: sk-x}}
"""


class Absent(Exception):
    """A target that cannot run here; the message says why."""


@dataclass
class Target:
    """A running target: where it listens and which processes it is."""

    port: int
    process: subprocess.Popen[str] | None = None
    said: str = ""
    stop_s: float = 0.0
    _roles: dict[int, str] = field(default_factory=dict)

    def roles(self) -> dict[int, str]:
        """What each of its processes is: worker, writer or supervisor, by pid."""
        if self.process is None:
            return {}
        found = {pid: role_of(pid) for pid in [self.process.pid, *below(self.process.pid)]}
        if "worker" not in found.values():
            found = {p: "worker" if role == "supervisor" else role for p, role in found.items()}
        self._roles = found
        return found

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far, by role."""
        used: dict[str, float] = {}
        for pid, role in self.roles().items():
            with contextlib.suppress(OSError):
                used[role] = used.get(role, 0.0) + process_cpu_s(pid)
        return used

    def pss_mb(self) -> dict[str, float]:
        """Proportional memory in MB, by role."""
        held: dict[str, float] = {}
        for pid, role in self.roles().items():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                kib = int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
                held[role] = held.get(role, 0.0) + kib / 1024
        return held

    def unpin(self) -> None:
        for pid in self.roles():
            move(pid, {LOAD_CORE, TARGET_CORE})

    def writer_aside(self) -> None:
        """Move the writer off the worker's core."""
        for pid, role in self.roles().items():
            if role == "writer":
                move(pid, {LOAD_CORE})

    def stop(self) -> None:
        """End it by SIGTERM; `said` is its output, `stop_s` how long it took."""
        if self.process is None:
            return
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.said, _ = self.process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            for pid in self.roles():
                os.kill(pid, signal.SIGKILL)
            self.said, _ = self.process.communicate()
            self.said += " (killed: it did not end within 90 s)"
        self.stop_s = time.monotonic() - begun


def below(pid: int) -> list[int]:
    """All descendants of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *below(child)]
    return found


def role_of(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return "gone"
    if b"tokentape.traces.writer_process" in command:
        return "writer"
    if b"multiprocessing.resource_tracker" in command:
        return "tracker"
    if b"tokentape" in command and b"tokentape.proxy.worker" not in command:
        return "supervisor"
    return "worker"


def process_cpu_s(pid: int) -> float:
    """CPU seconds of all threads: the scheduler's ns where kept, else ticks of 10 ms."""
    tasks = list(Path(f"/proc/{pid}/task").glob("*/schedstat"))
    if tasks:
        return sum(int(t.read_text().split()[0]) for t in tasks) / 1e9
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def move(pid: int, cores: set[int]) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(task.name), cores)


def spawn(folder: Path, port: int, command: list[str], *, pinned: bool = True) -> Target:
    core = ["taskset", "-c", str(TARGET_CORE)] if pinned else []
    with (folder / "target.err").open("w") as errors:
        process = subprocess.Popen(
            [*core, *command], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        wait_until_served(port, process)
    except RuntimeError as error:
        process.kill()
        process.wait()
        tail = (folder / "target.err").read_text()[-300:].strip()
        raise Absent(f"does not start: {tail or error}") from None
    return Target(port, process)


def direct(_folder: Path, upstream: int) -> Target:
    return Target(upstream)


def nginx(folder: Path, upstream: int) -> Target:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise Absent("no nginx here")
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port, upstream=upstream))
    return spawn(folder, port, [program, "-p", str(folder), "-c", str(config)])


def tokentape(
    folder: Path, upstream: int, *options: str, program: tuple[str, ...] = ("-m", "tokentape")
) -> Target:
    port = free_port()
    tape = folder / f"bench-{time.monotonic_ns()}.tape"
    command = [sys.executable, *program, "capture", "--tape", str(tape)]
    command += ["--upstream", f"http://127.0.0.1:{upstream}", "--listen", f"127.0.0.1:{port}"]
    target = spawn(folder, port, [*command, *options])
    # Its port takes connections before its worker serves them: it says when that is.
    deadline = time.monotonic() + START_S
    while "listening on" not in (folder / "target.err").read_text():
        if time.monotonic() > deadline:
            raise Absent("does not get ready")
        time.sleep(0.05)
    target.writer_aside()
    return target


def without_content(folder: Path, upstream: int) -> Target:
    return tokentape(folder, upstream, "--content", "none")


def contended(folder: Path, upstream: int) -> Target:
    target = tokentape(folder, upstream)
    target.unpin()
    return target


def stock(folder: Path, upstream: int) -> Target:
    port = free_port()
    script = [sys.executable, str(HERE / "proxy_stock.py"), f"http://127.0.0.1:{upstream}"]
    return spawn(folder, port, [*script, str(port)])


def litellm(folder: Path, upstream: int) -> Target:
    if not Path(LITELLM).exists():
        raise Absent("no LiteLLM at $LITELLM")
    port = free_port()
    config = folder / "litellm.yaml"
    config.write_text(LITELLM_CONFIG.format(upstream=upstream))
    where = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    keyless = ["env", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY=true"]  # on loopback
    return spawn(folder, port, [*keyless, LITELLM, "--config", str(config), *where])


TARGETS: dict[str, Callable[[Path, int], Target]] = {
    "direct": direct,
    "nginx": nginx,
    "tokentape": tokentape,
    "none": without_content,
    "contended": contended,
    "stock": stock,
    "litellm": litellm,
}


def versions() -> dict[str, str]:
    """What was measured, as it names itself."""
    found = {}
    for name, command in {
        "nginx": ["/usr/sbin/nginx", "-v"],
        "mitmproxy": [sys.executable, "-c", "import mitmproxy.version as v;print(v.VERSION)"],
        "litellm": [
            str(Path(LITELLM).parent / "python"),
            "-c",
            "import importlib.metadata as m;print(m.version('litellm'))",
        ],
        "kernel": ["uname", "-r"],
        "python": [sys.executable, "-V"],
    }.items():
        with contextlib.suppress(OSError):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found[name] = (done.stdout + done.stderr).strip()[:80]
    return found
