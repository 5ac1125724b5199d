"""./run: works from a bare checkout, says what to install where it cannot, and repairs itself."""

import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {".git", ".venv", "build", "dist", "__pycache__"}
PROCESSES = len(os.sched_getaffinity(0)) + 1  # one more than the cores
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what git would clone, without an environment."""
    copy = tmp_path / "checkout"
    shutil.copytree(
        ROOT,
        copy,
        symlinks=True,
        ignore=lambda _, names: {
            n for n in names if n in LEFT_OUT or n.endswith(("_cache", ".egg-info"))
        },
    )
    return copy


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def run(
    checkout: Path, *arguments: str, home: Path, path: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """./run in a bare environment; only what a registry behind a company's proxy needs is kept."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k.lower() in {"http_proxy", "https_proxy", "no_proxy", "ssl_cert_file", "pip_index_url"}
    }
    return subprocess.run(
        [str(checkout / "run"), *arguments],
        env={**kept, "HOME": str(home), "PATH": path, **more},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )


def program(folder: Path, name: str, text: str) -> None:
    """An executable shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def fake_environment(checkout: Path) -> Path:
    """A .venv that is set up, with a python that does nothing."""
    scripts = checkout / ".venv" / "bin"
    program(scripts, "python", "exit 0")
    (checkout / ".venv" / ".installed").write_text(f"{checkout.resolve()}\n")
    return scripts


def fake_uv(folder: Path, log: Path) -> None:
    """A uv that writes down what it is asked, and makes a .venv."""
    sync = (
        'mkdir -p .venv/bin && printf "#!/bin/sh\\n" >.venv/bin/python && chmod +x .venv/bin/python'
    )
    program(folder, "uv", f'echo "$@" >>{log}\n[ "$1" != sync ] || {{ {sync}; }}')


def test_without_a_python_it_says_exactly_what_to_install(checkout: Path, home: Path) -> None:
    result = run(checkout, "true", home=home, path="", PYTHON=str(home / "nothing"))
    assert result.returncode == 1
    assert f"PYTHON={home / 'nothing'} is not a Python 3.12 or newer" in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_that_is_too_old_is_not_taken(checkout: Path, home: Path) -> None:
    old = home / "bin"
    # What probes it gets what Python 3.9 would print: nothing.
    program(old, "python3", "exit 0")
    result = run(checkout, "true", home=home, path=str(old), PYTHON=str(old / "python3"))
    assert result.returncode == 1
    assert "Python 3.12 or newer" in result.stderr


def test_the_message_for_no_python_names_packages(checkout: Path, home: Path) -> None:
    text = (checkout / "run").read_text()
    known = "/root/.pyenv /opt/pyenv /usr/local/pyenv"
    assert known in text
    (checkout / "run").write_text(
        text.replace(known, str(home / "no-pyenv")).replace("getent passwd", "false")
    )
    result = run(checkout, "true", home=home, path="")
    assert result.returncode == 1
    for said in (
        "needs Python 3.12 or newer",
        "apt-get install python3 python3-venv",
        "pyenv install 3.13",
        "uv",
    ):
        assert said in result.stderr
    assert len(result.stderr.splitlines()) == 2


def test_help_needs_no_environment(checkout: Path, home: Path) -> None:
    result = run(checkout, "--help", home=home, path="")
    assert result.returncode == 0
    assert "./run test" in result.stdout
    assert not (checkout / ".venv").exists()


def test_bench_without_a_name_lists_the_benches(checkout: Path, home: Path) -> None:
    fake_environment(checkout)
    result = run(checkout, "bench", home=home, path=SYSTEM_PATH)
    names = {p.stem.removeprefix("bench_") for p in (ROOT / "tests" / "bench").glob("bench_*.py")}
    assert set(result.stdout.split()) == names


def test_a_bench_that_is_not_there_is_a_usage_error(checkout: Path, home: Path) -> None:
    fake_environment(checkout)
    result = run(checkout, "bench", "nothing", home=home, path=SYSTEM_PATH)
    assert (result.returncode, result.stderr) == (
        2,
        "tokentape: no bench named nothing; ./run bench lists them\n",
    )


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (
            ["test"],
            f"""pytest: -n {PROCESSES} --dist loadfile -m (not slow) and not timed
pytest: -m (not slow) and timed""",
        ),
        (["test", "--slow", "-x"], "pytest: -m slow or not slow -x"),
        (["test", "tests/test_docs.py"], "pytest: -m not slow tests/test_docs.py"),
        ([], "tokentape: demo"),
        (["demo", "--folder", "a b"], "tokentape: demo --folder a b"),
        (["tokentape", "info", "x"], "tokentape: info x"),
    ],
)
def test_each_word_runs_its_command(
    checkout: Path, home: Path, given: list[str], asked: str
) -> None:
    scripts = fake_environment(checkout)
    for name in ("pytest", "tokentape"):
        program(scripts, name, f'echo {name}: "$@"')
    result = run(checkout, *given, home=home, path=SYSTEM_PATH)
    assert result.stdout.strip() == asked


def test_a_command_runs_where_the_caller_is_and_tests_run_in_the_checkout(
    checkout: Path, home: Path
) -> None:
    scripts = fake_environment(checkout)
    program(scripts, "pytest", "pwd")
    assert run(checkout, "pwd", home=home, path=SYSTEM_PATH).stdout.strip() == str(home)
    tested = run(checkout, "test", home=home, path=SYSTEM_PATH)
    assert tested.stdout.split() == [str(checkout)] * 2


@pytest.mark.parametrize("failing", ["and not timed", "and timed"])
def test_a_failure_in_either_half_of_the_tests_is_the_exit_code(
    checkout: Path, home: Path, failing: str
) -> None:
    scripts = fake_environment(checkout)
    program(scripts, "pytest", f'case "$*" in *"{failing}"*) exit 3 ;; esac')
    assert run(checkout, "test", home=home, path=SYSTEM_PATH).returncode == 3


def test_the_exit_code_is_the_commands(checkout: Path, home: Path) -> None:
    fake_environment(checkout)
    assert run(checkout, "sh", "-c", "exit 7", home=home, path=SYSTEM_PATH).returncode == 7


@pytest.mark.parametrize("changed", ["pyproject.toml", "uv.lock"])
def test_a_changed_lock_is_synced_once(checkout: Path, home: Path, changed: str) -> None:
    log = home / "uv.log"
    fake_uv(home / "bin", log)
    fake_environment(checkout)
    path = f"{home / 'bin'}:{SYSTEM_PATH}"
    assert run(checkout, "true", home=home, path=path).returncode == 0
    assert not log.exists()
    later = time.time() + 5
    os.utime(checkout / changed, (later, later))
    os.utime(checkout / ".venv" / ".installed", (later - 1, later - 1))
    result = run(checkout, "true", home=home, path=path)
    assert "has changed, updating .venv" in result.stderr
    assert "sync --quiet --locked" in log.read_text()


def test_a_uv_that_fails_like_a_pyenv_shim_is_not_used(checkout: Path, home: Path) -> None:
    shims = home / "shims"
    program(shims, "uv", "echo 'pyenv: uv: command not found' >&2; exit 127")
    python = home / "bin" / "python3.13"
    made = home / "made"
    # An interpreter that answers the probe, then writes down what it is asked to do and fails.
    program(
        home / "bin",
        python.name,
        f'case $1 in -c) echo 0 "$0" ;; *) echo "$@" >{made}; exit 3 ;; esac',
    )
    result = run(checkout, "true", home=home, path=f"{shims}:{python.parent}:{SYSTEM_PATH}")
    assert made.read_text().split()[:2] == ["-m", "venv"]
    assert result.returncode == 3
    assert not (checkout / ".venv" / ".installed").exists()


def test_the_newest_reference_python_of_pyenv_is_taken(checkout: Path, home: Path) -> None:
    log = home / "uv.log"
    fake_uv(home / "bin", log)
    for version in ("3.12.9", "3.13.2", "3.13.10", "3.14.1"):
        micro = version.rsplit(".", maxsplit=1)[1]
        program(home / ".pyenv" / "versions" / version / "bin", "python", f'echo {micro} "$0"')
    shims = home / ".pyenv" / "shims"
    for name in ("python3.13", "python3.14", "python3"):
        program(shims, name, "echo 'pyenv: command not found' >&2; exit 127")
    path = f"{shims}:{home / 'bin'}:{SYSTEM_PATH}"
    run(checkout, "true", home=home, path=path, PYENV_ROOT=str(home / ".pyenv"))
    asked = next(line for line in log.read_text().splitlines() if line.startswith("sync"))
    assert asked.endswith(f"--python {home / '.pyenv/versions/3.13.10/bin/python'}")


def test_two_at_once_set_up_once(checkout: Path, home: Path) -> None:
    log = home / "uv.log"
    fake_uv(home / "bin", log)
    path = f"{home / 'bin'}:{SYSTEM_PATH}"
    command = [str(checkout / "run"), "true"]
    both = [
        subprocess.Popen(command, env={"HOME": str(home), "PATH": path}, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in both:
        process.communicate()
    assert [p.returncode for p in both] == [0, 0]
    assert log.read_text().count("sync") == 1


def test_a_copied_environment_is_made_anew(checkout: Path, home: Path) -> None:
    log = home / "uv.log"
    fake_uv(home / "bin", log)
    scripts = fake_environment(checkout)
    (checkout / ".venv" / ".installed").write_text("/where/it/was\n")
    program(scripts, "stale", "exit 0")
    run(checkout, "true", home=home, path=f"{home / 'bin'}:{SYSTEM_PATH}")
    assert "sync" in log.read_text()
    assert not (scripts / "stale").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fresh_clone_in_an_empty_home_sets_itself_up(checkout: Path, home: Path) -> None:
    result = run(checkout, "tokentape", "--version", home=home, path=SYSTEM_PATH)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("tokentape ")
    assert sum("first run" in line for line in result.stderr.splitlines()) == 1
    again = run(checkout, "tokentape", "--version", home=home, path=SYSTEM_PATH)
    assert (again.stdout, again.stderr) == (result.stdout, "")
