"""``*.pt2``: packages of native code that score as TorchScript does, for any sizes, where only torch is imported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config

from features.batch import RequestBatch
from features.collate import pack, unpack
from ranker.evaluate import restore
from ranker.export import (
    ExportError,
    encoder_inputs_of,
    export,
    inputs_of,
    probes_of,
    ranker_inputs_of,
    short_length_of,
    stored_blocks,
    unsharded,
)
from ranker.export.compiled import compiled, load, no_compiler, same_outputs
from ranker.export.inputs import Inputs, without_history
from ranker.export.ways import modules_of
from ranker.longseq import History, HyTRec
from ranker.longseq.groups import SDIM, VQL
from ranker.ranks import join_ranks
from tests.ranker.export.conftest import Exported
from tests.ranker.export.server import answered_elsewhere
from tests.ranker.histories import EDGES, NO_PROBES, Shape, randomise, shape
from tests.ranker.histories import inputs_of as histories_of

ExportedOf = Callable[[str], Exported]
with_compiler = pytest.mark.skipif(no_compiler() is not None, reason=f"{no_compiler()}")


@pytest.fixture
def without_compiler() -> Iterator[None]:
    """A machine that has none."""
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


def reader_inputs(exported: Exported, batch: RequestBatch, lost: bool = False) -> Inputs:
    """The candidate ranker's, with records that the scripted user encoder makes, or lost ones."""
    spec = exported.spec
    blocks, short_length = stored_blocks(exported.run.config, spec), short_length_of(exported.run.config)
    probes, records = probes_of(batch, blocks)
    memory = exported.loaded("user_encoder.pt")(**encoder_inputs_of(batch, probes))
    if lost:
        memory = {name: x[:0] if name.endswith(("values", "exact")) else x * 0 for name, x in memory.items()}
    return {**ranker_inputs_of(batch, spec, short_length), "memory": memory | records}


def in_one_piece(inputs: Inputs) -> Inputs:
    """The same as views of one piece of memory, as the loader's processes hand batches over."""
    memory = inputs["memory"]
    assert isinstance(memory, dict)
    flat = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    views = unpack(pack(flat | {f"memory {name}": x.clone() for name, x in memory.items()}))
    return {name: views[name] for name in flat} | {"memory": {name: views[f"memory {name}"] for name in memory}}


@with_compiler
def test_a_candidate_ranker_of_every_kind_of_memory(exported_of: ExportedOf, tmp_path: Path):
    """Mean, UxSID, HiSAC, HyTRec and groups in one, with tables of fewer rows than ids: traced with five requests, then
    asked by other numbers of them, also for users without events and for lost records."""
    exported = exported_of("all")
    with join_ranks("cpu", 1, 0) as ranks:
        ranker = unsharded(restore(exported.run, ranks), exported.spec, exported.run)
    module = modules_of(ranker, exported.spec, exported.run.config)["candidate_ranker"]
    file = tmp_path / "candidate_ranker.pt2"
    samples = [in_one_piece(reader_inputs(exported, exported.batch(requests))) for requests in (5, 1)]
    package = compiled(module, samples, file, "require")
    assert package.reason is None
    assert package.order[:2] == ("request_values", "request_lengths")
    assert package.order[-1] == "memory.4.probe"

    found, scripted = load(file), exported.loaded("candidate_ranker.pt")
    none = without_history(exported.batch(3), exported.spec)
    asked = [reader_inputs(exported, exported.batch(requests)) for requests in (1, 2, 16, 33)]
    asked += [reader_inputs(exported, none), reader_inputs(exported, exported.batch(4), lost=True)]
    for inputs in asked:
        torch.testing.assert_close(found(**inputs), scripted(**inputs), rtol=0, atol=1e-5)
    answered_elsewhere(tmp_path / "requests.pt", (file, asked[2]))


@with_compiler
def test_all_files_are_compiled_compared_and_described(exported_of: ExportedOf, with_packages: Path, tmp_path: Path):
    manifest = json.loads((with_packages / "manifest.json").read_text())
    packages = ["candidate_ranker.pt2", "user_encoder.pt2", "ranker.pt2"]
    assert list(manifest["compiled"]) == packages
    for name in packages:
        assert (with_packages / name).is_file()
        assert manifest["files"][name] == manifest["files"][name.replace("pt2", "pt")]
        assert manifest["compiled"][name]["seconds"] > 0
    inputs = inputs_of(exported_of("mean").batch(2))
    assert manifest["compiled"]["ranker.pt2"]["order"] == list(inputs)
    ways = manifest["parity"]["ways"]
    assert ways["compiled ranker"]["files"] == ["ranker.pt2"]
    assert ways["compiled pair"]["files"] == ["user_encoder.pt2", "candidate_ranker.pt2"]
    for name in ("compiled ranker", "compiled pair"):
        assert ways[name]["against"] == "trainer"
        assert ways[name]["greatest_difference"] <= ways[name]["allowed"] == 1e-5
    answered_elsewhere(tmp_path / "requests.pt", (with_packages / "ranker.pt2", inputs))


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_the_reason_is_said(
    exported_of: ExportedOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    export(exported_of("mean").run.root, tmp_path / "export", requests=50, compiling="try")
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    assert len(manifest["compiled"]) == 3
    said = capsys.readouterr().err
    for name, package in manifest["compiled"].items():
        assert "install g++" in package["left_out_because"]
        assert f"no {name}: " in said
        assert not (tmp_path / "export" / name).exists()
        assert name not in manifest["files"]


@pytest.mark.usefixtures("without_compiler")
def test_where_packages_are_required_nothing_is_left_without_them(exported_of: ExportedOf, tmp_path: Path):
    with pytest.raises(ExportError, match=r"--compiled require: candidate_ranker.pt2 cannot be made: .*install g\+\+"):
        export(exported_of("mean").run.root, tmp_path / "export", requests=50, compiling="require")
    assert list(tmp_path.iterdir()) == []


class Deciding(nn.Module):
    """Does what it does by the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if bool((x > 0).all()) else x - 1


class OfOneSize(nn.Module):
    """Holds for six rows alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(3, 2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("module", "why"), [(Deciding(), "data-dependent"), (OfOneSize(), "")], ids=["decides by data", "of one size"]
)
def test_what_cannot_be_traced_is_left_out(tmp_path: Path, module: nn.Module, why: str):
    samples: list[Inputs] = [{"x": torch.ones(6)}, {"x": torch.ones(4)}]
    package = compiled(module, samples, tmp_path / "x.pt2", "try")
    assert package.reason is not None
    assert why in package.reason
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ExportError, match=r"x.pt2 cannot be made: "):
        compiled(module, samples, tmp_path / "x.pt2", "require")


class Later(nn.Module):
    """Every number one place further on."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, [1, 0])


@with_compiler
def test_nothing_is_read_behind_the_end_of_an_empty_tensor(tmp_path: Path):
    """By a loop with fewer steps than a vector has lanes, of which the first alone may not be read."""
    samples = [Inputs(x=torch.arange(1.0, 1.0 + n)) for n in (11, 16, 17, 1, 0)]
    assert compiled(Later(), samples, tmp_path / "later.pt2", "require").reason is None


class Records(nn.Module):
    """What a store keeps of histories, by several blocks."""

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)

    def forward(self, x: Tensor, time: Tensor, start: Tensor, end: Tensor, now: Tensor) -> dict[str, Tensor]:
        history = History(x, time, start, end, now, time.unsqueeze(1)[:, :0], x[:, :0])
        found: dict[str, Tensor] = {}
        for name, block in self.blocks.items():
            stored = block.store(block.encode(history, NO_PROBES))  # type: ignore[operator]
            found |= {f"{name}.{field}": x for field, x in stored._asdict().items()}
        return found


@with_compiler
def test_blocks_that_compilers_ask_about_sizes(tmp_path: Path):
    """HyTRec, VQL and SDIM in one package: on histories that are empty, of one event, overlapping, of many chunks."""
    blocks: dict[str, nn.Module] = {
        "hytrec": HyTRec(8, width=8, layers=2, ratio=1, short_length=5, window=16, decay="state"),
        "vql": VQL(8, codes=4, head_dim=4),
        "sdim": SDIM(8, hashes=4, bits=2),
    }
    module = Records({name: randomise(block).float().eval() for name, block in blocks.items()})

    def inputs(batch: Shape) -> Inputs:
        history, _ = histories_of(batch, 8)
        return {"x": history.x.float(), **{name: getattr(history, name) for name in ("time", "start", "end", "now")}}

    samples = [inputs(batch) for batch in EDGES.values() if batch.requests > 0]
    file = tmp_path / "records.pt2"
    assert compiled(module, samples, file, "require").reason is None
    found = load(file)
    for batch in (shape([3000], [(0, 0, 3000)], [1]), shape([33, 0, 1], [(2, 0, 1), (1, 0, 0), (0, 0, 33)], [1, 1, 1])):
        torch.testing.assert_close(found(**inputs(batch)), module(**inputs(batch)), rtol=1e-4, atol=1e-5)


class Doubled(nn.Module):
    """Of numbers; `by` is not what it is compiled with where it is changed afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.by = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.by * x


@with_compiler
def test_compiled_code_that_answers_otherwise_is_found(tmp_path: Path):
    module, samples = Doubled(), [Inputs(x=torch.ones(3)), Inputs(x=torch.ones(5))]
    file = tmp_path / "doubled.pt2"
    assert compiled(module, samples, file, "require").reason is None
    same_outputs(file, module, samples)
    module.by = 2.1
    with pytest.raises(RuntimeError, match="the compiled code failed: "):
        same_outputs(file, module, samples)
    file.write_bytes(b"no package")
    with pytest.raises(RuntimeError, match="the compiled code"):
        same_outputs(file, module, samples)
