"""Profiles are read from TOML or JSON; a wrong one is one line with the file and the key."""

from pathlib import Path

import pytest

from tokentape.replay.engine.profile import Profile, load_profile
from tokentape.traces.errors import UsageError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_no_file_means_the_defaults() -> None:
    assert load_profile(None) == Profile()


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    toml = write(tmp_path, "a.toml", 'step_ms = 3\nmodel = "fast"\nprefix_cache = false\n')
    json = write(tmp_path, "a.json", '{"step_ms": 3, "model": "fast", "prefix_cache": false}')
    assert load_profile(toml) == load_profile(json)
    assert load_profile(toml) == Profile(step_ms=3, model="fast", prefix_cache=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step_msec = 3", "unknown key 'step_msec'; did you mean step_ms?"),
        ("zzz = 3", "unknown key 'zzz'; known keys: model, seed"),
        ('step_ms = "3"', "step_ms must be a number, not '3'"),
        ("step_ms = -1", "step_ms must be more than 0, not -1"),
        ("step_ms = nan", "step_ms must be a number, not nan"),
        ("step_jitter = -0.5", "step_jitter must be 0 or more, not -0.5"),
        ("kv_tokens = 4.5", "kv_tokens must be a whole number, not 4.5"),
        ("kv_tokens = true", "kv_tokens must be a whole number, not True"),
        ("prefix_cache = 1", "prefix_cache must be true or false, not 1"),
        ('model = ""', "model must not be empty"),
        ("kv_tokens = 100", "kv_tokens (100) must hold at least one request of max_model_tokens"),
        ("step_ms = ", "not a valid profile"),
    ],
)
def test_a_wrong_profile_is_one_line_naming_the_file(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, "p.toml", text)
    with pytest.raises(UsageError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message


def test_a_missing_file_a_folder_and_bytes_that_are_no_text_are_usage_errors(
    tmp_path: Path,
) -> None:
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.json").write_text("[1, 2]")
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "b.json", tmp_path / "c.json"):
        with pytest.raises(UsageError, match=str(path)):
            load_profile(path)
