"""Settings: typed, checked, refused by name."""
import dataclasses
import math

import pytest

import train_gpt as tg

RECORD = dict(  # what the best clean records changed, beside the reference's own
    matrix_lr=0.026, warmdown_frac=0.85, min_lr=0.1, beta2=0.99, gptq_reserve_seconds=4.0, gptq_calibration_batches=16,
    val_loss_every=0,
    ttt_lora_rank=80, ttt_beta2=0.99, vocab_size=8192, num_layers=11, model_dim=512, num_heads=8, num_kv_heads=4,
    train_batch_tokens=786_432, train_seq_len=2048, max_wallclock_seconds=600.0, ema_decay=0.9965, enable_looping_at=0.35)


def test_defaults_are_the_record():
    cfg = tg.Config.from_env({})
    assert {name: getattr(cfg, name) for name in RECORD} == RECORD
    assert cfg == tg.Config() and cfg.head_dim == 64 and cfg.kv_dim == 256 and cfg.mlp_dim == 2048


def test_model_has_the_published_size():
    cfg, shapes = tg.Config(), {}
    with tg.torch.device("meta"):
        L, D = cfg.num_layers, cfg.model_dim
        shapes = dict(embed=8192 * D, qo=2 * L * D * D, kv=2 * L * 256 * D, up=L * 2048 * D, down=L * 2048 * D)
    assert round(sum(shapes.values()) / 1e6, 1) == 35.9


def test_environment_overrides_are_typed():
    cfg = tg.Config.from_env({"SEED": "7", "MATRIX_LR": "1e-2", "TTT_ENABLED": "0", "RUN_ID": "x", "HOME": "/", "BETA1": "", "MODEL_DIR": "/", "SEEDS": "3"})
    assert (cfg.seed, cfg.matrix_lr, cfg.ttt_enabled, cfg.run_id, cfg.beta1) == (7, 0.01, False, "x", 0.9)
    assert [type(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)] == [type(f.default) for f in dataclasses.fields(cfg)]


def test_any_variable_overrides_the_preset():
    smoke = tg.Config.from_env({"PRESET": "smoke"})
    assert smoke.model_dim < 512 and smoke.data_dir == "data/smoke"
    assert tg.Config.from_env({"PRESET": "smoke", "MODEL_DIM": "64"}) == dataclasses.replace(smoke, model_dim=64)


def test_an_empty_variable_is_unset():
    assert tg.Config.from_env({"PRESET": "smoke", "DATA_DIR": "", "MODEL_DIM": ""}) == tg.Config.from_env({"PRESET": "smoke"})


def test_a_saved_model_goes_before_the_preset_and_after_the_environment():
    saved = tg.Config(matrix_lr=0.5, ttt_enabled=False, num_layers=9, model_dim=128).to_save()
    cfg = tg.Config.from_env({"PRESET": "smoke", "MATRIX_LR": "0.25"}, saved)
    assert (cfg.matrix_lr, cfg.ttt_enabled, cfg.num_layers, cfg.model_dim) == (0.25, False, 9, 128)
    assert cfg.data_dir == "data/smoke" and not set(saved) & set(tg.LOCAL_SETTINGS)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tg.Config().seed = 1


@pytest.mark.parametrize("name", [name for names in tg.DROPPED.values() for name in names.split()])
def test_dropped_settings_are_refused(name):
    with pytest.raises(tg.UserError, match=f"^{name} is not a setting"):
        tg.Config.from_env({name: "1"})


def test_dropped_settings_are_those_of_the_specification():
    expected = """EMBEDDING_DIM TIE_EMBEDDINGS EMBED_LR HEAD_LR XSA_LAST_N SKIP_GATES_ENABLED LN_SCALE ROPE_TRAIN_SEQ_LEN ROPE_YARN
    PARALLEL_FINAL_LANE MUON_ROW_NORMALIZE MUON_BETA2 SLIDING_WINDOW_ENABLED EVAL_STRIDE TTT_OPTIMIZER TTT_BETA1 TTT_GRAD_STEPS
    TTT_K_LORA TTT_MLP_LORA TTT_O_LORA TTT_EVAL_BATCHES TTT_OUTPUT_DIR COMPRESSOR CONTROL_TENSOR_NAME_PATTERNS""".split()
    expected += """MATRIX_BITS EMBED_BITS MATRIX_CLIP_SIGMAS ATTN_CLIP_SIGMAS MLP_CLIP_SIGMAS EMBED_CLIP_SIGMAS""".split()  # and useless since
    assert sorted(" ".join(tg.DROPPED.values()).split()) == sorted(expected)


@pytest.mark.parametrize("env", [
    {"SEED": "x"}, {"SEED": "1.5"}, {"SEED": "-1"}, {"MATRIX_LR": "fast"}, {"MATRIX_LR": "nan"}, {"MATRIX_LR": "inf"},
    {"MATRIX_LR": "-1"}, {"TTT_ENABLED": "maybe"}, {"TTT_ENABLED": "2"}, {"PRESET": "big"}, {"ATTENTION": "magic"},
    {"TTT_SITES": "qkv,o"}, {"TTT_SITES": " "}, {"TTT_SITES": "head,qkv"}, {"TTT_SITES": "qkv,qkv"}, {"TTT_SITES": "qkv head"}, {"TTT_LORA_RNAK": "8"}, {"MATRIX_LRR": "1"}, {"MATRIXLR": "1"}, {"matrix_lr": "1"}, {"ITERATION": "1"}, {"LOGIT_SOFTCAP": "50"}, {"GPTQ_BATCHES": "8"}, {"MODEL_DIM": "500"}, {"NUM_HEADS": "6"}, {"NUM_KV_HEADS": "3"},
    {"ROPE_DIMS": "15"}, {"ROPE_DIMS": "128"}, {"MLP_MULT": "0.001"}, {"LOOP_START": "6"}, {"LOOP_END": "8"},
    {"NUM_LAYERS": "5"}, {"TRAIN_BATCH_TOKENS": "786433"}, {"TRAIN_SEQ_LEN": "98305"}, {"TRAIN_SEQ_LEN": "0"},
    {"VAL_BATCH_TOKENS": "1024"}, {"TTT_CHUNK_SIZE": "4096"}, {"GPTQ_RESERVE_SECONDS": "600"}, {"MATRIX_BITS": "9"},
    {"VAL_DOC_FRACTION": "0"}, {"VAL_DOC_FRACTION": "1.5"}, {"ENABLE_LOOPING_AT": "2"}, {"EMA_DECAY": "1"},
    {"ITERATIONS": "0"}, {"WARMUP_STEPS": "0"}, {"VOCAB_SIZE": "70000"}, {"TTT_LORA_RANK": "0"}, {"BETA2": "1"},
], ids=lambda env: "=".join(*env.items()))
def test_impossible_values_name_their_variable(env):
    with pytest.raises(tg.UserError) as info:
        tg.Config.from_env(env)
    (name,) = env
    assert name in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32])
def test_any_world_that_divides_the_batch_trains(world):
    cfg = tg.Config()
    count, tokens = tg.split_step(cfg, world)
    assert count * tokens * world == cfg.train_batch_tokens
    assert tokens <= cfg.train_batch_tokens // 8, "no more memory than with 8 ranks"
    assert tokens == 98_304 or world not in (1, 2, 4, 8), "1, 2, 4 and 8 ranks see the same buffers"


@pytest.mark.parametrize("world", [5, 7, 9])
def test_other_worlds_are_refused_with_the_sizes_that_fit(world):
    with pytest.raises(tg.UserError, match="may be 1, 2, 3, 4, 6, 8, 12, 16"):
        tg.split_step(tg.Config(), world)


def test_too_many_ranks_for_the_span_length():
    with pytest.raises(tg.UserError, match="TRAIN_BATCH_TOKENS.*TRAIN_SEQ_LEN"):
        tg.split_step(tg.Config(train_batch_tokens=16_384), 64)


def test_deal_is_balanced_and_in_order():
    costs = [7, 1, 1, 1, 1, 1, 1, 1, 5, 5]
    owner = tg.deal(costs, 2)
    assert owner.tolist() == tg.deal(costs, 2).tolist() and set(owner) == {0, 1}
    loads = [sum(c for c, o in zip(costs, owner) if o == r) for r in (0, 1)]
    assert abs(loads[0] - loads[1]) <= max(costs)
    assert tg.deal(costs, 1).tolist() == [0] * 10 and math.prod(tg.deal([], 3).shape) == 0
