"""What is installed: every source file through the links, nothing else; it runs from anywhere."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {".git", ".venv", "build", "dist", "__pycache__"}
SHIPPED = {".py", ".sql", ".typed", ".json", ".parquet", ".css", ".js", ".txt"}
LINKS = {"proxy", "replay", "analysis", "traces"}


def copied(to: Path) -> Path:
    """The checkout without what tools leave in it: a build writes beside its sources."""
    shutil.copytree(
        ROOT,
        to,
        symlinks=True,
        ignore=lambda _, names: {
            n for n in names if n in LEFT_OUT or n.endswith(("_cache", ".egg-info"))
        },
    )
    return to


def call(*command: str | Path, cwd: Path) -> str:
    """What a program prints on stdout; its complaint where it fails."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("packaging")
    checkout = copied(folder / "checkout")
    # sdist first, the wheel from it: what one leaves out, the other cannot have
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=checkout)
    return folder / "dist"


def tree() -> set[str]:
    """The files of the package, as the checkout has them through its links."""
    package = ROOT / "src" / "tokentape"
    paths = [Path(at, n) for at, _, names in os.walk(package, followlinks=True) for n in names]
    return {
        (Path("tokentape") / path.relative_to(package)).as_posix()
        for path in paths
        if path.suffix in SHIPPED
    }


def test_the_rooms_are_links_to_the_folders_at_the_root() -> None:
    found = [p for p in (ROOT / "src" / "tokentape").iterdir() if p.is_symlink()]
    assert {p.name: p.readlink() for p in found} == {n: Path("../..", n) for n in LINKS}


def test_the_wheel_holds_every_source_file_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {n for n in names if n.split("/")[0].endswith(".dist-info")}
    assert names - metadata == tree()
    assert {n.split("/")[0] for n in names - metadata} == {"tokentape"}
    assert any(n.endswith(".sql") for n in names)
    assert any(n.endswith("licenses/LICENSE") for n in metadata)


def test_the_source_distribution_can_be_built_from(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert {"pyproject.toml", "LICENSE", "README.md"} <= names
    assert {f"src/{name}" for name in tree()} <= names


def test_the_installed_script_runs_in_any_folder(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    env = tmp_path / "venv"
    venv.create(env, with_pip=True)
    python = env / "bin" / "python"
    call(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies are the ones that are here; tokentape itself is not on this path.
    code = "import site; print(site.getsitepackages()[0])"
    site = Path(call(python, "-c", code, cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = call(python, "-c", "import tokentape; print(tokentape.__file__)", cwd=tmp_path)
    assert where.startswith(str(env))
    assert "Usage: tokentape" in call(env / "bin" / "tokentape", "--help", cwd=tmp_path)
    assert "ttft" in call(env / "bin" / "tokentape", "metrics", cwd=tmp_path)  # the SQL came along
    assert "Usage: tokentape" in call(python, "-m", "tokentape", "--help", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pip_installs_a_checkout_with_all_it_needs(tmp_path: Path) -> None:
    checkout = copied(tmp_path / "checkout")
    env = tmp_path / "venv"
    venv.create(env, with_pip=True)
    call(env / "bin" / "python", "-m", "pip", "install", "--quiet", checkout, cwd=tmp_path)
    shutil.rmtree(checkout)
    assert "Usage: tokentape" in call(env / "bin" / "tokentape", "--help", cwd=tmp_path)
    assert "ttft" in call(env / "bin" / "tokentape", "metrics", cwd=tmp_path)
