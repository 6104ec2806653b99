"""Settings: typed, checked, refused by name; and how a step is split over ranks."""
import dataclasses
import re

import pytest

import train_gpt as tg

pytestmark = pytest.mark.check

RECORD = dict(  # what the best clean records changed, or kept of the reference's; heads are this script's own
    matrix_lr=0.026, warmdown_frac=0.85, min_lr=0.1, beta2=0.99, gptq_reserve_seconds=4.0,
    gptq_calibration_batches=16, val_loss_every=0, ttt_lora_rank=80, ttt_beta2=0.99, vocab_size=8192,
    num_layers=11, model_dim=512, num_heads=4, num_kv_heads=2, train_batch_tokens=786_432, train_seq_len=3072,
    max_wallclock_seconds=600.0, ema_decay=0.9965, enable_looping_at=0.35)


def test_defaults_are_the_record():
    cfg = tg.Config.from_env({})
    assert {name: getattr(cfg, name) for name in RECORD} == RECORD
    assert cfg == tg.Config() and cfg.head_dim == 128 and cfg.kv_dim == 256 and cfg.mlp_dim == 2048


def test_model_has_the_published_size(monkeypatch):
    monkeypatch.setattr(tg.GPT, "init_weights", lambda self: None)
    with tg.torch.device("meta"):
        model = tg.GPT(tg.Config())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 35.9


def test_environment_overrides_are_typed():
    cfg = tg.Config.from_env({
        "SEED": "7", "MATRIX_LR": "1e-2", "TTT_ENABLED": "0", "RUN_ID": "x", "BETA1": "",
        "HOME": "/", "MODEL_DIR": "/", "SEEDS": "3"})  # these three are no settings
    assert (cfg.seed, cfg.matrix_lr, cfg.ttt_enabled, cfg.run_id, cfg.beta1) == (7, 0.01, False, "x", 0.9)
    for field in dataclasses.fields(cfg):
        assert type(getattr(cfg, field.name)) is type(field.default)


def test_any_variable_overrides_the_preset():
    smoke = tg.Config.from_env({"PRESET": "smoke"})
    assert smoke.model_dim < 512 and smoke.data_dir == "data/smoke-v3"
    wider = tg.Config.from_env({"PRESET": "smoke", "MODEL_DIM": "128"})
    assert wider == dataclasses.replace(smoke, model_dim=128) != smoke


def test_a_preset_compares_changes_at_the_buffers_of_a_record():
    cfg = tg.Config.from_env({"PRESET": "single_gpu"})
    assert tg.split_step(cfg, 1)[1] == tg.split_step(tg.Config(), 8)[1]
    assert (cfg.model_dim, cfg.max_wallclock_seconds, cfg.ttt_enabled) == (512, 0, False)


def test_an_empty_variable_is_unset():
    smoke = tg.Config.from_env({"PRESET": "smoke"})
    assert tg.Config.from_env({"PRESET": "smoke", "DATA_DIR": "", "MODEL_DIM": ""}) == smoke


def test_a_model_brings_no_setting_of_a_run():
    """Such as which part of validation counts, which only the user of a script decides."""
    for name in tg.Config.names("run"):
        assert name not in tg.Config().to_save()
        with pytest.raises(tg.UserError, match=f"another version.*: {name}$"):
            tg.Config.from_env({}, {**tg.Config().to_save(), name: getattr(tg.Config(), name)})


def test_a_saved_model_goes_before_the_preset_and_after_the_environment():
    saved = tg.Config(matrix_lr=0.5, ttt_enabled=False, num_layers=9, model_dim=128).to_save()
    cfg = tg.Config.from_env({"PRESET": "smoke", "MATRIX_LR": "0.25"}, saved)
    assert (cfg.matrix_lr, cfg.ttt_enabled, cfg.num_layers, cfg.model_dim) == (0.25, False, 9, 128)
    assert cfg.data_dir == "data/smoke-v3" and not set(saved) & set(tg.Config.names("run"))


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tg.Config().seed = 1


@pytest.mark.parametrize("name", [name for names in tg.DROPPED.values() for name in names.split()])
def test_dropped_settings_are_refused(name):
    with pytest.raises(tg.UserError, match=f"^{name} is not a setting"):
        tg.Config.from_env({name: "1"})


def test_dropped_settings_are_those_of_the_specification():
    specified = """EMBEDDING_DIM TIE_EMBEDDINGS EMBED_LR HEAD_LR XSA_LAST_N SKIP_GATES_ENABLED LN_SCALE
    ROPE_TRAIN_SEQ_LEN ROPE_YARN PARALLEL_FINAL_LANE MUON_ROW_NORMALIZE MUON_BETA2 SLIDING_WINDOW_ENABLED
    EVAL_STRIDE TTT_OPTIMIZER TTT_BETA1 TTT_GRAD_STEPS TTT_K_LORA TTT_MLP_LORA TTT_O_LORA TTT_EVAL_BATCHES
    TTT_OUTPUT_DIR COMPRESSOR CONTROL_TENSOR_NAME_PATTERNS"""
    useless_since = """MATRIX_BITS EMBED_BITS MATRIX_CLIP_SIGMAS ATTN_CLIP_SIGMAS MLP_CLIP_SIGMAS
    EMBED_CLIP_SIGMAS"""
    of_the_challenge = "DATA_PATH TOKENIZER_PATH VAL_BATCH_SIZE WARMDOWN_ITERS"  # of its own train_gpt.py
    dropped = [name for names in tg.DROPPED.values() for name in names.split()]
    assert sorted(dropped) == sorted(f"{specified} {useless_since} {of_the_challenge}".split())


@pytest.mark.parametrize("assignment", [
    # of another type
    "SEED=x", "SEED=1.5", "MATRIX_LR=fast", "MATRIX_LR=nan", "MATRIX_LR=inf", "TTT_ENABLED=maybe",
    "TTT_ENABLED=2",
    # out of range
    "SEED=-1", "MATRIX_LR=-1", "LOGIT_SOFTCAP=50", "TRAIN_SEQ_LEN=0", "VAL_DOC_FRACTION=0",
    "VAL_DOC_FRACTION=1.5", "ENABLE_LOOPING_AT=2", "EMA_DECAY=1", "ITERATIONS=0", "WARMUP_STEPS=0",
    "VOCAB_SIZE=70000", "TTT_LORA_RANK=0", "BETA2=1",
    # none of the choices
    "PRESET=big", "ATTENTION=magic", "TTT_SITES=qkv,o", "TTT_SITES= ", "TTT_SITES=head,qkv",
    "TTT_SITES=qkv,qkv", "TTT_SITES=qkv head",
    # misspelt or dropped
    "TTT_LORA_RNAK=8", "MATRIX_LRR=1", "MATRIXLR=1", "matrix_lr=1", "ITERATION=1", "GPTQ_BATCHES=8",
    "MATRIX_BITS=9",
    # not together with the defaults of others
    "MODEL_DIM=510", "NUM_HEADS=6", "NUM_KV_HEADS=3", "ROPE_DIMS=15", "ROPE_DIMS=130", "MLP_MULT=0.001",
    "LOOP_START=6", "LOOP_END=8", "NUM_LAYERS=5", "TRAIN_BATCH_TOKENS=786433", "TRAIN_SEQ_LEN=98305",
    "TTT_CHUNK_SIZE=4096", "GPTQ_RESERVE_SECONDS=600",
])
def test_impossible_values_name_their_variable(assignment):
    name, value = assignment.split("=")
    with pytest.raises(tg.UserError) as refusal:
        tg.Config.from_env({name: value})
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32])
def test_any_world_that_divides_the_batch_trains(world_size):
    cfg = tg.Config()
    buffers, tokens = tg.split_step(cfg, world_size)
    assert buffers * tokens * world_size == cfg.train_batch_tokens
    assert tokens <= cfg.train_batch_tokens // 8, "no more memory than with 8 ranks"
    assert tokens == 98_304 or world_size not in (1, 2, 4, 8), "1, 2, 4 and 8 ranks see the same buffers"


@pytest.mark.parametrize("world_size", [5, 7, 9])
def test_other_worlds_are_refused_with_the_sizes_that_fit(world_size):
    with pytest.raises(tg.UserError, match="may be 1, 2, 3, 4, 6, 8, 12, 16"):
        tg.split_step(tg.Config(), world_size)


@pytest.mark.parametrize("batch_tokens, world_size", [(24_576, 64), (24_704, 1)])
def test_buffers_hold_a_span_and_a_multiple_of_32_tokens(batch_tokens, world_size):
    with pytest.raises(tg.UserError, match="TRAIN_BATCH_TOKENS.*TRAIN_SEQ_LEN"):
        tg.split_step(tg.Config(train_batch_tokens=batch_tokens), world_size)


def test_assignment_to_ranks_is_balanced_and_repeatable():
    costs = [7, 1, 1, 1, 1, 1, 1, 1, 5, 5]
    owners = tg.assign_balanced(costs, 2).tolist()
    assert owners == tg.assign_balanced(costs, 2).tolist() and set(owners) == {0, 1}
    loads = [0, 0]
    for cost, owner in zip(costs, owners):
        loads[owner] += cost
    assert abs(loads[0] - loads[1]) <= max(costs)
    assert tg.assign_balanced(costs, 1).tolist() == [0] * len(costs), "a single rank has everything"
    assert len(tg.assign_balanced([], 3)) == 0


def test_the_introduction_gives_the_sizes_of_a_record_run():
    cfg = tg.Config()
    sizes = dict(re.findall(r"\b([A-Z])  [a-zA-Z/ ]+ \(([\d,]+)\)", tg.__doc__))
    assert {letter: int(size.replace(",", "")) for letter, size in sizes.items()} == dict(
        T=cfg.train_batch_tokens // cfg.train_buffers, D=cfg.model_dim, H=cfg.num_heads, V=cfg.vocab_size,
        L=cfg.num_layers, M=int(cfg.mlp_mult * cfg.model_dim), K=cfg.num_kv_heads,
        E=cfg.model_dim // cfg.num_heads, R=cfg.rope_dims)
