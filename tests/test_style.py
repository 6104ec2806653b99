"""The style rules that a machine can check, on train_gpt.py."""
import ast
import dataclasses
import re
from pathlib import Path

import train_gpt as tg

PATH = Path(tg.__file__)
SOURCE = PATH.read_text()
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE, feature_version=(3, 10))
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
CONFIG = next(node for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "Config")

KNOBS = """preset seed run_id artifact_dir data_dir eval_only_path save_scores attention vocab_size train_batch_tokens
train_seq_len val_batch_tokens eval_seq_len val_doc_fraction num_layers model_dim num_heads num_kv_heads mlp_mult rope_dims
rope_base qk_gain_init logit_softcap tied_embed_init_std num_loops loop_start loop_end enable_looping_at
parallel_start_layer iterations max_wallclock_seconds warmup_steps warmdown_frac min_lr train_log_every val_loss_every
matrix_lr muon_momentum muon_momentum_warmup_start muon_momentum_warmup_steps muon_backend_steps muon_wd tied_embed_lr
embed_wd scalar_lr adam_wd beta1 beta2 adam_eps grad_clip_norm ema_decay quant_states gptq_calibration_batches gptq_reserve_seconds
ttt_enabled ttt_sites ttt_lora_rank ttt_lora_lr ttt_chunk_size ttt_chunk_growth ttt_eval_seq_len ttt_batch_size ttt_weight_decay ttt_beta2 eval_max_seconds""".split()


def test_length():
    assert len(LINES) <= 2867
    assert not [number for number, line in enumerate(LINES, 1) if len(line) > 110]
    assert not [(f.name, f.lineno) for f in FUNCTIONS if f.end_lineno - f.lineno >= 60]


def test_parameters():
    kernels = {f.name for f in FUNCTIONS if any("jit" in ast.unparse(d) for d in f.decorator_list)}
    assert not [f.name for f in FUNCTIONS if len(f.args.args) > 8 and f.name not in kernels]


def test_no_globals_and_ascii():
    assert not [node.names for node in ast.walk(TREE) if isinstance(node, (ast.Global, ast.Nonlocal))]
    assert SOURCE.isascii() and ast.get_docstring(TREE)


def test_no_strings_inside_f_strings():
    """The minifier, run by Python 3.12, would give them quotes that 3.10 and 3.11 do not read."""
    fields = [node for node in ast.walk(TREE) if isinstance(node, ast.FormattedValue)]
    bad = [f.lineno for f in fields for c in ast.walk(f.value) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    assert not bad


def test_everything_is_used():
    names = [f.name for f in FUNCTIONS] + [node.name for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
    by_protocol = {"forward", "backward", "main", "kernel"}
    unused = [n for n in names if not n.startswith("__") and n not in by_protocol and len(re.findall(rf"\b{n}\b", SOURCE)) == 1]
    assert not unused


def test_public_functions_say_what_they_do():
    """A docstring on everything at the top level that is longer than three lines."""
    silent = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              and node.end_lineno - node.lineno > 3 and not ast.get_docstring(node)]
    assert not silent


def test_environment_is_read_in_one_place():
    reads = [number for number, line in enumerate(LINES, 1) if "os.environ" in line]
    outside = [n for n in reads if not CONFIG.lineno <= n <= CONFIG.end_lineno]
    assert all(re.search(r"RANK|def main|place", LINES[n - 1]) for n in outside), outside


def test_knobs_are_frozen_and_all_read():
    """A new setting is a deliberate edit of the list above; one that nothing reads must go."""
    assert [f.name for f in dataclasses.fields(tg.Config)] == KNOBS
    body = "\n".join(LINES[CONFIG.lineno - 1 : CONFIG.end_lineno])
    rest = "\n".join(LINES[: CONFIG.lineno - 1] + LINES[CONFIG.end_lineno :])
    unread = [name for name in KNOBS if not re.search(rf"\.{name}\b", rest) and len(re.findall(rf"self\.{name}\b", body)) == 0]
    assert set(unread) <= {"preset"}, unread  # read as PRESET, before there is a Config


def test_importing_touches_no_gpu_library():
    import subprocess
    import sys
    code = ("import sys; import train_gpt, torch; bad = [m for m in ('triton', 'flash_attn_interface', 'brotli', "
            "'sentencepiece', 'python_minifier') if m in sys.modules]; assert not bad, bad; "
            "assert not torch.cuda.is_initialized()")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PATH.parent)
