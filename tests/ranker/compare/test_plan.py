"""A comparison's config becomes the runs it names, each with its length, seed and swept values in the right keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from features.errors import UserError
from ranker.compare.options import Options, load_compare
from ranker.compare.plan import Cell, Row, baseline_of, plan


def cells_of(configs: Path, **options: object) -> list[Cell]:
    config = load_compare(configs / "compare.yaml", Options(**options))  # type: ignore[arg-type]
    return plan(config, configs)


def test_a_cell_for_each_method_length_and_seed(configs: Path):
    cells = cells_of(configs)
    assert [cell.name for cell in cells] == [
        "din-L5-s0", "din-L40-s0", "mean-L5-s0", "mean-L40-s0", "din-L5-s1", "din-L40-s1", "mean-L5-s1", "mean-L40-s1",
    ]  # fmt: skip
    assert [cell.config.seed for cell in cells] == [0] * 4 + [1] * 4
    assert {(c.config.training.max_steps, c.config.training.threads) for c in cells} == {(3, 1)}


def test_the_length_goes_to_every_block_or_to_din_alone(configs: Path):
    options = {"methods": "din,mean,both,blind", "lengths": "7,0", "seeds": "0", "baseline": "din"}
    cells = {cell.name: cell.config.model for cell in cells_of(configs, **options)}
    assert cells.keys() == {f"{m}-L{n}-s0" for m in ("din", "mean", "both") for n in ("7", "all")} | {"blind-s0"}
    for name, model in cells.items():
        length = 7 if "L7" in name else 0
        assert [block.length for block in model.long] == [length] * len(model.long)
        if model.short is not None:
            assert model.short.length == (3 if model.long else length)


def test_options_override_the_config(configs: Path):
    (cell,) = cells_of(
        configs, methods="both", lengths="9", seeds="4", baseline="both", epochs=2, set=("tables.dim=8", "name=x")
    )
    assert (cell.name, cell.config.tables.dim, cell.config.name) == ("both-L9-s4", 8, "x")
    assert (cell.config.training.epochs, cell.config.training.max_steps) == (2, None)


def test_a_method_has_settings_and_lengths_of_its_own(configs: Path, tmp_path: Path):
    path = tmp_path / "compare.yaml"
    methods = "methods: {slow: {config: mean.yaml, lengths: [5], set: [optimizer.lr=0.5]}, mean: {}}"
    path.write_text(f"configs: {configs}\nname: a\n{methods}\nlengths: [5, 6]\nbaseline: slow\nbudget: {{epochs: 1}}\n")
    cells = plan(load_compare(path, Options()), tmp_path)
    assert [(c.name, c.config.optimizer.lr) for c in cells] == [
        ("slow-L5-s0", 0.5), ("mean-L5-s0", 0.01), ("mean-L6-s0", 0.01),
    ]  # fmt: skip


def test_a_sweep_is_an_axis_of_the_methods_that_have_the_key(configs: Path):
    for key in ("model.long[0].heads", "model.long.0.heads"):
        cells = cells_of(configs, methods="din,mean,attention", lengths="5", seeds="0", sweep=(f"{key}=1,2,4",))
        assert [(c.row.method, dict(c.row.sweep)) for c in cells] == [
            ("din", {}), ("mean", {}), *(("attention", {key: n}) for n in "124"),
        ]  # fmt: skip
        assert [c.config.model.long[0].heads for c in cells[2:]] == [1, 2, 4]  # type: ignore[union-attr]
        assert [c.name for c in cells[2:]] == [f"attention-L5-heads{n}-s0" for n in "124"]


def test_sweeps_multiply_and_values_are_yaml(configs: Path):
    sweep = ("model.tower.hidden=[8],[8, 4]", "optimizer.lr=1e-3,0.1")
    cells = cells_of(configs, methods="din", lengths="5", seeds="0", sweep=sweep)
    assert [(c.config.model.tower.hidden, c.config.optimizer.lr) for c in cells] == [
        ([8], 0.001), ([8], 0.1), ([8, 4], 0.001), ([8, 4], 0.1),
    ]  # fmt: skip


def test_blocks_that_are_swept_read_as_much_as_their_row_says(configs: Path):
    sweep = ("model.long=[{type: mean}],[{type: mean}, {type: target_attention, heads: 1}]",)
    cells = cells_of(configs, methods="din,mean", lengths="5", seeds="0", sweep=sweep)
    assert [[block.length for block in cell.config.model.long] for cell in cells] == [[5], [5, 5]] * 2


def test_each_row_has_its_baseline():
    swept = (("k", "1"),)
    rows = [Row("a", 5), Row("a", 9), Row("b", 5), Row("b", 9, swept), Row("c", 7)]
    assert [baseline_of(row, rows, "a") for row in rows] == [None, None, rows[0], rows[1], None]
    assert [baseline_of(row, rows, "a@9") for row in rows] == [rows[1], None, rows[1], rows[1], rows[1]]
    assert [baseline_of(row, rows, "c") for row in rows] == [rows[4]] * 4 + [None]  # it has one row: for all
    both = [Row("a", 5, (("k", v),)) for v in "12"] + [Row("b", 5, (("k", "2"),))]
    assert baseline_of(both[2], both, "a") == both[1]
    assert baseline_of(Row("b", 0), [Row("a", 0), Row("b", 0)], "a@all") == Row("a", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "din,wide"}, r"(?s)same examples, batch, widths.*loader.requests differs \(32: din; 16: wide\)"),
        ({"methods": "din,wide"}, r"tables.dim differs \(4: din; 8: wide\)"),
        ({"methods": "din,men"}, "method men: .*men.yaml: cannot read the config"),
        ({"baseline": "mane"}, r"baseline: 'mane' is not among the methods \(din, mean\)"),
        ({"baseline": "din@6"}, "din has no row of length '6'; it has 5, 40"),
        (
            {"sweep": ("model.long[0].anchors=1",)},
            r"no method has the key model.long\[0\].anchors; the methods are din",
        ),
        ({"sweep": ("seed=5,6",)}, "sweep: seed is what --seeds sets; give its values there"),
        ({"sweep": ("model.short.length=5,6",)}, "sweep: model.short.length is what --lengths sets"),
        ({"sweep": ("optimizer.lr",)}, "must have the form KEY=VALUE"),
        ({"sweep": ("a..b=1",)}, "'a..b' is no key"),
        ({"sweep": ("optimizer.lr=-1",)}, "method din: .*optimizer.lr: got -1"),
        ({"sweep": ("optimizer.lr=1,1",)}, "give each value once"),
        ({"sweep": ("name='a/b','a:b'",)}, "two cells would be named din-L5-namea_b-s0"),
        ({"lengths": "5,-1"}, "lengths"),
        ({"seeds": "1,1"}, "seeds.*give each value once"),
        ({"epochs": 1, "steps": 1}, "epochs is 1 and steps 1; give one"),
        ({"cfg": "partition"}, "must have the form KEY=VALUE"),
    ],
    ids=str,
)
def test_refused(configs: Path, options: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        cells_of(configs, **options)


def test_methods_may_differ_in_what_is_swept(configs: Path):
    cells = cells_of(configs, methods="din", lengths="5", seeds="0", sweep=("tables.dim=4,8",))
    assert [cell.config.tables.dim for cell in cells] == [4, 8]
    cells = cells_of(configs, lengths="5", seeds="0", sweep=("tables.dims.item=4,8",))  # keys of the user's own
    assert [cell.config.tables.dims for cell in cells] == [{"item": 4}, {"item": 8}] * 2


def test_the_scheduler_and_its_options(configs: Path):
    config = load_compare(configs / "compare.yaml", Options(scheduler="slurm", cfg="partition=gpu,time=60", parallel=4))
    assert (config.scheduler.name, config.scheduler.cfg, config.parallel) == (
        "slurm", {"partition": "gpu", "time": "60"}, 4,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["synthetic", "ml1m", "ebnerd", "kuairand"])
def test_our_own_comparisons(name: str):
    """Alike in batch, widths and budget, all with semantic IDs; DIN reads 50 events where a block reads more."""
    folder = Path(__file__).parents[3] / "configs" / name
    config = load_compare(folder / "compare.yaml", Options(seeds="0"))
    cells = plan(config, folder)
    assert config.name == name
    assert {cell.row.method for cell in cells} == set(config.methods)
    assert all("item.sid_1" in cell.config.features.sequence for cell in cells)
    shorts = [cell.config.model.short for cell in cells if cell.config.model.long]
    assert {short.length for short in shorts if short is not None} == {50}
    assert baseline_of(cells[-1].row, [cell.row for cell in cells], config.baseline) == Row("din", 50)


COMPARISONS = sorted(p for name in ("compare", "public") for p in Path("configs").glob(f"*/{name}.yaml"))


@pytest.mark.parametrize("path", COMPARISONS, ids=str)
def test_the_comparisons_of_the_project_are_planned(path: Path):
    """Every method's config is there and takes the settings of its row."""
    config = load_compare(path, Options())
    assert {cell.row.method for cell in plan(config, path.parent)} == set(config.methods)
