"""How train_gpt.py has to read, as far as a machine can tell: density, names, order, docstrings, columns.

A statement is a logical line, so that breaking it over several lines changes nothing; comments and docstrings
count nothing. The limits are where nanoGPT, nanochat, gpt-fast and modded-nanogpt stand.
"""
import ast
import dataclasses
import io
import re
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import train_gpt as tg

pytestmark = pytest.mark.check

PATH = Path(tg.__file__)
SOURCE = PATH.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE, feature_version=(3, 10))
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
TOP_LEVEL = [node for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
CONFIG = next(node for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "Config")

MOST_TOKENS = 38_982  # of the file: a feature pays for what it adds
MEAN, MEDIAN, NINETIETH = 12.8, 10, 24  # tokens a statement, over the file
FUNCTION_MEAN, KERNEL_MEAN = 17.0, 20.0  # in any function of five statements or more
TABLES = {"caveats", "__post_init__"}  # functions that are a table of data; a mean says nothing of them
MOST_PACKED = 20  # assignments of several values to several names at once, which have to belong together
MOST_COLUMNS = 110
LONGEST_FUNCTION = 60  # lines; a kernel may be longer, as it holds both directions
UNNUMBERED_LINES = 25  # a longer function that is no table and no list of attributes numbers its steps
SECTIONS = """1 Settings; 2 Processes, log, files; 3 Data; 4 Model; 5 Hooks: calibration and adapters;
6 Optimizers; 7 Training; 8 Quantization; 9 Artifact; 10 Scores; 11 Score-first adaptation;
12 Mixture; 13 The run; A Appendix: attention backends and Triton kernels"""

SETTINGS = """preset seed run_id artifact_dir data_dir eval_only_path save_scores attention vocab_size
train_batch_tokens train_buffers train_seq_len val_batch_tokens eval_seq_len val_doc_fraction num_layers
model_dim num_heads num_kv_heads mlp_mult rope_dims rope_base qk_gain_init logit_softcap tied_embed_init_std
num_loops loop_start loop_end enable_looping_at parallel_start_layer iterations max_wallclock_seconds
warmup_steps small_batch_frac warmdown_frac min_lr train_log_every val_loss_every matrix_lr muon_momentum
muon_momentum_warmup_start muon_momentum_warmup_steps muon_backend_steps muon_wd tied_embed_lr embed_wd
scalar_lr adam_wd beta1 beta2 adam_eps grad_clip_norm ema_decay quant_states gptq_calibration_batches
gptq_reserve_seconds ttt_enabled ttt_sites ttt_lora_rank ttt_lora_lr ttt_chunk_size ttt_chunk_growth
ttt_eval_seq_len ttt_batch_size ttt_weight_decay ttt_beta2 eval_max_seconds""".split()

NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
            tokenize.ENDMARKER}


def statements(source: str) -> list[tuple[int, int]]:
    """(first line, tokens) of every statement of more than one token; a docstring has one."""
    found, first, count, f_strings = [], 0, 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        f_strings += (kind == "FSTRING_START") - (kind == "FSTRING_END")  # Python 3.12 takes them apart
        inside_f_string = f_strings > (kind == "FSTRING_START") or kind == "FSTRING_END"
        if token.type == tokenize.NEWLINE:
            if count > 1:
                found.append((first, count))
            count = 0
        elif token.type not in NOT_CODE and not inside_f_string:
            first = first if count else token.start[0]
            count += 1
    return found


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def too_dense(source: str) -> list[str]:
    """What of a source is over the limits on tokens a statement."""
    counts = sorted(tokens for _, tokens in statements(source))
    measured = {"tokens": (sum(counts), MOST_TOKENS),
                "mean": (statistics.fmean(counts), MEAN),
                "median": (counts[len(counts) // 2], MEDIAN),
                "90th percentile": (counts[len(counts) * 9 // 10], NINETIETH)}
    return [f"{name} {value:.1f} > {limit}" for name, (value, limit) in measured.items() if value > limit]


def dense_functions(source: str) -> list[str]:
    """Functions whose mean of tokens a statement is over the limit."""
    found, every = [], statements(source)
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and function.name not in TABLES:
            inside = [tokens for first, tokens in every if function.lineno <= first <= function.end_lineno]
            limit = KERNEL_MEAN if is_kernel(function) else FUNCTION_MEAN
            if len(inside) >= 5 and statistics.fmean(inside) > limit:
                found.append(f"{function.name} {statistics.fmean(inside):.1f}")
    return found


def packed_assignments(source: str) -> list[str]:
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)]


def bound_lambdas(source: str) -> list[str]:
    return [ast.unparse(node) for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Assign | ast.NamedExpr) and isinstance(node.value, ast.Lambda)]


def shadowed_names(source: str) -> list[str]:
    """Locals and arguments that have the name of a function or class of the module."""
    tree, found = ast.parse(source), set()
    top = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            names = [node.id for node in ast.walk(function)
                     if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
            names += [argument.arg for argument in function.args.args + function.args.kwonlyargs]
            found |= {f"{function.name}: {name}" for name in names if name in top}
    return sorted(found)


def test_no_more_tokens_a_statement_than_in_the_best_files():
    assert not too_dense(SOURCE)
    assert not dense_functions(SOURCE)


def test_packing_is_for_what_belongs_together():
    assert len(packed_assignments(SOURCE)) <= MOST_PACKED, packed_assignments(SOURCE)


def test_names():
    assert not bound_lambdas(SOURCE)
    assert not shadowed_names(SOURCE)


CRAMMED = """
def f(x, y):
    a, b, c = x + y * (x - y) ** 2, [z for z in (x, y) if z is not None], lambda t: t + x * y
    d, e = {k: v * a for k, v in zip(b, range(len(b)))}, sum(map(c, b)) / max(1, len(b)) - a * (x + y)
    g = lambda t: t * (a + d[0]) - e / (1 + abs(t)) if t > 0 else -t * (a - d[0]) + e / (1 - abs(t))
    h = [g(t) for t in b if t > min(a, e)] + [c(t) for t in b if t <= min(a, e)] or [g(a), c(e), g(e), c(a)]
    return {k: v for k, v in zip(h, map(g, h)) if k != v and k > 0}, sorted(h, key=lambda t: (g(t), -c(t)))


def g(f):
    return f
"""


def test_a_crammed_file_fails():
    assert {line.split()[0] for line in too_dense(CRAMMED)} == {"mean", "median", "90th"}
    assert dense_functions(CRAMMED) and bound_lambdas(CRAMMED) and packed_assignments(CRAMMED)
    assert shadowed_names(CRAMMED) == ["f: g", "g: f"]


def test_lines_and_functions_are_short():
    assert not [number for number, line in enumerate(LINES, 1) if len(line) > MOST_COLUMNS]
    kernels = {f.name for f in FUNCTIONS if is_kernel(f)}
    makers = {f.name for f in FUNCTIONS if any(getattr(inner, "name", None) in kernels for inner in f.body)}
    long = {f.name: f.end_lineno - f.lineno for f in FUNCTIONS if f.end_lineno - f.lineno > LONGEST_FUNCTION}
    assert set(long) <= kernels | makers, long
    assert not [f.name for f in FUNCTIONS if len(f.args.args) > 8 and f.name not in kernels]


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring, comments, blank lines and functions inside."""
    start = function.body[1].lineno if ast.get_docstring(function) else function.body[0].lineno
    inner = [node for node in ast.walk(function)
             if isinstance(node, ast.FunctionDef) and node is not function]
    left_out = {number for node in inner for number in range(node.lineno, node.end_lineno + 1)}
    numbers = [number for number in range(start, function.end_lineno + 1) if number not in left_out]
    lines = [LINES[number - 1].strip() for number in numbers]
    return sum(1 for line in lines if line and not line.startswith("#"))


def test_long_algorithms_number_their_steps():
    plain = TABLES | {"GPT.__init__"}
    unnumbered = []
    for owner in [TREE, *(node for node in TREE.body if isinstance(node, ast.ClassDef))]:
        for function in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
            name = f"{owner.name}.{function.name}" if isinstance(owner, ast.ClassDef) else function.name
            text = "\n".join(LINES[function.lineno - 1 : function.end_lineno])
            if code_lines(function) > UNNUMBERED_LINES and not {name, function.name} & plain:
                unnumbered += [] if re.search(r"# 1\) ", text) and re.search(r"# 2\) ", text) else [name]
    assert not unnumbered


def test_sections_are_in_their_order_and_kernels_come_last():
    banners = re.findall(r"^# ---- (.+?) -+$", SOURCE, flags=re.M)
    assert banners == [title.strip() for title in SECTIONS.replace("\n", " ").split(";")]
    before = SOURCE[: SOURCE.index("# ---- A Appendix")]
    of_kernels = r"triton\.jit|import_triton|autograd\.Function"
    assert re.search(of_kernels, SOURCE) and not re.search(of_kernels, before)


def test_no_globals_and_ascii():
    assert not [node.names for node in ast.walk(TREE) if isinstance(node, ast.Global | ast.Nonlocal)]
    assert SOURCE.isascii() and ast.get_docstring(TREE)


def test_no_strings_inside_f_strings():
    """The minifier, run by Python 3.12, would give them quotes that 3.10 and 3.11 do not read."""
    fields = [node for node in ast.walk(TREE) if isinstance(node, ast.FormattedValue)]
    bad = [field.lineno for field in fields for node in ast.walk(field.value)
           if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not bad


def test_everything_is_used():
    names = [node.name for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    by_protocol = {"forward", "backward", "main"}
    unused = [name for name in names if not name.startswith("__") and name not in by_protocol
              and len(re.findall(rf"\b{name}\b", SOURCE)) == 1]
    assert not unused


def test_everything_says_what_it_does():
    """A docstring on everything at the top level that is longer than three lines."""
    silent = [node.name for node in TOP_LEVEL
              if node.end_lineno - node.lineno > 3 and not ast.get_docstring(node)]
    assert not silent


def test_docstrings_are_sentences():
    """A docstring begins with a capital, a number, a sign or a name of the code, and ends with a stop."""
    names = {word for line in LINES for word in re.findall(r"[A-Za-z_]\w*", line.split("#")[0])}
    for node in ast.walk(TREE):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            paragraph = text.split("\n\n")[0]
            first = re.match(r"[A-Za-z_]\w*", paragraph)
            assert first is None or first[0][0].isupper() or first[0] in names, (node.name, paragraph)
            assert paragraph.endswith((".", ")", ":")) or "->" in paragraph, (node.name, paragraph)


def test_environment_is_read_in_one_place():
    places = [LINES[number - 1].strip() for number, line in enumerate(LINES, 1) if "os.environ" in line
              and not CONFIG.lineno <= number <= CONFIG.end_lineno]
    allowed = r'"(RANK|WORLD_SIZE|LOCAL_RANK)"|^def main\('  # a launcher's, and what main is given
    assert not [line for line in places if not re.search(allowed, line)]


def test_settings_are_these_and_all_read():
    """A new setting is a deliberate edit of the list above; one that nothing reads must go."""
    assert [field.name for field in dataclasses.fields(tg.Config)] == SETTINGS
    body = "\n".join(LINES[CONFIG.lineno - 1 : CONFIG.end_lineno])
    rest = "\n".join(LINES[: CONFIG.lineno - 1] + LINES[CONFIG.end_lineno :])
    unread = [name for name in SETTINGS
              if not re.search(rf"\.{name}\b", rest) and not re.search(rf"self\.{name}\b", body)]
    assert set(unread) <= {"preset"}, unread  # read as PRESET, before there is a Config


def test_every_setting_says_what_it_is():
    assert set(tg.setting_comments()) == set(SETTINGS)


def test_importing_touches_no_gpu_library():
    code = ("import sys; import train_gpt, torch; packages = ('triton', 'flash_attn_interface', 'brotli', "
            "'sentencepiece', 'python_minifier'); assert not set(packages) & set(sys.modules); "
            "assert not torch.cuda.is_initialized()")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PATH.parent)
