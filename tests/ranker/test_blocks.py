"""Long-sequence blocks in the ranker, by config: they learn, resume, are exported; what cannot fit is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from features.batch import RequestBatch, from_tensors
from features.collate import assemble, nothing
from features.config_file import ConfigError, load_config
from features.dataset import Dataset
from features.errors import UserError
from features.selection import resolve
from ranker.blocks import compresses, per_probe
from ranker.config import TrainConfig
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.export import export, inputs_of
from ranker.longseq.groups.sdim import SDIM
from ranker.model import Ranker
from ranker.ranks import Ranks
from ranker.run import Run, codewords_of
from ranker.towers import click_losses, esmm_loss
from ranker.training.trainer import train
from tests.ranker.block_configs import ALL, BLOCKS, HISAC, HYTREC, METHODS, NEXT, SEARCHES, TOGETHER, UXSID, WITH_LOSS
from tests.ranker.export.server import answered_elsewhere

ConfigOf = Callable[..., TrainConfig]
Scalars = Callable[[Path], dict[str, dict[int, float]]]
Read = Callable[[Path], dict[str, Tensor]]
ALONE = Ranks(0, 1, 1, torch.device("cpu"))
CONFIGS = Path(__file__).parents[2] / "configs"

CODES = ("features.sequence=[item, item.sid_1]", "features.codes=[item.sid_1, item.sid_2]")


def options_of(root: Path, blocks: str, *more: str) -> tuple[str, ...]:
    return (f"dataset={root}", *CODES, f"model.long=[{blocks}]", "model.short=null", *more)


def built(config: TrainConfig) -> Ranker:
    """Untrained and unsharded."""
    data = Dataset(config.dataset)
    torch.manual_seed(0)
    return Ranker(resolve(config.features, data.manifest), config, {}, codewords_of(config, data), torch.device("cpu"))


def batches_of(config: TrainConfig) -> tuple[RequestBatch, RequestBatch]:
    """A batch of the test split, and what a rank is fed when its own have run out."""
    data = Dataset(config.dataset)
    spec = resolve(config.features, data.manifest)
    selection = selection_of(config, data, spec)
    empty = from_tensors(spec, assemble([nothing(selection)], selection))
    return next(scoring_loader(config, data, "test", selection, ALONE).batches()), empty


def loss_of(model: Ranker, batch: RequestBatch) -> Tensor:
    """As in a step of training."""
    scores = model.train()(batch)
    clicks = esmm_loss(scores.logits, batch.labels).sum() + click_losses(scores.click_logits, batch.labels).sum()
    return clicks / max(batch.candidates, 1) + scores.auxiliary


@pytest.mark.parametrize("blocks", BLOCKS)
def test_it_learns_and_is_exported(config_of: ConfigOf, coded: Path, tmp_path: Path, scalars: Scalars, blocks: str):
    steps = ("loader.requests=16", "training.max_steps=60", "training.log_every=10", "training.validation_split=null")
    train(config_of(*options_of(coded, BLOCKS[blocks], *steps)), tmp_path / "run")
    found = scalars(tmp_path / "run")
    losses = list(found["loss/ctr"].values())
    assert losses[-1] < 0.95 * losses[0]
    assert (found["loss/auxiliary"][10] > 0) == (blocks in WITH_LOSS)
    assert export(tmp_path / "run", tmp_path / "export", requests=300) <= 1e-5
    if blocks in TOGETHER:
        inputs = inputs_of(batches_of(Run(tmp_path / "run").config)[0])
        answered_elsewhere(tmp_path / "requests.pt", (tmp_path / "export" / "ranker.pt", inputs))


def logits_of(config: TrainConfig, candidates: int) -> Tensor:
    """An untrained model's for the first candidates of the test split."""
    data = Dataset(config.dataset)
    spec = resolve(config.features, data.manifest)
    model, found = built(config).eval(), torch.zeros(0, 2)
    for batch in scoring_loader(config, data, "test", selection_of(config, data, spec), ALONE).batches():
        found = torch.cat([found, model(batch).logits.detach()])
        if len(found) >= candidates:
            break
    return found[:candidates]


@pytest.mark.parametrize("blocks", TOGETHER)
def test_a_request_alone_scores_as_in_a_batch(config_of: ConfigOf, coded: Path, blocks: str):
    options = options_of(coded, BLOCKS[blocks], "tables.init_scale=1")
    together = logits_of(config_of(*options, "loader.requests=64"), 8 * 64)
    alone = logits_of(config_of(*options, "loader.requests=1"), 8 * 64)
    assert together.std() > 0.05  # far above what is compared
    torch.testing.assert_close(alone, together, rtol=0, atol=5e-6)


@pytest.mark.parametrize("blocks", [UXSID, HISAC, HYTREC, NEXT, *METHODS.values()])
def test_a_batch_without_events_and_candidates_gives_the_same_parameters_a_gradient(
    config_of: ConfigOf, coded: Path, blocks: str
):
    """Ranks average gradients parameter by parameter: one that has run out of requests must bring as many, all 0."""
    # TorchRec's unsharded pooled tables cannot look up for no candidates at all, its sharded ones can
    config = config_of(*options_of(coded, blocks), "features.candidate=[]", "features.dense=[]")
    some, empty = batches_of(config)
    given: list[set[str]] = []
    for batch in (some, empty):
        model = built(config)
        loss_of(model, batch).backward()
        given.append({name for name, p in model.dense.named_parameters() if p.grad is not None})
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert given[0] == given[1]
    assert any(name.startswith("long.") for name in given[0])
    assert not any(p.grad.any() for p in model.dense.parameters() if p.grad is not None)


@pytest.mark.parametrize("blocks", [UXSID, HISAC, HYTREC, NEXT, *METHODS.values()])
def test_products_in_bfloat16_are_near(config_of: ConfigOf, coded: Path, blocks: str):
    """Scores and gradients under autocast, with events and without."""
    config = config_of(*options_of(coded, blocks), "features.candidate=[]", "features.dense=[]")
    for batch, empty in zip(batches_of(config), (False, True), strict=True):
        logits: list[Tensor] = []
        gradients: list[Tensor] = []
        for coarse in (False, True):
            model = built(config).train()
            with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
                logits.append(model(batch).logits.float())
                loss = loss_of(model, batch)
            loss.backward()
            parameters = [p for p in model.dense.parameters() if p.requires_grad]
            gradients.append(
                torch.cat([(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten() for p in parameters])
            )
        assert gradients[1].dtype == torch.float32
        assert bool(gradients[1].isfinite().all())
        if not empty:
            assert (logits[1] - logits[0]).abs().max() < 0.02 * (1 + logits[0].abs().max())
            cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
            assert cosine > 0.9


@pytest.mark.parametrize("blocks", TOGETHER)
def test_requests_without_events_score_as_by_themselves(config_of: ConfigOf, coded: Path, blocks: str):
    """Every window emptied: finite scores, the same whatever was in it."""
    config = config_of(*options_of(coded, BLOCKS[blocks], "tables.init_scale=1"))
    batch = batches_of(config)[0]
    model = built(config).eval()
    before = model(batch._replace(end=batch.start)).logits
    other = batch._replace(end=batch.start, event_time=batch.event_time // 2, event_codes=batch.event_codes * 0)
    assert bool(before.isfinite().all())
    assert torch.equal(model(other).logits, before)


def anchors_gradient(config_of: ConfigOf, root: Path, weight: float) -> Tensor:
    config = config_of(*options_of(root, UXSID), f"model.long[0].ortho_weight={weight}")
    model = built(config)
    loss_of(model, batches_of(config)[0]).backward()
    found = model.dense.long[0].block.compress.anchors.grad  # type: ignore[union-attr]
    assert isinstance(found, Tensor)
    return found


def test_the_auxiliary_loss_is_trained_on_with_its_weight(config_of: ConfigOf, coded: Path):
    without, once, twice = (anchors_gradient(config_of, coded, weight) for weight in (0.0, 1.0, 2.0))
    assert (once - without).abs().max() > 1e-6
    torch.testing.assert_close(twice - without, 2 * (once - without), rtol=1e-3, atol=1e-7)


def test_compressors_are_what_a_store_can_keep(config_of: ConfigOf):
    """All but target attention and the searches; UxSID has a record for each probe."""
    blocks = config_of(f"model.long=[{{type: mean}}, {ALL}, {', '.join(METHODS.values())}]").model.long
    others = [block.type for block in blocks if not compresses(block)]
    assert others == list(SEARCHES)
    assert not compresses(config_of("model.long=[{type: target_attention}]").model.long[0])
    assert [block.type for block in blocks if per_probe(block)] == ["uxsid"]


def test_auxiliary_losses_are_of_training_alone(config_of: ConfigOf, coded: Path):
    config = config_of(*options_of(coded, f"{UXSID}, {NEXT}"))
    batch, model = batches_of(config)[0], built(config)
    both = model.train()(batch).auxiliary
    assert float(model.eval()(batch).auxiliary) == 0
    single = [built(config_of(*options_of(coded, block))).train() for block in (UXSID, NEXT)]
    assert all(float(one(batch).auxiliary) > 0 for one in single)
    assert float(both) > 0


def test_the_short_way_for_few_candidates_is_of_training_alone(
    config_of: ConfigOf, coded: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(*options_of(coded, "{type: sdim, hashes: 16, bits: 6}"))  # 1,024 buckets a request
    batch, model = batches_of(config)[0], built(config)
    ways: list[str] = []
    read_few, encode = SDIM.read_few, SDIM.encode
    monkeypatch.setattr(SDIM, "read_few", lambda *of: (ways.append("few"), read_few(*of))[1])
    monkeypatch.setattr(SDIM, "encode", lambda *of: (ways.append("all"), encode(*of))[1])
    trained, evaluated = model.train()(batch), model.eval()(batch)
    assert ways == ["few", "all"]
    torch.testing.assert_close(trained.logits, evaluated.logits, rtol=0, atol=1e-5)


def test_a_blocks_own_prediction_of_clicks_is_of_training_alone(config_of: ConfigOf, coded: Path):
    """As many as there are blocks that predict; evaluation has none, and the same scores."""
    soft = SEARCHES["sim_soft"]
    config = config_of(*options_of(coded, f"{soft}, {SEARCHES['eta']}, {soft}"))
    batch, model = batches_of(config)[0], built(config)
    trained, evaluated = model.train()(batch), model.eval()(batch)
    assert trained.click_logits.shape == (batch.candidates, len(config.search_weights)) == (batch.candidates, 2)
    assert evaluated.click_logits.shape == (batch.candidates, 0)
    torch.testing.assert_close(trained.logits, evaluated.logits, rtol=0, atol=0)


def test_a_search_unit_is_trained_by_its_own_loss_with_its_weight(
    config_of: ConfigOf, coded: Path, tmp_path: Path, scalars: Scalars
):
    """The auxiliary loss of the first step is the mean entropy of clicks, log 2 to begin with, times the weight."""
    steps = (
        "training.max_steps=1",
        "training.log_every=1",
        "training.validation_split=null",
        "tables.init_scale=0.001",
    )
    losses: list[float] = []
    for weight in ("0.5", "2"):
        block = SEARCHES["sim_soft"].replace("}", f", search_weight: {weight}}}")
        train(config_of(*options_of(coded, block, *steps)), tmp_path / weight)
        losses.append(scalars(tmp_path / weight)["loss/auxiliary"][1] / float(weight))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(math.log(2), abs=0.25)


def test_resuming_is_as_if_never_interrupted(config_of: ConfigOf, coded: Path, tmp_path: Path, read_checkpoint: Read):
    options = options_of(coded, UXSID, "training.validation_split=null", "training.checkpoint_every=4")
    train(config_of(*options, "training.max_steps=8"), tmp_path / "whole")
    train(config_of(*options, "training.max_steps=4"), tmp_path / "cut")
    train(config_of(*options, "training.max_steps=8"), tmp_path / "cut", resume=True)
    whole, cut = (read_checkpoint(Run(tmp_path / name).checkpoints()[-1]) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert any("anchors" in name for name in whole)
    for name, value in whole.items():
        assert torch.equal(cut[name], value), name


def test_codewords_are_kept_with_the_state_and_not_trained(config_of: ConfigOf, coded: Path):
    config = config_of(*options_of(coded, HISAC))
    model = built(config)
    levels = [torch.from_numpy(words) for words in Dataset(coded).codewords("sid")]
    words = torch.cat([torch.cat([torch.zeros_like(level[:1]), level]) for level in levels])
    assert torch.equal(model.state_dict()["dense.long.0.block.codewords"], words)
    assert not any("codewords" in name for name, _ in model.named_parameters())


REFUSED_BY_THE_DATA = {
    "a probe that is no code": (
        UXSID,
        "features.codes=[item.sid_2]",
        r"model.long\[0\].probe: 'item.sid_1' is not in features.codes, which has item.sid_2; add it there",
    ),
    "a probe without an embedding": (
        f"{{type: mean}}, {UXSID}",
        "features.sequence=[item, item.category]",
        r"model.long\[1\].probe: 'item.sid_1' is not in features.sequence, which has item, item.category; add it there",
    ),
    "keys of no feature": (
        "{type: hytrec, key: item.sid_1}",
        "features.sequence=[item, item.category]",
        r"model.long\[0\].key: 'item.sid_1' is not in features.sequence, which has item, item.category; add it there",
    ),
    "slots of no code": (
        "{type: hytrec, slots: [item.sid_1]}",
        "features.codes=[item.sid_2]",
        r"model.long\[0\].slots: 'item.sid_1' is not in features.codes, which has item.sid_2; add it there",
    ),
    "more slots than heads": (
        "{type: hytrec, width: 8, heads: 1, slots: [item.sid_1, item.sid_1]}",
        "features.codes=[item.sid_1, item.sid_2]",
        r"model.long\[0\]: code_heads: 2; must be of 0 to 1, the heads: raise heads",
    ),
    "keys wider than token states": (
        "{type: hytrec, key: item.sid_1, width: 4, heads: 1}",
        "features.codes=[]",
        r"model.long\[0\]: width: 4; must be above that of what keys start from \(8\): raise width",
    ),
    "a search's probe that is no code": (
        SEARCHES["sim_hard"],
        "features.codes=[item.sid_2]",
        r"model.long\[0\].probe: 'item.sid_1' is not in features.codes, which has item.sid_2; add it there",
    ),
    "blocks of channels that do not divide the width": (
        f"{SEARCHES['eta']}, {{type: mirrn, blocks: 3}}",
        "features.codes=[]",
        r"model.long\[1\]: blocks: 3; must divide the width of an event \(16\)",
    ),
    "no codes at all": (
        UXSID,
        "features.codes=[]",
        r"model.long\[0\].probe: 'item.sid_1' is not in features.codes, which has nothing",
    ),
    "another codebook": (
        HISAC.replace("}", ", codebook: words}"),
        "features.codes=[item.sid_1, item.sid_2]",
        r"no semantic IDs 'words'; it has sid: run `ranker sids apply",
    ),
    "a level missing": (
        HISAC,
        "features.codes=[item.sid_1]",
        r"model.long\[0\].codebook: 'sid' needs item.sid_2 in features.codes, which has item.sid_1; add what is",
    ),
    "keep of one level": (
        "{type: hisac, keep: [9]}",
        "features.codes=[item.sid_1, item.sid_2]",
        r"model.long\[0\].keep: \[9\] has 1 numbers, the codebook 'sid' has 2 levels; give one for each",
    ),
}


@pytest.mark.parametrize("case", REFUSED_BY_THE_DATA)
def test_what_does_not_fit_the_dataset_is_refused_by_its_key(
    config_of: ConfigOf, coded: Path, tmp_path: Path, case: str
):
    blocks, features, message = REFUSED_BY_THE_DATA[case]
    with pytest.raises(UserError, match=message):
        train(config_of(*options_of(coded, blocks, features)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


REFUSED_AT_LOAD = {
    "{type: uxsid, width: 8, anchors: 9, heads: 1}": (
        r"model.long\[0\].anchors: got 9; must be at most width \(8\), or no anchors' interests could be orthogonal"
    ),
    "{type: uxsid, width: 9, anchors: 9}": r"model.long\[0\].heads: got 2; must divide width \(9\)",
    "{type: mean}, {type: hytrec, width: 9}": r"model.long\[1\].heads: got 2; must divide width \(9\)",
    "{type: uxsid, global_probe: false, local_probe: false}": (
        r"model.long\[0\].local_probe: got False; global_probe is off too, .* turn one on"
    ),
    "{type: uxsid, ortho: column}": r"model.long\[0\].ortho: got 'column'; .*allowed: 'frobenius' or 'row'",
    "{type: hisac, keep: [0, 1]}": r"model.long\[0\].keep\[0\]: got 0; must be greater than or equal to 1",
    "{type: sim_hard}": r"model.long\[0\].probe: this key is missing",
    "{type: sim_soft, search_weight: 0}": r"model.long\[0\].search_weight: got 0; must be greater than 0",
    "{type: twin, head_dim: 1}": r"model.long\[0\].head_dim: got 1; must be greater than or equal to 2",
    "{type: eta, top: 0}": r"model.long\[0\].top: got 0; must be greater than or equal to 1",
    "{type: cformer, width: 8, queries: 9}": (
        r"model.long\[0\].queries: got 9; must be at most width \(8\), or no slots could be orthogonal"
    ),
    "{type: vql, periods_s: [0]}": r"model.long\[0\].periods_s\[0\]: got 0; must be greater than 0",
    "{type: sdim, bits: 11}": r"model.long\[0\].bits: got 11; must be less than or equal to 10",
    "{type: longer, width: 9}": r"model.long\[0\].heads: got 2; must divide width \(9\)",
    "{type: hstu, width: 4, heads: 4}": r"model.long\[0\].heads: got 4; must leave at least 2 of width \(4\) to each",
    "{type: elastic, pool: 7}": r"model.long\[0\].retrieve: got 8; must be at most pool \(7\)",
    "{type: sasrec, length: 0}": (
        r"model.long\[0\].positions: got 'learned'; needs a limit on the length; set length, or positions: sinusoidal"
    ),
    "{type: uxsd}": r"model.long\[0\].type: got 'uxsd'; did you mean 'uxsid'\? allowed: ",
}


@pytest.mark.parametrize("blocks", REFUSED_AT_LOAD)
def test_what_cannot_work_is_refused_when_the_config_is_read(config_of: ConfigOf, blocks: str):
    with pytest.raises(ConfigError, match=REFUSED_AT_LOAD[blocks]):
        config_of(f"model.long=[{blocks}]")


def test_without_anchors_their_number_does_not_matter(config_of: ConfigOf):
    config = config_of("model.long=[{type: uxsid, width: 8, anchors: 16, local_probe: false}]")
    assert config.history_length == 0


@pytest.mark.parametrize("dataset", ["ml1m", "ebnerd", "kuairand", "synthetic"])
@pytest.mark.parametrize("name", ["uxsid", "hisac", "hytrec", "all_three", *METHODS])
def test_the_configs_load(monkeypatch: pytest.MonkeyPatch, dataset: str, name: str):
    monkeypatch.setenv("RANKER_DATA", "/data")
    config = load_config(CONFIGS / dataset / f"{name}.yaml", TrainConfig)
    expected = ["uxsid", "hisac", "hytrec"] if name == "all_three" else [name]
    assert [block.type for block in config.model.long] == expected
    assert config.model.short is not None
    assert config.name == f"{dataset}-{name.replace('_', '-')}"
