"""The module loader: order, grammar, errors that name file and line."""

from pathlib import Path

import pytest

from tokentape.analysis.modules import ModuleError, load_order, read_module

HEAD = "-- module: a.b\n-- requires:\n--\n-- What it is.\n\n"
VIEW = "-- A view.\n-- col x INTEGER (ns): a number\nCREATE VIEW b AS\nSELECT 1 AS x;\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_every_module_comes_after_those_that_it_requires() -> None:
    seen: set[str] = set()
    for module in load_order():
        assert set(module.requires) <= seen, module.name
        seen.add(module.name)
    assert len(seen) == len(list((Path(load_order()[0].path).parents[1]).glob("**/*.sql")))


def test_names_of_public_objects_begin_with_their_module() -> None:
    for module in load_order():
        if module.name.split(".")[0] not in {"prelude", "metrics"}:
            stem = module.name.split(".")[1]
            odd = [o.name for o in module.objects if o.public and not o.name.startswith(stem)]
            assert not odd, module.name


def test_comment_columns_arguments_and_sql_of_an_object_are_read(tmp_path: Path) -> None:
    text = (
        HEAD + "-- Twice\n--   it.\n-- arg n INTEGER: a\n--   number\n-- cols b: as above\n"
        "CREATE MACRO c(n) AS TABLE\nSELECT n AS x;\n"
    )
    module = read_module(write(tmp_path, "a/b.sql", text.replace("-- Twice", VIEW + "\n-- Twice")))
    view, macro = module.objects
    assert (view.kind, view.name, view.line) == ("VIEW", "b", 8)
    assert view.columns[0].comment == "a number [ns]"
    assert (macro.kind, macro.text, macro.args[0].text) == ("MACRO TABLE", "Twice it.", "a number")
    assert macro.columns == view.columns
    assert macro.sql == "CREATE MACRO c(n) AS TABLE\nSELECT n AS x;"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "must begin with `-- module: a.b`"),
        ("-- module: a.c\n-- requires:\n", 1, "must begin with `-- module: a.b`"),
        ("-- module: a.b\n-- needs:\n", 2, "must be `-- requires: ...`"),
        (HEAD + "-- Lonely.\n\n" + VIEW, 6, "a comment that belongs to nothing"),
        (HEAD + "-- A table.\nCREATE TABLE t AS SELECT 1;\n", 6, "only CREATE VIEW"),
        (HEAD + "-- A view.\n-- col x: a number\nCREATE VIEW b AS SELECT 1 AS x;\n", 6, "must be"),
        (HEAD + "-- col x INTEGER: a\nCREATE VIEW b AS SELECT 1 AS x;\n", 6, "has no comment"),
        (HEAD + "-- A macro.\nCREATE MACRO b(n) AS n;\n", 6, "must document its arguments n"),
        (HEAD + "-- A view.\n-- cols z: same\nCREATE VIEW b AS SELECT 1;\n", 6, "z is not above"),
        (HEAD + "-- metric: m\n-- Title: M\n\n" + VIEW, 6, "a metric has exactly Title"),
    ],
)
def test_a_module_that_breaks_the_grammar_is_named_with_its_line(
    tmp_path: Path, text: str, line: int, what: str
) -> None:
    path = write(tmp_path, "a/b.sql", text)
    with pytest.raises(ModuleError) as error:
        read_module(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and what in str(error.value)


def test_a_circle_of_modules_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "a/b.sql", "-- module: a.b\n-- requires: a.c\n")
    write(tmp_path, "a/c.sql", "-- module: a.c\n-- requires: a.b\n")
    with pytest.raises(ModuleError, match=r"circle a\.b -> a\.c -> a\.b"):
        load_order(tmp_path)


def test_a_required_module_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "a/b.sql", "-- module: a.b\n-- requires: a.z\n")
    with pytest.raises(ModuleError) as error:
        load_order(tmp_path)
    assert str(error.value) == f"{path}:2: requires a.z, which does not exist"
