"""Configs: what is written is what is meant, and all that is wrong is told with its place and what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from features.config_file import ConfigError, dump_config, load_config
from features.errors import UserError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Mean(Strict):
    type: Literal["mean"] = "mean"
    length: int = Field(0, ge=0)


class Attention(Strict):
    type: Literal["attention"] = "attention"
    heads: int = Field(2, ge=1)
    length: int = 0


class Short(Strict):
    length: int = Field(50, ge=1, description="latest events")
    name: str = "din"


class Model(Strict):
    short: Short | None = Field(default_factory=lambda: Short(length=20))
    long: list[Annotated[Mean | Attention, Field(discriminator="type")]] = Field(
        default_factory=lambda: [Mean(length=7)]
    )
    width: int | list[int] | Short = 8


class Config(Strict):
    name: str = Field(description="name of the run")
    model: Model = Field(default_factory=Model)
    labels: dict[str, str] = {}
    rate: float = Field(0.1, gt=0, lt=1)
    source: Annotated[Mean | Attention, Field(discriminator="type")] = Mean()

    @model_validator(mode="after")
    def _rate_fits_name(self) -> Config:
        if self.name == "fast" and self.rate < 0.5:
            raise ValueError("a fast run needs a rate of 0.5 or more")
        return self


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "run.yaml") -> Path:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
        return Path(name)

    return write


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, Config, overrides)
    assert isinstance(caught.value, UserError)
    return str(caught.value)


def test_defaults_fill_what_the_file_leaves_out(write):
    config = load_config(write("name: a\nmodel: {long: [{type: attention, heads: 4}]}"), Config)
    assert config.model.long == [Attention(heads=4)]
    assert config.rate == 0.1


def test_unknown_key_names_the_nearest_and_all_valid_keys(write):
    assert message_of(write("name: a\nmodel:\n  shrot: {}\n")) == (
        "run.yaml:3: model.shrot: unknown key; did you mean 'short'? valid keys here: short, long, width"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rate: 2", "rate: got 2; must be less than 1"),
        ("rate: high", "rate: got 'high'; must be a valid number"),
        ("model: {short: {length: 0}}", "model.short.length: got 0; must be greater than or equal to 1"),
        (
            "model: {short: {lenght: 5}}",
            "model.short.lenght: unknown key; did you mean 'length'? valid keys here: length, name",
        ),
        (
            "model: {long: [{type: mean}, {type: attention, haeds: 1}]}",
            "model.long[1].haeds: unknown key; did you mean 'heads'?",
        ),
        (
            "model: {long: [{type: meen}]}",
            "model.long[0].type: got 'meen'; did you mean 'mean'? allowed: 'mean', 'attention'",
        ),
        ("source: {heads: 1}", "source.type: this key is missing; allowed: 'mean', 'attention'"),
        ("source: {type: attention, heads: 0}", "source.heads: got 0; must be greater than or equal to 1"),
        ("model: {width: wide}", "model.width: got 'wide'; must be a valid integer or a valid list or"),
        ("model: {width: [1, x]}", "model.width[1]: got 'x'; must be a valid integer"),
        ("model: {width: {lenght: 1}}", "model.width.lenght: unknown key; did you mean 'length'?"),
        ("labels: {click: 1}", "labels.click: got 1; must be a valid string"),
        ("model: 3", "model: got 3; must be a valid dictionary"),
    ],
)
def test_wrong_values_name_path_value_and_what_is_allowed(write, text: str, expected: str):
    assert f"run.yaml:2: {expected}" in message_of(write(f"name: a\n{text}\n"))


def test_missing_key_is_described(write):
    assert message_of(write("rate: 0.2")) == "run.yaml: name: this key is missing (name of the run)"


def test_a_rule_between_keys_speaks_for_itself(write):
    assert message_of(write("name: fast")) == "run.yaml: a fast run needs a rate of 0.5 or more"


def test_everything_wrong_is_told_at_once(write):
    message = message_of(write("name: a\nname: b\nrate: 3\nlabels: {x: '${NOT_SET}'}\nmodle: {}\n"), "rate.x=1", "bad")
    assert message.startswith("run.yaml: 6 problems")
    for part in (
        "run.yaml:2: name: this key is given twice, first in line 1",
        "run.yaml:3: rate: got 3",
        "run.yaml:4: labels.x: got '${NOT_SET}', but the environment variable NOT_SET is not set",
        "run.yaml:5: modle: unknown key; did you mean 'model'?",
        "--set rate.x=1: rate.x: rate is 3, which has no keys",
        "--set bad: must have the form a.b[0].c=VALUE",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "run.yaml:1: not valid YAML"),
        ("- 1", "run.yaml: a config is a mapping of keys, got [1]"),
        ("", "run.yaml: name: this key is missing"),
        ("name: &n [*n]", "an alias contains itself"),
        ("name: !!python/name:os.system", "run.yaml:1: not valid YAML: could not determine a constructor"),
        ("[1, 2]: x", "a key must be a plain word"),
    ],
)
def test_files_that_are_no_config(write, text: str, expected: str):
    assert expected in message_of(write(text))


def test_missing_and_unreadable_files(write, tmp_path: Path):
    assert message_of(Path("nowhere.yaml")) == "nowhere.yaml: cannot read the config: No such file or directory"
    assert "Is a directory" in message_of(tmp_path)
    path = write("")
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in message_of(path)


def test_scalars_are_what_they_look_like(write):
    class Words(Strict):
        values: dict[str, object]

    text = "values: {a: no, b: 2019-06-01, c: 1e-3, d: true, e: 12:30, f: 1_000, g: 007, h: ~, i: .5, on: 0x10}"
    assert load_config(write(text), Words).values == {
        "a": "no", "b": "2019-06-01", "c": 1e-3, "d": True, "e": "12:30",
        "f": 1000, "g": 7, "h": None, "i": 0.5, "on": 16,
    }  # fmt: skip


class TestExtends:
    def test_mappings_merge_and_lists_are_replaced(self, write):
        write(
            "name: base\nrate: 0.2\nmodel: {short: {length: 9, name: x}, long: [{type: mean}, {type: mean}]}",
            "base/a.yaml",
        )
        path = write(
            "extends: ../base/a.yaml\nname: top\nmodel: {short: {length: 3}, long: [{type: attention}]}", "b/c.yaml"
        )
        config = load_config(path, Config)
        assert (config.name, config.rate) == ("top", 0.2)
        assert config.model.short == Short(length=3, name="x")
        assert config.model.long == [Attention()]

    def test_later_files_win(self, write):
        write("name: a\nrate: 0.2", "a.yaml")
        write("name: b", "b.yaml")
        config = load_config(write("extends: [a.yaml, b.yaml]"), Config)
        assert (config.name, config.rate) == ("b", 0.2)

    def test_a_block_of_another_type_replaces(self, write):
        write("name: a\nsource: {type: attention, heads: 3}", "a.yaml")
        assert load_config(write("extends: a.yaml\nsource: {type: mean, length: 2}"), Config).source == Mean(length=2)
        same = load_config(write("extends: a.yaml\nsource: {length: 2}"), Config).source
        assert same == Attention(heads=3, length=2)

    def test_errors_name_the_file_they_come_from(self, write):
        write("name: a\nrate: 5\n", "a.yaml")
        assert message_of(write("extends: a.yaml\n")).startswith("a.yaml:2: rate: got 5")

    def test_circle_missing_file_and_wrong_kind(self, write):
        write("extends: run.yaml\nname: a", "a.yaml")
        assert "extend each other in a circle: run.yaml → a.yaml → run.yaml" in message_of(write("extends: a.yaml"))
        assert "(named by extends in run.yaml)" in message_of(write("extends: gone.yaml\nname: a"))
        assert "run.yaml:2: extends: got 3; must be the path" in message_of(write("name: a\nextends: 3"))


class TestEnvironment:
    def test_strings_are_expanded(self, write, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("ROOT_OF_DATA", "/data")
        config = load_config(write("name: ${ROOT_OF_DATA}/x\nlabels: {a: '$${b} $c', b: '5 $'}"), Config)
        assert config.name == "/data/x"
        assert config.labels == {"a": "${b} $c", "b": "5 $"}

    @pytest.mark.parametrize("text", ["${A B}", "${", "${}"])
    def test_malformed_variables(self, write, text: str):
        assert "needs a variable's name" in message_of(write(f"name: '{text}'"))


class TestOverrides:
    def test_values_are_yaml(self, write):
        path = write("name: a\nmodel: {long: [{type: mean}, {type: attention}]}")
        overrides = [
            "rate=5e-1",
            "model.long[1].heads=8",
            "model.long.0.length=3",
            "labels={a: 'b > 1'}",
            "labels.c=x=y",
        ]
        config = load_config(path, Config, [*overrides, "model.width=[1, 2]"])
        assert config.rate == 0.5
        assert config.model.long == [Mean(length=3), Attention(heads=8)]
        assert config.labels == {"a": "b > 1", "c": "x=y"}
        assert config.model.width == [1, 2]

    def test_one_key_of_a_default_block_leaves_the_rest_at_its_default(self, write):
        config = load_config(write("name: a"), Config, ["model.short.name=z", "model.long[0].length=1"])
        assert config.model.short == Short(length=20, name="z")
        assert config.model.long == [Mean(length=1)]

    def test_null_block_is_switched_off_and_on(self, write):
        path = write("name: a\nmodel: {short: null}")
        assert load_config(path, Config).model.short is None
        assert load_config(path, Config, ["model.short.length=5"]).model.short == Short(length=5)

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("model.shrot.length=3", "model.shrot: unknown key; did you mean 'short'?"),
            ("rate=2", "rate: got 2; must be less than 1"),
            ("model.long[3].length=1", "model.long[3]: no such element; model.long is a list of 1, counted from 0"),
            ("model.long.x=1", "model.long.x: no such element"),
            ("rate=[", "rate: VALUE is not valid YAML"),
            ("=3", "must have the form"),
            ("a..b=3", "must have the form"),
        ],
    )
    def test_refused(self, write, override: str, expected: str):
        assert f"--set {override}: {expected}" in message_of(write("name: a"), override)


strings = st.text() | st.sampled_from(
    ["1e-3", "no", "~", "${HOME}", "$${", "2020-01-01", "0o7", "1_0", ".5", "<<", "=", ""]
)


@settings(max_examples=50, deadline=None)
@given(strings, st.dictionaries(strings, strings), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_dumped_config_loads_as_itself(
    tmp_path_factory: pytest.TempPathFactory, name: str, labels: dict[str, str], rate: float
):
    if name == "fast":
        return
    config = Config(name=name, labels=labels, rate=rate, source=Attention())
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(path, Config) == config
