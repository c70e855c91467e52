"""Reading a model directory: only the tensors of the asked blocks, and a clear refusal of everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig

from shoal.compute import selfcheck
from shoal.compute.families import SPLIT, random_model
from shoal.compute.selfcheck import Chain
from shoal.compute.split import Stage, build_ends, build_stage
from shoal.compute.weights import INDEX_FILE, SINGLE_FILE, Checkpoint, fetch_model, read_config
from shoal.errors import CannotSplit, ModelError, UsageError
from shoal.spec.ids import BlockRange

PARTS = [BlockRange(0, 2), BlockRange(2, 5), BlockRange(5, 6)]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    from shoal.compute.device import quiet_libraries

    quiet_libraries()


def save(family: str, folder: Path, *, shard: str = "60KB", tied: bool = False) -> None:
    model = random_model(family)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder, max_shard_size=shard)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save("llama", folder)
    return folder


@pytest.fixture
def llama(sharded: Path, tmp_path: Path) -> Path:
    """A copy of a sharded model that a test may damage."""
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def own_bytes(stage: Stage) -> int:
    return sum(tensor.nbytes for layer in stage.layers for tensor in layer.parameters())


# Mixtral's checkpoint keeps every expert apart and the model fuses them; GPT-2 and BLOOM have other names on disk.
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "bloom", "gemma2", "deepseek_v3", "qwen3_next", "opt"])
def test_a_model_loaded_in_parts_gives_the_numbers_of_the_whole(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)

    chain = Chain(build_ends(tmp_path), [build_stage(tmp_path, blocks) for blocks in PARTS])

    assert forward_difference(selfcheck.Whole(random_model(family)), chain) == 0.0


def forward_difference(whole: selfcheck.Whole, chain: Chain) -> float:
    """Without gradients: those go to the embedding of the whole model, which a loaded chain does not share."""
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return max(
            compare(whole, chain, ids)
            for compare in (selfcheck.prefill_difference, selfcheck.decode_difference, selfcheck.padding_difference)
        )


# DeepSeek keeps the bias of its router in fp32 whatever the model's precision.
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v3"])
def test_in_bf16_too_the_parts_give_the_numbers_of_the_whole(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    whole = selfcheck.Whole(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval())
    stages = [build_stage(tmp_path, blocks, dtype=torch.bfloat16) for blocks in PARTS]
    chain = Chain(build_ends(tmp_path, dtype=torch.bfloat16), stages)

    assert {stage.dtype for stage in stages} == {torch.bfloat16}
    assert forward_difference(whole, chain) == 0.0


def test_a_stage_reads_exactly_the_bytes_of_its_blocks(sharded: Path) -> None:
    stages = [build_stage(sharded, blocks) for blocks in PARTS]

    assert [stage.bytes_read for stage in stages] == [own_bytes(stage) for stage in stages]
    assert stages[0].bytes_read * 3 == stages[1].bytes_read * 2 == stages[2].bytes_read * 6


def test_only_the_shards_that_hold_the_blocks_are_opened(llama: Path) -> None:
    needed = {
        file for name, file in json.loads((llama / INDEX_FILE).read_text())["weight_map"].items() if "layers.3." in name
    }
    for shard in llama.glob("*.safetensors"):
        if shard.name not in needed:
            shard.unlink()

    assert build_stage(llama, BlockRange(3, 4)).blocks == BlockRange(3, 4)


def test_the_ends_read_embedding_norm_and_head_only(sharded: Path) -> None:
    ends = build_ends(sharded)

    assert ends.bytes_read == 4 * (2 * ends.vocab_size * ends.hidden_size + ends.hidden_size)


def test_a_tied_head_is_the_embedding_and_is_read_once(tmp_path: Path) -> None:
    save("llama", tmp_path, tied=True)

    ends = build_ends(tmp_path)
    hidden = torch.randn(1, 2, ends.hidden_size, generator=torch.Generator().manual_seed(3))

    assert ends.bytes_read == 4 * (ends.vocab_size * ends.hidden_size + ends.hidden_size)
    assert bool(ends.logits(hidden).isfinite().all())


def test_a_single_file_model_loads_like_a_sharded_one(sharded: Path, tmp_path: Path) -> None:
    save("llama", tmp_path, shard="1GB")
    assert (tmp_path / SINGLE_FILE).exists()
    hidden = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(4)[None]

    one, other = (build_stage(folder, BlockRange(2, 5)) for folder in (tmp_path, sharded))

    assert torch.equal(one(hidden, position_ids=positions), other(hidden, position_ids=positions))
    assert one.bytes_read == own_bytes(one)


def test_weights_arrive_in_the_asked_precision(sharded: Path) -> None:
    stage = build_stage(sharded, BlockRange(0, 1), dtype=torch.bfloat16)

    assert stage.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in stage.layers[0].parameters()} == {torch.bfloat16}


def test_weights_a_server_does_not_host_take_no_memory(sharded: Path) -> None:
    stage = build_stage(sharded, BlockRange(2, 3))

    embedding = stage.model.get_input_embeddings().weight
    assert embedding.untyped_storage().nbytes() == embedding.element_size()
    assert bool(embedding.isnan().all())


def pickle_only(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX_FILE]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not opened by anyone")


def no_weights(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX_FILE]:
        file.unlink()


def no_index(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()


def torn_index(folder: Path) -> None:
    (folder / INDEX_FILE).write_text('{"weight_map": {"model.embed_tokens')


def index_leaves_the_directory(folder: Path) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": "../other/model.safetensors"}}))


def index_names_pickle(folder: Path) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": "pytorch_model.bin"}}))


def lost_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[3].unlink()


def torn_shard(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-100])


def lost_embedding(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    del index["weight_map"]["model.embed_tokens.weight"], index["weight_map"]["lm_head.weight"]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    change_config(folder, tie_word_embeddings=True)


def lost_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    del index["weight_map"]["model.layers.3.mlp.up_proj.weight"]
    (folder / INDEX_FILE).write_text(json.dumps(index))


def index_promises_too_much(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    shard = folder / index["model.layers.3.mlp.up_proj.weight"]
    tensors = load_file(shard)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, shard)


def other_shape(folder: Path) -> None:
    change_config(folder, intermediate_size=32)


def unknown_family(folder: Path) -> None:
    change_config(folder, model_type="llama_of_next_year")


def not_a_text_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))


def no_family(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def torn_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def quantised(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq"})


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("damage", "says", "hint"),
    [
        (pickle_only, "pickle", "save_pretrained"),
        (no_weights, "no safetensors weights", "model.safetensors"),
        (no_index, "neither model.safetensors nor", "index"),
        (torn_index, "Cannot read the weight index", "again"),
        (index_leaves_the_directory, "does not map tensor names to files beside it", "again"),
        (index_names_pickle, "safetensors only", "save_pretrained"),
        (lost_shard, "is missing", "again"),
        (torn_shard, "is broken", "again"),
        (lost_tensor, "model.layers.3.mlp.up_proj.weight", "incomplete"),
        (index_promises_too_much, "model.layers.3.mlp.up_proj.weight", "belong together"),
        (other_shape, "config.json asks for (64, 32)", "belong together"),
        (unknown_family, "llama_of_next_year", "unknown to this version"),
        (not_a_text_model, "not a text-generating decoder", "AutoModelForCausalLM"),
        (no_family, "no model_type", "transformers"),
        (torn_config, "Cannot read", "again"),
        (no_config, "no config.json", "config.json"),
        (quantised, "quantised (gptq)", "unquantised"),
    ],
)
def test_a_directory_that_cannot_be_used_is_refused_with_a_way_out(
    damage: Callable[[Path], None], says: str, hint: str, llama: Path
) -> None:
    damage(llama)

    with pytest.raises(ModelError) as caught:
        build_stage(llama, BlockRange(0, 6))

    assert says in str(caught.value)
    assert hint in caught.value.hint


def test_ends_without_embedding_and_head_are_refused(llama: Path) -> None:
    lost_embedding(llama)

    with pytest.raises(ModelError, match=r"missing from the weights .* the first is lm_head.weight"):
        build_ends(llama)


def test_loaded_weights_are_frozen(sharded: Path) -> None:
    stage = build_stage(sharded, BlockRange(0, 1))

    assert not any(parameter.requires_grad for parameter in stage.model.parameters())


def test_code_in_a_model_directory_is_never_run(llama: Path) -> None:
    marker = llama / "was_run"
    (llama / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    change_config(llama, model_type="own", auto_map={"AutoConfig": "modeling_own.Own"})

    with pytest.raises(ModelError, match="own"):
        read_config(llama)

    assert not marker.exists()


def test_blocks_outside_the_model_are_a_usage_error(sharded: Path) -> None:
    with pytest.raises(UsageError, match=r"Blocks 4:7 lie outside the model, which has 6 blocks"):
        build_stage(sharded, BlockRange(4, 7))


def test_a_family_that_cannot_be_cut_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    BertConfig(architectures=["BertLMHeadModel"]).save_pretrained(tmp_path)

    with pytest.raises(CannotSplit, match="both directions"):
        build_stage(tmp_path, BlockRange(0, 1))


def test_an_unlisted_family_is_checked_on_the_spot(tmp_path: Path) -> None:
    save_unlisted("hyperclovax", tmp_path)

    assert build_stage(tmp_path, BlockRange(0, 3)).blocks == BlockRange(0, 3)


def test_an_unlisted_family_that_fails_the_check_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_unlisted("hyperclovax", tmp_path)
    monkeypatch.setattr(selfcheck, "measure", lambda *_: selfcheck.Differences(0.0, 0.5, 0.0, 0.0))

    with pytest.raises(CannotSplit, match=r"gives other results when it is cut \(largest difference 5.0e-01\)"):
        build_stage(tmp_path, BlockRange(0, 3))


def save_unlisted(family: str, folder: Path) -> None:
    assert family not in SPLIT
    save(family, folder)


def test_a_local_directory_is_used_as_it_is(sharded: Path) -> None:
    assert fetch_model(sharded) == sharded


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="is not a model directory"):
        fetch_model(name)


def test_a_hub_model_that_cannot_be_reached_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match="Cannot fetch the model 'nobody/nothing'") as caught:
        fetch_model("nobody/nothing")

    assert "network" in caught.value.hint


def test_from_the_hub_only_the_needed_files_are_fetched(monkeypatch: pytest.MonkeyPatch, sharded: Path) -> None:
    from fnmatch import fnmatch

    from shoal.compute import weights

    asked: list[str] = []
    monkeypatch.setattr(weights, "hf_hub_download", lambda repository, file: str(sharded / file))
    monkeypatch.setattr(
        weights, "snapshot_download", lambda repository, allow_patterns: asked.extend(allow_patterns) or str(sharded)
    )

    assert fetch_model("somebody/llama") == sharded

    def fetched(file: str) -> bool:
        return any(fnmatch(file, pattern) for pattern in asked)

    assert all(fetched(file.name) for file in sharded.iterdir())
    assert fetched("tokenizer.json")
    for unwanted in ("pytorch_model.bin", "modeling_own.py", "consolidated.safetensors", "original/params.json.bin"):
        assert not fetched(unwanted)


def test_bytes_are_counted_where_they_are_read(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    name = "model.layers.0.mlp.up_proj.weight"

    tensor = checkpoint.read(name)

    assert checkpoint.bytes_read == tensor.nbytes == 64 * 64 * 4
