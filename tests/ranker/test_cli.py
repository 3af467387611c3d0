"""The command line: quick help, one message for what the user can put right, counts of what was made."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from features.dataset import ColumnInfo, HashInfo, Manifest, SplitInfo
from features.errors import UserError
from ranker import cli, doctor
from ranker.doctor import Check


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ranker", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch):
    """Put a function in the place of a package's entry point."""

    def stub(module: str, name: str, function: object) -> None:
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: function}))  # type: ignore[arg-type]

    return stub


def manifest() -> Manifest:
    split = SplitInfo(
        requests=1200, impressions=34000, users=56, first_ms=0, last_ms=1, positives={"click": 789}, unknown_items=5,
        unknown={"item": (5, 34000), "request.query": (0, 0)},
    )  # fmt: skip
    columns = {"request": {"query": ColumnInfo(kind="categorical", size=3), "load": ColumnInfo(kind="dense")}}
    return Manifest(
        format_version=1, name="tiny", content_hash="0", items=12, known_items=10, users=57, known_users=57,
        events=9999, columns=columns, labels=["click"], oracles=[], splits={"train": split}, partitions=[],
        dropped={"duplicate events": 3, "null times": 0}, config={}, versions={},
        counted={"ids of event.action outside its vocabulary": 31, "users without events": 0},
        hashed_ids={"user": HashInfo(buckets=1000, ids=56, sharing=7)},
    )  # fmt: skip


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in (
        "doctor",
        "prepare",
        "train",
        "evaluate",
        "export",
        "runs",
        "compare",
        "tune",
        "plan",
        "requests",
        "schema",
    ):
        assert command in out


def test_prepare_prints_what_was_made_and_dropped(run, stub, tmp_path: Path):
    given: list[object] = []
    stub("features.prepare", "prepare", lambda config, out: given.append((config, out)) or manifest())
    path = tmp_path / "data.yaml"
    path.write_text("name: tiny\nsource: {type: synthetic}")
    code, out, err = run("prepare", str(path), "--out", "d", "--set", "source.users=7", "--set", "threads=1")
    assert (code, err) == (0, "")
    config, target = given[0]
    assert (config.source.users, config.threads, target) == (7, 1, Path("d"))
    for part in ("1,200", "34,000", "789", "9 known", "2 unknown items", "56 users", "duplicate events: 3"):
        assert part in out
    assert "null times" not in out
    assert "found: ids of event.action outside its vocabulary: 31\n" in out


def test_prepare_shows_rows_and_unknown_or_colliding_ids_of_each_feature(run, stub, tmp_path: Path):
    stub("features.prepare", "prepare", lambda config, out: manifest())
    path = tmp_path / "data.yaml"
    path.write_text("name: tiny\nsource: {type: synthetic}")
    _, out, _ = run("prepare", str(path), "--out", "d")
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert ["user", "1,001", "56", "12.50%", "–"] in lines
    assert ["item", "10", "–", "–", "0.01%"] in lines
    assert ["request.query", "3", "–", "–", "–"] in lines  # no ids in the split
    assert not any(line[0] == "request.load" for line in lines)


def test_config_error_is_one_message_with_code_2(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "data.yaml"
    path.write_text("nmae: tiny\nname: x\nsource: {type: synthetic}")
    code, out, err = run("prepare", str(path), "--out", "d")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}:1: nmae: unknown key; did you mean 'name'?")
    assert "Traceback" not in err
    monkeypatch.setenv("RANKER_TRACEBACK", "1")
    with pytest.raises(UserError):
        run("prepare", str(path), "--out", "d")


def test_other_exceptions_keep_their_traceback(run, stub, tmp_path: Path):
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    stub("ranker.evaluate", "evaluate", fail)
    with pytest.raises(ZeroDivisionError):
        run("evaluate", str(tmp_path))


def test_evaluate_and_export_pass_their_arguments(run, stub):
    given: list[object] = []
    exported = (Path("r"), Path("o"), 10_000, "off")
    stub("ranker.evaluate", "evaluate", lambda *arguments: given.append(arguments))
    stub("ranker.export", "export", lambda *arguments: given.append(arguments))
    assert run("evaluate", "r", "--split", "valid")[0] == 0
    assert run("evaluate", "r", "--frozen", "--predictions")[0] == 0
    assert run("export", "r", "--out", "o")[0] == 0
    assert run("export", "r", "--out", "o", "--requests", "500")[0] == 0
    assert run("export", "r", "--out", "o", "--compiled", "require")[0] == 0
    assert given == [
        (Path("r"), "valid", False, False),
        (Path("r"), "test", True, True),
        exported,
        (*exported[:2], 500, "off"),
        (*exported[:3], "require"),
    ]
    assert run("evaluate", "r", "--split", "tset")[0] == 2


def test_requests_passes_its_arguments(run, stub):
    given: list[object] = []
    stub("ranker.requests_file", "write_requests", lambda *arguments: given.append(arguments))
    assert run("requests", "r", "--out", "o")[0] == 0
    assert run("requests", "r", "--out", "o", "--split", "valid", "--requests", "7")[0] == 0
    assert given == [(Path("r"), "test", 100, Path("o")), (Path("r"), "valid", 7, Path("o"))]
    assert run("requests", "r", "--out", "o", "--requests", "0")[0] == 2


def test_train_passes_overrides_and_resume(run, stub, tmp_path: Path):
    given: list[object] = []
    stub("ranker.training.trainer", "train", lambda config, out, resume: given.append((config, out, resume)))
    path = tmp_path / "run.yaml"
    path.write_text("name: x\ndataset: d")
    assert run("train", str(path), "--out", "r", "--set", "model.short.length=7", "--resume")[0] == 0
    config, out, resume = given[0]
    assert (config.model.short.length, out, resume) == (7, Path("r"), True)


def test_commands_refuse_a_wrong_toolchain_before_they_import_it(run, stub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    monkeypatch.setattr("ranker.cli.root.ensure_versions", lambda: doctor.ensure_versions({"torch": "2.13.0"}.get))
    stub("ranker.training.trainer", "train", None)
    code, _, err = run("train", "none.yaml", "--out", "r")
    assert code == 2
    assert "torchrec: not installed" in err
    assert "pip install" in err


def test_a_library_that_does_not_load_is_explained(run, stub, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ImportError("undefined symbol")

    def explain(probe: object) -> None:
        raise doctor.ToolchainError("operators: fbgemm does not run")

    stub("ranker.export", "export", broken)
    monkeypatch.setattr("ranker.cli.root.ensure_healthy", explain)
    assert run("export", "r", "--out", "o")[::2] == (2, "error: operators: fbgemm does not run\n")
    monkeypatch.setattr("ranker.cli.root.ensure_healthy", lambda probe: None)
    with pytest.raises(ImportError):
        run("export", "r", "--out", "o")


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_exit_code_and_remedy(run, monkeypatch: pytest.MonkeyPatch, status: str, code: int):
    def diagnose() -> Sequence[Check]:
        return [Check("torch", "ok", "2.13.0"), Check("fbgemm", status, "1.7 [x]", "pip install fbgemm")]  # type: ignore[arg-type]

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    got, out, _ = run("doctor")
    assert got == code
    assert "1.7 [x]" in out
    assert "pip install fbgemm" in out


def test_compare_passes_its_options_and_fails_if_a_cell_did(run, stub, tmp_path: Path):
    given: list[object] = []

    def compare(config: object, folder: Path, out: Path, *rest: object) -> list[object]:
        given.append((config, folder, out, *rest))
        return failures

    failures: list[object] = []
    stub("ranker.compare.command", "compare", compare)
    path = tmp_path / "compare.yaml"
    path.write_text("name: x\nmethods: {a: {}, b: {}}\nlengths: [1]\nbaseline: a")
    options = ["--methods", "b,c", "--lengths", "5,0", "--seeds", "3", "--baseline", "b@5", "--steps", "7"]
    options += [
        "--sweep",
        "k=1,2",
        "--set",
        "a=1",
        "--set",
        "b=2",
        "--recompute",
        "b-*",
        "--readme",
        "R.md",
        "--no-train",
    ]
    assert run("compare", str(path), "--out", "o", *options)[0] == 0
    config, *rest = given[0]
    assert (list(config.methods), config.lengths, config.seeds, config.baseline) == (["b", "c"], [5, 0], [3], "b@5")
    assert (config.budget.steps, config.sweep, config.set) == (7, {"k": [1, 2]}, ["a=1", "b=2"])
    assert rest == [tmp_path, Path("o"), ["b-*"], [Path("R.md")], False]
    failures.append("cell")
    assert run("compare", str(path), "--out", "o")[0] == 1


def test_an_interrupted_comparison_says_how_to_go_on(run, stub, tmp_path: Path):
    def compare(*_: object) -> None:
        raise KeyboardInterrupt

    stub("ranker.compare.command", "compare", compare)
    path = tmp_path / "compare.yaml"
    path.write_text("name: x\nmethods: {a: {}}\nlengths: [1]\nbaseline: a")
    code, _, err = run("compare", str(path), "--out", "o")
    assert code == 130
    assert "the same command goes on" in err


@pytest.mark.parametrize(
    ("name", "key"),
    [("prepare", "conversion_read_s: number"), ("train", "conversion_weight: number"), ("compare", "groups: integer")],
)
def test_schema_documents_every_key(run, name: str, key: str):
    code, out, _ = run("schema", name)
    assert code == 0
    assert key in out
    code, out, _ = run("schema", name, "--json")
    assert key.split(":")[0] in json.dumps(json.loads(out)["$defs"])
