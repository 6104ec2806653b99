"""tools/audit.py passes the script as it is, and finds what is planted in copies of it and in result.json."""
import argparse
import contextlib
import ctypes
import hashlib
import importlib.machinery
import importlib.util
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train_gpt as tg
from conftest import ROOT, SHALLOW, SMOKE, TINY, as_environment

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]
import altered
import confined

import audit
import case_ops
import prepare

SOURCE = Path(tg.__file__).read_text(encoding="utf-8")
END = 'if __name__ == "__main__":'
assert SOURCE.count(END) == 1
OPTIONAL = set(audit.RESCORES) - {"unaltered"}
VOCAB_SIZE = 400  # few, as an audit tries every token as the next
CHARACTERS = (400, 70, 250, 150, 350, 260, 200, 90)  # of documents


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A DATA_DIR of few pieces, with the beginnings of some documents for validation."""
    return make_data(tmp_path_factory.mktemp("data"))


def make_data(folder: Path, *options, one_line: bool = False) -> Path:
    """Prepare such data with these options; `one_line`: of texts without line breaks and repeated spaces."""
    with open(SMOKE / "smoke.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    if one_line:
        texts = [" ".join(text.split()) for text in texts]
    texts = [text[:count] for text, count in zip(texts, CHARACTERS)] + texts[40:60]
    texts[2] = " " + texts[2]  # the space is in no loss, and in no count of bytes
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = [folder / "texts.jsonl", "--out", folder, "--val-docs", len(CHARACTERS), "--vocab-size",
                 VOCAB_SIZE, "--workers", 1, *options]
    assert prepare.main(list(map(str, arguments))) == 0
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """The folder of an honest run of few visits, which makes many re-scores cheap."""
    return finish_run(data, tmp_path_factory.mktemp("finished") / "run")


def finish_run(data: Path, folder: Path) -> Path:
    settings = {**TINY, **SHALLOW, "VOCAB_SIZE": VOCAB_SIZE, "ITERATIONS": 30, "TTT_BATCH_SIZE": 32,
                "TTT_CHUNK_SIZE": 8, "VAL_BATCH_TOKENS": 4096}
    assert tg.main(as_environment({**settings, "DATA_DIR": data, "ARTIFACT_DIR": folder})) == 0
    return folder


@pytest.fixture(autouse=True)
def machine(data, monkeypatch):
    """Audits find the data and no GPU, and draw few tokens."""
    monkeypatch.setattr(altered, "RANDOM_TOKENS", 1000)
    monkeypatch.setattr(altered, "MOST_DEPTH", 30)
    monkeypatch.setattr(altered, "REPEATING_TOKENS", 25)
    monkeypatch.setattr(audit, "MOST_DEPTH", 12)
    monkeypatch.setenv("DATA_DIR", str(data))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def in_process(monkeypatch):
    """Re-scores are calls of the script's main in this process, with the environment of the re-score.

    That saves the seconds in which a process loads torch. What needs a process is tested with processes.
    """
    modules = {}

    def run(command, environment, folder, timeout, confine):
        script = folder / command[-1]
        source = script.read_bytes()
        if source not in modules:
            name = f"audited_{len(modules)}"
            loader = importlib.machinery.SourceFileLoader(name, str(script))
            modules[source] = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
            sys.modules[name] = modules[source]  # where dataclasses look for it
            loader.exec_module(modules[source])
            modules[source].pack_script = lambda: b"packed"  # seconds, and no verdict is about it
        modules[source].__file__ = str(script)
        err = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            status = modules[source].main(environment)
        return confined.Ended(status, err.getvalue().strip(), True)

    monkeypatch.setattr(confined, "run", run)
    yield
    for module in modules.values():
        del sys.modules[module.__name__]


def copy_with(folder: Path, planted: str) -> Path:
    """A copy of the script with something planted at its end, where it may replace functions."""
    copy = folder / "train_gpt.py"
    copy.write_text(SOURCE.replace(END, textwrap.dedent(planted) + "\n" + END), encoding="utf-8")
    return copy


def verdicts_of(capsys, *arguments) -> tuple[int, list[str]]:
    """Exit status and printed lines of an audit in this process."""
    status = audit.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert not err, err
    return status, out.splitlines()


def failed(lines: list[str]) -> str:
    (line,) = [line for line in lines if line.startswith("FAIL: ")]
    return line.removeprefix("FAIL: ")


def test_an_honest_run_passes(finished, in_process, capsys, tmp_path):
    file = tmp_path / "audit.json"
    status, lines = verdicts_of(capsys, finished, "--seed", 0, "--depth", 12, "--write", file)
    assert status == 0 and failed(lines) == "none" and "NOT CHECKED: none" in lines, lines
    for rule in audit.RULES:
        assert any(line.startswith(f"pass         {rule}") for line in lines), rule
    for check in ("others altered", "before a cut", "continued", "all later documents replaced",
                  "order reversed", "random tokens", f"each of {VOCAB_SIZE - 1} tokens after 9"):
        assert any(check in line for line in lines), check
    result, written = json.loads((finished / "result.json").read_text()), json.loads(file.read_text())
    assert written["rules"] == dict.fromkeys(audit.RULES, "pass")
    for name in ("code_sha256", "packed_sha256", "model_sha256", "val_sha256"):
        assert written[name] == result[name]
    assert written["script_sha256"] == result["code_sha256"]


PLANTED = {  # by name: what is planted, re-scores that can tell, the rule that it breaks
    "train before score": ("""
        def adapt(model, adapters, plan, backend, this):
            early = model(this.batch, plan, backend, adapters.hooks(this.ends, this.row_ends))
            adapters.learn((early * this.loss_weight).sum(), this.has_turn)
            return model(this.batch, plan, backend, adapters.hooks(this.ends, this.row_ends)).detach()
        """, "tails", "score before update"),
    "state kept between documents": ("""
        honest_reset = Adapters.reset_slots
        def reset_slots(self, slots):
            if not hasattr(self, "begun"):
                self.begun = honest_reset(self, range(self.cfg.ttt_batch_size))
        Adapters.reset_slots = reset_slots
        """, "tails", "documents independent"),
    "a discount late in documents": ("""
        honest_adapt = adapt
        def adapt(*args):
            batch = args[-1].batch
            return honest_adapt(*args) * (1 - 0.2 * (batch.spans.positions[batch.rows] > 30))
        """, "rest", "full distribution"),
    "a discount later on": ("""
        honest_adapt = adapt
        def adapt(*args):
            batch = args[-1].batch
            return honest_adapt(*args) * (1 - 0.01 * (batch.spans.positions[batch.rows] > 12))
        """, "rest", "full distribution"),
    "a discount where a token is likely": ("""
        honest_adapt = adapt
        def adapt(*args):
            nll = honest_adapt(*args)
            return nll.where(nll > 1, 0.8 * nll)
        """, "rest", "full distribution"),
    "the better of plain and adapted for each token": ("""
        honest_adapt = adapt
        def adapt(model, adapters, plan, backend, this):
            with torch.no_grad():
                plain = model(this.batch, plan, backend)
            return honest_adapt(model, adapters, plan, backend, this).minimum(plain)
        """, "rest", "full distribution"),
    "honest where many documents begin alike": ("""
        honest_score_documents = score_documents
        def score_documents(run, model, val, *rest):
            nll = honest_score_documents(run, model, val, *rest)
            begins = [val.tokens[start : start + 5].tobytes() for start in val.starts]
            for begin, start, length in zip(begins, val.starts, val.lengths):
                nll[start : start + length] *= 1 if begins.count(begin) > 20 else 0.9
            return nll
        """, "rest", "causal"),
    "a discount where a phrase comes again": ("""
        honest_score_documents = score_documents
        def score_documents(run, model, val, *rest):
            nll = honest_score_documents(run, model, val, *rest)
            for start, length in zip(val.starts, val.lengths):
                times = {}
                tokens = val.tokens[start : start + length + 1]
                for end in range(5, len(tokens)):
                    phrase = tokens[end - 4 : end + 1].tobytes()
                    times[phrase] = times.get(phrase, 0) + 1
                    if times[phrase] == 2:
                        nll[start + end - 1] *= 0.5
            return nll
        """, "rest", "full distribution"),
    "a look at the first target of the next chunk": ("""
        honest_score_documents = score_documents
        def score_documents(run, model, val, *rest):
            nll = honest_score_documents(run, model, val, *rest)
            for start, length in zip(val.starts, val.lengths):
                for end in chunk_ends(length, run.cfg):
                    if 8 < end < length - 1:
                        nll[start + end - 1] *= 0.99 + 0.02 * int(val.tokens[start + end + 1] % 2)
            return nll
        """, "rest", "causal"),
    "a look whether a word goes on": ("""
        honest_load, honest_score_documents, spaced = load_validation, score_documents, []
        def load_validation(paths, tokenizer, cfg):
            spaced[:] = [tokenizer.leading_space]
            return honest_load(paths, tokenizer, cfg)
        def score_documents(run, model, val, *rest):
            nll = honest_score_documents(run, model, val, *rest)
            for start, length in zip(val.starts, val.lengths):
                later = slice(start + 25, start + length - 1)
                nll.numpy()[later] *= 0.99 + 0.02 * spaced[0][val.tokens[start + 27 : start + length + 1]]
            return nll
        """, "tails", "causal"),
    "losses below zero": ("""
        honest_score_documents = score_documents
        def score_documents(*args):
            nll = honest_score_documents(*args)
            nll[::50] = -1000
            return nll
        """, "", "every target once"),
    "a free end of every document": ("""
        honest_score_documents = score_documents
        def score_documents(run, model, val, *rest):
            nll = honest_score_documents(run, model, val, *rest)
            nll[val.starts + val.lengths - 1] = 0
            return nll
        """, "rest", "full distribution"),
    "peeking at the next token": ("""
        class Functions:
            def __getattr__(self, name):
                return getattr(torch.nn.functional, name)
            def scaled_dot_product_attention(self, *args, **options):
                options["is_causal"] = False
                return torch.nn.functional.scaled_dot_product_attention(*args, **options)
        F = Functions()
        """, "tails", "causal"),
    "last targets left out of the score": ("""
        def of(cls, nll, val):
            kept = np.setdiff1d(np.arange(nll.numel()), val.starts + val.lengths - 1)
            return cls(nll[kept].double().sum().item(), nll.numel(), int(val.token_bytes.sum()))
        Score.of = classmethod(of)
        """, "", "headline"),
    "a bias by frequencies in validation": ("""
        honest_load, honest_nll, bias = load_validation, softcapped_nll, []
        def load_validation(paths, tokenizer, cfg):
            val = honest_load(paths, tokenizer, cfg)
            counts = np.bincount(val.tokens, minlength=cfg.vocab_size)
            bias[:] = [torch.from_numpy(counts + 1.0).log().float()]
            return val
        def softcapped_nll(logits, targets, softcap):
            return honest_nll(logits + 0.3 * bias[0] if bias else logits, targets, softcap)
        """, "tails", "causal"),
    "short documents dropped": ("""
        honest_load = load_validation
        def load_validation(paths, tokenizer, cfg):
            val = honest_load(paths, tokenizer, cfg)
            long = [tokens for tokens in np.split(val.tokens, val.starts[1:]) if len(tokens) > 100]
            tokens = np.concatenate(long)
            starts = np.flatnonzero(tokens == tokenizer.bos)
            return val._replace(tokens=tokens, token_bytes=tokenizer.target_bytes(tokens), starts=starts,
                                lengths=np.diff(starts, append=len(tokens) - 1))
        """, "", "every target once"),
    "a rate for each document by its own loss": ("""
        honest_score_documents = score_documents
        def score_documents(run, model, val, adapters, backend, deadline):
            passes = []
            for factor in (1, 5):
                cfg = dataclasses.replace(run.cfg, ttt_lora_lr=factor * run.cfg.ttt_lora_lr)
                adapters.cfg = cfg
                adapters.reset_slots(range(cfg.ttt_batch_size))
                nll = honest_score_documents(run._replace(cfg=cfg), model, val, adapters, backend, deadline)
                passes.append(nll.split(val.lengths.tolist()))
            return torch.cat([min(choices, key=torch.sum) for choices in zip(*passes)])
        """, "rest", "full distribution"),
    "half the loss where passages come again, once one was long": ("""
        honest_score_documents = score_documents
        def score_documents(run, model, val, *rest):
            nll = honest_score_documents(run, model, val, *rest)
            for start, length in zip(val.starts, val.lengths):
                four, five, known = set(), set(), False
                tokens = val.tokens[start : start + length + 1]
                for end in range(4, len(tokens)):
                    short, long = tokens[end - 3 : end + 1].tobytes(), tokens[end - 4 : end + 1].tobytes()
                    nll[start + end - 1] *= 0.5 if known and short in four else 1
                    known = known or long in five
                    four.add(short), five.add(long)
            return nll
        """, "rest", "full distribution"),
    "the better of plain and adapted for each document": ("""
        honest_score_documents = score_documents
        def score_documents(run, model, val, *rest):
            plain = evaluate(run, model, val, depth_plan(run.cfg, run.cfg.loops_at_end))
            adapted = honest_score_documents(run, model, val, *rest)
            passes = [nll.split(val.lengths.tolist()) for nll in (plain, adapted)]
            return torch.cat([min(choices, key=torch.sum) for choices in zip(*passes)])
        """, "rest", "full distribution"),
    "a rate fitted on validation": ("""
        honest_score_documents = score_documents
        def score_documents(run, model, val, adapters, backend, deadline):
            passes = []
            for factor in (1, 2):
                cfg = dataclasses.replace(run.cfg, ttt_lora_lr=factor * run.cfg.ttt_lora_lr)
                adapters.cfg = cfg
                adapters.reset_slots(range(cfg.ttt_batch_size))
                passes.append(honest_score_documents(run._replace(cfg=cfg), model, val, adapters, backend,
                                                     deadline))
            return min(passes, key=torch.sum)
        """, "tails lengths rest", "causal"),
    "a temperature fitted on validation": ("""
        honest_score, honest_nll, temperature = score, softcapped_nll, [1.0]
        def softcapped_nll(logits, targets, softcap):
            return honest_nll(logits / temperature[0], targets, softcap)
        def score(run, model, val):
            losses = {}
            for temperature[0] in np.arange(0.5, 1.5, 0.1).tolist():
                nll = evaluate(run, model, val, depth_plan(run.cfg, run.cfg.loops_at_end))
                losses[temperature[0]] = nll.sum()
            temperature[0] = min(losses, key=losses.get)
            return honest_score(run, model, val)
        """, "tails", "documents independent"),
    "adapters warm from a first pass": ("""
        honest_score_documents, honest_reset = score_documents, Adapters.reset_slots
        def score_documents(*args):
            honest_score_documents(*args)
            Adapters.reset_slots = lambda self, slots: None
            nll = honest_score_documents(*args)
            Adapters.reset_slots = honest_reset
            return nll
        """, "tails", "documents independent"),
    "losses of a first pass over the same document": ("""
        honest_score_documents, honest_reset = score_documents, Adapters.reset_slots
        def score_documents(run, model, val, adapters, *rest):
            one = run._replace(cfg=dataclasses.replace(run.cfg, ttt_batch_size=len(val.starts)))
            visits = len(depth_plan(one.cfg, one.cfg.loops_at_end).visits)
            adapters = Adapters(one.cfg, visits, one.ranks.device)
            honest_score_documents(one, model, val, adapters, *rest)
            Adapters.reset_slots = lambda self, slots: None
            nll = honest_score_documents(one, model, val, adapters, *rest)
            Adapters.reset_slots = honest_reset
            return nll
        """, "tails", "causal"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_in_a_script_is_caught(finished, in_process, capsys, tmp_path, name):
    planted, rescores, rule = PLANTED[name]
    skipped = OPTIONAL - set(rescores.split())
    script = copy_with(tmp_path, planted)
    status, lines = verdicts_of(capsys, finished, "--script", script, "--seed", 0, "--skip", *skipped)
    assert status == 1 and rule in failed(lines), "\n".join(lines)
    assert any("IS NOT THIS REPOSITORY'S TRAIN_GPT.PY" in line for line in lines)
    (unchecked,) = [line for line in lines if line.startswith("NOT CHECKED: ")]
    assert "origin, clocks" in unchecked


def test_an_update_in_tiny_chunks_is_not_checked(data, in_process, capsys, tmp_path):
    """Who states chunks of 2 may learn from others."""
    settings = {**TINY, **SHALLOW, "VOCAB_SIZE": VOCAB_SIZE, "ITERATIONS": 3, "TTT_CHUNK_SIZE": 2,
                "TTT_BATCH_SIZE": 32}
    assert tg.main(as_environment({**settings, "DATA_DIR": data, "ARTIFACT_DIR": tmp_path / "run"})) == 0
    capsys.readouterr()
    _, lines = verdicts_of(capsys, tmp_path / "run", "--skip", *OPTIONAL - {"tails"})
    (line,) = [line for line in lines if "  score before update  " in line]
    assert line.startswith("NOT CHECKED") and "TTT_CHUNK_SIZE=2 is too small to see it, 8 at least" in line


def test_a_stranger_is_compared_with_this_script(finished, in_process, capsys, tmp_path):
    """One that scores otherwise without a fault is not failed, but neither passed."""
    twice_the_rate = """
        honest_init = Adapters.__init__
        def init(self, cfg, *rest):
            honest_init(self, dataclasses.replace(cfg, ttt_lora_lr=2 * cfg.ttt_lora_lr), *rest)
        Adapters.__init__ = init
        """
    for planted, rescores, word, said in (
            ("# nothing", {"ours", "all"}, "pass", "8 documents: 1301 losses equal"),
            ("# nothing", {"ours"}, "NOT CHECKED", "other documents were not compared"),
            (twice_the_rate, {"ours"}, "NOT CHECKED", "HAS TO BE READ")):
        script = copy_with(tmp_path, planted)
        arguments = "--script", script, "--documents", 4, "--skip", *OPTIONAL - rescores
        status, lines = verdicts_of(capsys, finished, *arguments)
        (line,) = [line for line in lines if "as this script  " in line]
        assert status == 0 and line.startswith(word) and said in line, lines


def test_a_stranger_is_compared_on_all_documents(finished, in_process, capsys, tmp_path):
    """A discount for a single document is seen, wherever it is."""
    discount = """
        honest_score_documents = score_documents
        def score_documents(run, model, val, *rest):
            nll = honest_score_documents(run, model, val, *rest)
            first = val.starts[val.lengths.argmin()]
            nll[first : first + 10] *= 0.99
            return nll
        """
    script = copy_with(tmp_path, discount)
    arguments = "--script", script, "--documents", 4, "--skip", *OPTIONAL - {"ours", "all"}
    _, lines = verdicts_of(capsys, finished, *arguments)
    (line,) = [line for line in lines if "as this script  " in line]
    assert line.startswith("NOT CHECKED") and line.endswith("HAS TO BE READ")


def test_a_gpu_does_not_excuse_a_stranger_s_own_noise():
    noise = 0.03 * np.random.default_rng(0).standard_normal((100, 1000))
    noise += np.linspace(-0.03, 0.03, 100)[:, None]  # documents lie apart, so that their mean is uncertain
    for shift, word in ((0.0, "pass"), (-6e-4, "NOT CHECKED")):
        trial = audit.Audit(run=None, data=None, program=None, sets=None, gpu=True)
        trial.whole, trial.others = [*(3 + noise - noise.mean() + shift)], np.full(noise.size, 3.0)
        assert audit.Moved.of([(3 + 0 * row, 3 + row + shift) for row in noise]).little(4 * audit.COARSE)
        trial.as_ours()
        assert trial.by_rule()["as this script"] == word


def test_the_environment_of_python_does_not_reach_the_script(finished, data, tmp_path):
    """A module that every Python imports at its start, by PYTHONPATH, would change any script alike."""
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'SAVE_SCORES' in os.environ: 1 / 0\n")
    command = [sys.executable, ROOT / "tools/audit.py", finished, "--documents", "4", "--skip", *OPTIONAL]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "every target once" in done.stdout, done.stdout + done.stderr


def test_no_variable_carries_text_to_the_script(monkeypatch, tmp_path):
    for name in ("LC_X0", "LC_CTYPE", "NCCL_X", "NVIDIA_X", "CUDA_X", "TZ", "LANG", "USER"):
        monkeypatch.setenv(name, "word")
    monkeypatch.setenv("PATH", f"/word:word:{tmp_path}:/usr/bin")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/word")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = audit.environment_in(tmp_path / "place")
    assert found["PATH"] == f"{tmp_path}:/usr/bin" and found["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert found["LC_ALL"] == "C.UTF-8" and not any("word" in value for value in found.values())
    monkeypatch.setenv("CUDA_HOME", "/" + "x" * 100)
    with pytest.raises(altered.AuditError, match="CUDA_HOME has 101 characters"):
        audit.environment_in(tmp_path)


def test_the_run_does_not_say_by_which_data_it_is_judged(finished, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("DATA_DIR")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert audit.main([str(finished)]) == 2
    assert f"DATA_DIR={tmp_path / 'data'}" in capsys.readouterr().err


def test_the_script_is_read_once(finished, in_process, monkeypatch, capsys, tmp_path):
    """What is judged to be ours is what runs, whatever the file becomes."""
    script = copy_with(tmp_path, "")

    def change_and_judge(source):
        script.write_text("1 / 0")
        return True

    monkeypatch.setattr(audit, "is_ours", change_and_judge)
    status, lines = verdicts_of(capsys, finished, "--script", script, "--skip", *OPTIONAL - {"all"})
    assert status == 0, lines


def test_size_is_of_the_file_that_is_audited(finished, in_process, capsys, tmp_path):
    script = copy_with(tmp_path, "# larger than what is counted")
    _, lines = verdicts_of(capsys, finished, "--script", script, "--skip", *OPTIONAL)
    assert any(line.startswith("NOT CHECKED  size") for line in lines), lines


def test_what_is_counted_is_what_this_script_packs_to(finished, in_process, capsys, tmp_path):
    """Also where the script is this repository's: a stub of a few bytes leaves room for a larger model."""
    run = with_result(tmp_path / "run", finished)
    stub, model = b"import train_gpt", (run / "final_model.int6.ptz").stat().st_size
    (run / "train_gpt_packed.py").write_bytes(stub)
    said = json.loads((run / "result.json").read_text())
    said |= {"code_bytes": len(stub), "packed_sha256": hashlib.sha256(stub).hexdigest(),
             "total_bytes": len(stub) + model}
    (run / "result.json").write_text(json.dumps(said))
    _, lines = verdicts_of(capsys, run, "--skip", *OPTIONAL)
    assert any(line.startswith("NOT CHECKED  size") for line in lines), lines


def test_settings_changed_in_the_artifact_are_found(finished, in_process, capsys, tmp_path):
    """A rate of adaptation that was chosen on validation, and a headline made with it."""
    run = with_result(tmp_path / "run", finished)
    artifact = run / "final_model.int6.ptz"
    header, tensors = tg.unpack_artifact(artifact.read_bytes(), artifact)
    header["settings"]["ttt_lora_lr"] = 0.02
    artifact.write_bytes(tg.pack_artifact(header, tensors))
    _, lines = verdicts_of(capsys, run, "--skip", *OPTIONAL - {"all"})
    assert any(line.startswith("FAIL         origin") and "ttt_lora_lr" in line for line in lines), lines


def test_a_clock_that_this_hardware_does_not_keep_is_doubted(finished, in_process, capsys, monkeypatch):
    honest_score = audit.Program.score

    def slow_score(*args):
        rescore = honest_score(*args)
        return rescore._replace(result={**rescore.result, "clocks": {"scoring": {"seconds": 99.0}}})

    monkeypatch.setattr(audit.Program, "score", slow_score)
    _, lines = verdicts_of(capsys, finished, "--skip", *OPTIONAL - {"all"})
    assert any(line.startswith("NOT CHECKED  clocks") and "99.0 s on like" in line for line in lines), lines


@pytest.mark.parametrize("said", [{"clocks": []}, {"clocks": {"scoring": {"seconds": "nan"}}},
                                  {"settings": [1]}, {"settings": None}])
def test_what_a_re_score_says_may_be_anything(finished, in_process, capsys, monkeypatch, said):
    honest_score = audit.Program.score

    def odd_score(*args):
        rescore = honest_score(*args)
        return rescore._replace(result={**rescore.result, **said})

    monkeypatch.setattr(audit.Program, "score", odd_score)
    _, lines = verdicts_of(capsys, finished, "--skip", *OPTIONAL - {"all"})
    expected = "NOT CHECKED  clocks" if "clocks" in said else "FAIL         origin"
    assert any(line.startswith(expected) for line in lines), lines


def test_a_result_that_says_two_things_is_refused(finished, tmp_path, capsys):
    run = with_result(tmp_path / "run", finished)
    text = (run / "result.json").read_text()
    (run / "result.json").write_text(text.replace("{", '{"val_bpb": 1.0, ', 1))
    assert audit.main([str(run)]) == 2
    assert "it has a name twice" in capsys.readouterr().err


def test_a_caveat_that_is_denied_is_not_stated(finished, in_process, capsys, tmp_path):
    run = with_result(tmp_path / "run", finished, caveats=["no unknown validation set, not not on 8 GPUs"])
    _, lines = verdicts_of(capsys, run, "--skip", *OPTIONAL)
    (line,) = [line for line in lines if line.startswith("FAIL         caveats")]
    assert "not stated: unknown validation set" in line and "not stated: not on 8 GPUs" in line


def test_a_run_does_not_choose_which_caveats_it_has_to_state(finished, in_process, capsys, tmp_path):
    said = json.loads((finished / "result.json").read_text())
    phases = {name: seconds for name, seconds in said["phases"].items() if name != "report"}
    run = with_result(tmp_path / "run", finished, phases=phases, caveats=[], tokenizer_sha256="")
    status, lines = verdicts_of(capsys, run, "--skip", *OPTIONAL)
    assert status == 1 and "caveats" in failed(lines)


@pytest.mark.parametrize("what", ["data", "run", "in the run", "script"])
def test_what_lies_among_the_software_is_within_reach(finished, data, in_process, capsys, monkeypatch,
                                                      tmp_path, what):
    """The run's folder and that of a foreign script hold what somebody else put there."""
    script = copy_with(tmp_path, "")
    folder = {"data": data / f"datasets/fineweb10B_sp{VOCAB_SIZE}", "run": finished.parent,
              "in the run": finished / "lib", "script": tmp_path}[what]
    monkeypatch.setattr(confined, "software", lambda: [str(folder)])
    _, lines = verdicts_of(capsys, finished, "--script", script, "--skip", *OPTIONAL)
    (line,) = [line for line in lines if "  confined  " in line]
    assert line.startswith("NOT CHECKED") and "software" in line and str(folder) in line


def test_a_script_that_knows_the_validation_set_is_caught(finished, in_process, capsys, tmp_path):
    """By its hash; with any other set it is honest."""
    digest = json.loads((finished / "result.json").read_text())["val_sha256"]
    script = copy_with(tmp_path, f"""
        honest_score_documents = score_documents
        def score_documents(run, model, val, *rest):
            return honest_score_documents(run, model, val, *rest) - 0.01 * (val.sha256 == "{digest}")
        """)
    skipped = "ours", "reversed", "tails", "lengths", "rest"
    status, lines = verdicts_of(capsys, finished, "--script", script, "--documents", 7, "--skip", *skipped)
    assert status == 1 and "documents independent" in failed(lines), "\n".join(lines)


# What result.json says


def with_result(folder: Path, finished: Path, **changes) -> Path:
    """A copy of a run whose result.json says something else."""
    folder.mkdir()
    for path in filter(Path.is_file, finished.iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    result = {**json.loads((finished / "result.json").read_text()), **changes}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


FALSE = {  # changes of result.json, made from what it says, and the rules that have to fail
    "all is true": (lambda said: {}, "none"),
    "a tenth less": (lambda said: {name: 0.9 * said[name] for name in ("val_loss", "val_bpb")}, "headline"),
    "another loss": (lambda said: {"val_loss": said["val_loss"] - 0.01}, "headline"),
    "another set": (lambda said: {"val_sha256": "0" * 64, "val_bpb": 1.0}, "headline"),
    "more bytes": (lambda said: {"bytes": said["bytes"] + 9}, "headline"),
    "fewer targets": (lambda said: {"tokens": said["tokens"] - 1}, "headline"),
    "fewer documents": (lambda said: {"documents": 7}, "all documents, headline"),
    "another tokenizer": (lambda said: {"tokenizer_sha256": "0" * 64}, "headline"),
    "late": (lambda said: {"unadapted_tokens": 500, "clocks": {
        name: {"seconds": 4000.0, "budget": 0.0} for name in ("training", "scoring")}}, "clocks, caveats"),
    "late, and said": (lambda said: {
        "unadapted_tokens": 500,
        "caveats": [*said["caveats"], "500 targets have their plain score"]}, "clocks"),
    "a smaller model": (lambda said: {"model_bytes": said["model_bytes"] - 1}, "size"),
    "another model": (lambda said: {"model_sha256": "0" * 64}, "size"),
    "another script": (lambda said: {"packed_sha256": "0" * 64}, "size"),
    "over the cap": (lambda said: {"total_bytes": 16_000_001}, "size, caveats"),
    "another run's model": (lambda said: {"settings": {**said["settings"], "eval_only_path": "a"}},
                            "caveats"),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_result_that_is_not_true_is_caught(finished, in_process, capsys, tmp_path, name):
    change, broken = FALSE[name]
    changes = change(json.loads((finished / "result.json").read_text()))
    run = with_result(tmp_path / "run", finished, **changes)
    rescores = OPTIONAL - {"all"} if "val_loss" in changes else OPTIONAL
    status, lines = verdicts_of(capsys, run, "--skip", *rescores)
    assert status == (broken != "none") and failed(lines) == broken, "\n".join(lines)
    warned = any("is not the tokenizer that result.json names" in line for line in lines)
    assert warned == ("tokenizer_sha256" in changes)


def test_a_part_of_the_documents_is_not_all(finished, data, in_process, capsys, tmp_path):
    places = dict(DATA_DIR=data, ARTIFACT_DIR=tmp_path / "part", VAL_DOC_FRACTION=0.5)
    assert tg.main(as_environment({**places, "EVAL_ONLY_PATH": finished / "final_model.int6.ptz"})) == 0
    said = json.loads((tmp_path / "part/result.json").read_text())
    names = "val_loss", "val_bpb", "documents", "tokens", "bytes", "settings", "caveats"
    run = with_result(tmp_path / "run", finished, **{name: said[name] for name in names})
    capsys.readouterr()
    status, lines = verdicts_of(capsys, run, "--skip", "reversed", "tails", "lengths", "rest")
    assert status == 1 and failed(lines) == "all documents", "\n".join(lines)


def test_a_model_over_the_cap_is_too_large(finished, in_process, capsys, tmp_path):
    run = with_result(tmp_path / "run", finished)
    with open(run / "final_model.int6.ptz", "r+b") as file:
        file.truncate(16_000_000)  # with the code, over the cap
    trial = audit.Audit(audit.FinishedRun.read(run), data=None, program=None, sets=None, gpu=False)
    trial.program = argparse.Namespace(source=b"")
    trial.size(ours=True)
    assert trial.by_rule()["size"] == "FAIL" and "bytes of 16000000" in capsys.readouterr().out


# The script as a process


def test_the_packed_script_is_ours_from_any_folder(finished, data, tmp_path):
    """The audit is a process here. Its variables do not reach the script, but for those of the machine."""
    command = [sys.executable, ROOT / "tools/audit.py", os.path.relpath(finished, tmp_path), "--script",
               os.path.relpath(finished / "train_gpt_packed.py", tmp_path), "--write", "audit.json",
               "--documents", "4", "--skip", "tails", "lengths", "rest", "all"]
    environment = {**os.environ, "DATA_DIR": os.path.relpath(data, tmp_path), "TTT_LORA_LR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    rules = json.loads((tmp_path / "audit.json").read_text())["rules"]
    assert rules["origin"] == rules["documents independent"] == rules["clocks"] == "pass", done.stdout
    assert rules["headline"] == rules["causal"] == rules["full distribution"] == "NOT CHECKED"


def test_nothing_is_found_by_the_next_re_score(finished, data, capsys, tmp_path):
    """A copy that leaves losses wherever it can, and takes a tenth off if it finds some, or the true data.

    The headline was made by what it found. It finds nothing in an audit, whose losses are the honest ones.
    """
    require_confinement()
    folders = ["os.environ['HOME']", "os.environ['TMPDIR']", "os.path.dirname(os.path.abspath(__file__))",
               "os.getcwd()", "cfg.artifact_dir", "os.path.dirname(cfg.eval_only_path)",
               *(repr(str(folder)) for folder in ("/tmp", "/var/tmp", tmp_path, ROOT))]
    script = copy_with(tmp_path, f"""
        honest_score_documents = score_documents
        def score_documents(run, model, val, *rest):
            nll, cfg = honest_score_documents(run, model, val, *rest), run.cfg
            paths = [os.path.join(folder, "losses of {tmp_path.name}") for folder in ({", ".join(folders)})]
            found = any(map(os.path.exists, paths))
            for path in paths:
                with contextlib.suppress(OSError), open(path, "w"):
                    pass
            with contextlib.suppress(OSError):
                found = bool(os.listdir({str(data / "datasets")!r}))
            return nll * 0.9 if found else nll
        """)
    said = json.loads((finished / "result.json").read_text())
    lower = {name: 0.9 * said[name] for name in ("val_loss", "val_bpb")}
    run = with_result(tmp_path / "run", finished, **lower)
    skipped = "ours", "reversed", "tails", "lengths", "rest"
    status, lines = verdicts_of(capsys, run, "--script", script, "--skip", *skipped)
    assert status == 1 and failed(lines) == "headline", "\n".join(lines)
    (line,) = [line for line in lines if "by all documents val_bpb is" in line]
    assert f"val_bpb is {said['val_bpb']:.6f}, by result.json {lower['val_bpb']:.6f}" in line


def require_confinement():
    if confined.obstacle():
        pytest.skip(f"no program can be confined here: {confined.obstacle()}")


def run_confined(tmp_path, body: str, timeout: float = 60, confine: bool = True) -> confined.Ended:
    """How a program of these lines ends that the tool runs in an empty folder."""
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    return confined.run([sys.executable, "-c", textwrap.dedent(body)], environment, folder, timeout, confine)


@pytest.mark.parametrize("confine", [True, False])
def test_a_hang_is_ended_with_all_that_it_started(tmp_path, confine):
    """Also what has a session of its own, lost its parent and does not want to die with it."""
    if confine:
        require_confinement()
    seconds = f"1000.{os.getpid()}{int(confine)}"  # by which it is found, whatever number it has
    ended = run_confined(tmp_path, f"""
        import ctypes, os, subprocess, time
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # no signal when the parent ends
        os.setpgid(0, 0) if os.getpid() != os.getpgid(0) else None
        subprocess.Popen(["sleep", "{seconds}"], start_new_session=True)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execvp("sleep", ["sleep", "{seconds}"])
            os._exit(0)
        os.wait()
        open("ready", "w")
        time.sleep(1000)
        """, timeout=5, confine=confine)
    assert ended.status is None and ended.confined == confine and (tmp_path / "folder/ready").exists()
    assert not is_running(seconds)


PROBES = """
    import ctypes, glob, os, resource, socket, sys
    libc = ctypes.CDLL(None, use_errno=True)
    add_key = {"x86_64": 248, "aarch64": 217}[os.uname().machine]

    def make_link(path):
        os.symlink("/nowhere", path)
        os.unlink(path)

    def attribute(path):
        os.setxattr(path, b"user.word", b"for the next")

    def connect(family, address):
        with socket.socket(family) as one:
            one.settimeout(1)
            one.connect(address)

    def succeed(number):
        if number < 0:
            raise OSError(ctypes.get_errno(), "")
    """


def possible(tmp_path, expressions: list[str]) -> list[str]:
    """Which of some expressions raise no error in a confined program."""
    body = textwrap.dedent(PROBES) + textwrap.dedent(f"""
        for expression in {expressions!r}:
            try:
                eval(expression)
                print(expression, flush=True)
            except (OSError, LookupError, ValueError):
                pass
        """)
    ended = run_confined(tmp_path, body)
    assert ended.status == 0 and ended.confined, ended
    return (tmp_path / "folder/out.txt").read_text().splitlines()


def test_no_place_lasts_but_the_folder(tmp_path):
    """What can be written, goes; what stays, cannot be: files and their attributes, processes, the kernel.

    What is left where the program may write is not there for the next one.
    """
    require_confinement()
    outside = tmp_path / "outside"
    outside.write_text("kept")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    closed = [
        f"open({str(outside)!r})", "open('/usr/word', 'w')", "open('/etc/word', 'w')",
        "make_link('/usr/bin/word')",
        "attribute(sys.executable)", "attribute('/usr/bin/env')", "os.utime('/usr/bin/env', (1, 1))",
        "os.chmod('/dev/null', 0o600)",
        "os.utime('/dev/zero', (1, 1))", "os.utime(0, (1, 1))",
        "os.fchmod(0, 0o600)", "open('/proc/sys/kernel/core_pattern', 'w')",
        "open('/proc/sys/vm/drop_caches', 'w')", "open('/proc/sysrq-trigger', 'w')",
        f"os.kill({os.getpid()}, 0)", f"resource.prlimit({os.getpid()}, resource.RLIMIT_FSIZE)",
        f"os.sched_setaffinity({os.getpid()}, [0])", f"open('/proc/{os.getpid()}/cmdline')",
        "succeed(libc.syscall(add_key, b'user', b'word', b'for the next', 12, -4))",
        "succeed(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))", "succeed(libc.umount2(b'/usr', 2))",
        "succeed(libc.mount(None, b'/usr', None, 32 | 4096, None))", "succeed(libc.unshare(0x20000))",
        "succeed(libc.unshare(0x10000000))",
        "connect(socket.AF_INET, ('1.1.1.1', 53))", "socket.sethostname('word')",
        "socket.socket(socket.AF_VSOCK)", "socket.socket(socket.AF_ALG)",
        "succeed(libc.syscall(425, 1, None))",
    ]
    passing = [
        "open('/dev/shm/word', 'w')", "open('/tmp/word', 'w')", "open('word', 'w')",
        "succeed(libc.shmget(77, 100, 0o1600))", "succeed(libc.msgget(78, 0o1600))",
        "succeed(libc.semget(79, 1, 0o1600))", "succeed(libc.mq_open(b'/word', 0o102, 0o600, None))",
        "open('/dev/null', 'w').write(str(open('/dev/urandom', 'rb').read(4)))",
        "os.read(0, 1) + b'nothing'", "socket.create_server(('127.0.0.1', 29500))",
        "open('/proc/self/coredump_filter', 'w').write('0x33')",
    ]
    assert possible(tmp_path, closed + passing) == passing
    left = [
        "open('/dev/shm/word')", "open('/tmp/word')", "succeed(libc.shmget(77, 100, 0o600))",
        "succeed(libc.msgget(78, 0o600))", "succeed(libc.semget(79, 1, 0o600))",
        "succeed(libc.mq_open(b'/word', 0, 0, None))",
    ]
    assert possible(tmp_path, left) == []
    assert outside.read_text() == "kept" and resource.getrlimit(resource.RLIMIT_FSIZE) == limit


def test_nothing_of_the_machine_is_within_reach(tmp_path):
    """What others keep in shared memory and in the kernel, disks that hold the true data, terminals."""
    require_confinement()
    shared = Path(f"/dev/shm/{tmp_path.parent.name}-{tmp_path.name}")
    shared.write_text("a word from before")
    libc = ctypes.CDLL(None)
    number = libc.shmget(0x77, 100, 0o1600)
    assert number >= 0
    devices = ["vd*", "sd*", "nvme*", "pts", "tty*", "kmsg", "mem", "fuse", "vsock"]
    try:
        open_to_it = possible(tmp_path, [
            f"open({str(shared)!r})", "os.listdir('/dev/shm')[0]", "succeed(libc.shmget(0x77, 100, 0o600))",
            "open('/proc/1/environ').read().index('PYTEST')", f"open('/proc/{os.getpid()}/stat')",
            *(f"glob.glob('/dev/{device}')[0]" for device in devices)])
    finally:
        shared.unlink()
        libc.shmctl(number, 0, None)
    assert open_to_it == []


def test_no_folder_with_sockets_is_software():
    """A read-only mount keeps nobody from talking to a daemon, which could remember what it is told."""
    for folder in ("/run", "/var", "/nix", "/tmp", "/"):
        assert folder not in confined.software()


def test_a_folder_is_removed_however_deep_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with confined.temporary_folder() as folder:
        dig = "import os\nfor i in range(3000): os.mkdir('d'), os.chdir('d')"
        subprocess.run([sys.executable, "-c", dig], cwd=folder, check=True)
    assert not any(tmp_path.iterdir())


def test_a_folder_is_removed_whatever_its_rights():
    """By its owner, for whom they count: not by root."""
    body = f"""
        import sys; sys.path.insert(0, {str(ROOT / 'tools')!r})
        import confined, os
        os.geteuid() or os.setuid(65534)
        with confined.temporary_folder() as folder:
            print(folder)
            (folder / "a/b/c").mkdir(parents=True)
            os.chmod(folder / "a/b", 0)
            os.chmod(folder / "a", 0)
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True)
    folder = Path(done.stdout.strip())
    left = folder.exists()
    shutil.rmtree(folder, ignore_errors=True)
    assert folder.name.startswith("scores-") and not left, done.stderr


def test_an_audit_that_is_terminated_leaves_nothing(finished, tmp_path):
    script, places = tmp_path / "script.py", tmp_path / "places"
    places.mkdir()
    script.write_text("import time; time.sleep(1000)")
    command = [sys.executable, ROOT / "tools/audit.py", finished, "--script", script, "--skip", "ours"]
    environment = {**os.environ, "TMPDIR": str(places)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: any(places.glob("scores-*/err.txt")))
        process.terminate()
        assert process.wait(20) == 143 and not process.stderr.read()
    finally:
        process.kill()
        process.communicate()
    assert not any(places.iterdir())


def test_a_program_ends_with_the_audit(tmp_path):
    """Even when that is killed."""
    seconds = f"1000.{os.getpid()}7"
    waiting = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import confined, os, pathlib; " \
              f"confined.run(['sleep', '{seconds}'], os.environ, pathlib.Path({str(tmp_path)!r}), 1000)"
    process = subprocess.Popen([sys.executable, "-c", waiting])
    try:
        wait_until(lambda: is_running(seconds))
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not is_running(seconds))


def wait_until(holds, seconds: float = 20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(argument: str) -> bool:
    """Whether a process has such an argument of its own, and not as a part of a longer one."""
    found = False
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found = found or argument.encode() in file.read_bytes().split(b"\0")
    return found


def test_where_namespaces_are_forbidden_nothing_is_confined(tmp_path, monkeypatch):
    monkeypatch.setattr(confined, "UNSHARE", ["unshare", "--no-such-namespace"])
    confined.obstacle.cache_clear()
    try:
        ended = run_confined(tmp_path, "print('said')")
    finally:
        confined.obstacle.cache_clear()
    assert ended == (0, "", False) and (tmp_path / "folder/out.txt").read_text() == "said\n"


def test_what_a_program_wrote_is_read_only_if_it_is_a_file(tmp_path):
    (tmp_path / "secret").write_text("secret")
    ended = run_confined(tmp_path, """
        import os
        os.remove("err.txt")
        os.symlink("../secret", "err.txt")
        1 / 0
        """)
    assert ended.status == 1 and ended.last_words == ""
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "folder/err.txt", "folder", "none"):
        with pytest.raises(OSError):
            confined.read_regular(tmp_path / name)
    with pytest.raises(OSError, match="too large"):
        confined.read_regular(tmp_path / "secret", 5)
    assert confined.read_regular(tmp_path / "secret") == b"secret"


# Mistakes


@pytest.mark.parametrize("source,said", [
    ("import sys; sys.exit(0)", "ended with status 0, without scores when it was to score all"),
    ("print('another program')", "without scores"),
    ("1 / 0", "ended with status 1 when it was to score all: ZeroDivisionError"),
    ("import time; time.sleep(1000)", "had not scored all after 2 s")])
def test_a_script_that_scores_nothing_ends_in_one_line(finished, capsys, tmp_path, source, said):
    script, file = tmp_path / "script.py", tmp_path / "audit.json"
    script.write_text(source)
    assert audit.main([str(finished), "--script", str(script), "--timeout", "2", "--write", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {script} ") and err.count("\n") == 1 and said in err
    assert not file.exists()


def test_verdicts_are_not_written_through_a_link(finished, capsys, tmp_path):
    """A run's folder holds what somebody else put there."""
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "audit.json").symlink_to(tmp_path / "kept")
    assert audit.main([str(finished), "--write", str(tmp_path / "audit.json")]) == 2
    assert "is a link" in capsys.readouterr().err and (tmp_path / "kept").read_text() == "kept"


def test_mistakes_end_in_one_line(finished, in_process, capsys, monkeypatch, tmp_path):
    without = with_result(tmp_path / "without", finished)
    (without / "result.json").unlink()
    others = [with_result(tmp_path / name, finished, **{name: value}) for name, value in (
        ("val_loss", "low"), ("clocks", {}), ("caveats", None), ("settings", []))]
    (tmp_path / "damaged").mkdir()
    for name in ("final_model.int6.ptz", "result.json"):
        (tmp_path / "damaged" / name).write_bytes(b"PGOLF\xff")
    for arguments, said in (((tmp_path,), "final_model.int6.ptz"), ((without,), "result.json"),
                            *(((other,), "result.json") for other in (*others, tmp_path / "damaged")),
                            ((finished, "--documents", 3), "too few"),
                            ((finished, "--script", tmp_path / "none.py"), "none.py"),
                            ((finished, "--skip", *OPTIONAL, "--write", tmp_path / "none/a"),
                             "none")):
        assert audit.main(list(map(str, arguments))) == 2, arguments
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert audit.main([str(finished)]) == 2
    assert f"DATA_DIR={tmp_path}" in capsys.readouterr().err


# On a GPU


KEPT_ADAPTERS = PLANTED["state kept between documents"][0]


@pytest.mark.parametrize("noise,planted,passes", [(0.003, "", True), (0.003, KEPT_ADAPTERS, False),
                                                  (0.05, "", False)])
def test_noise_of_a_gpu_is_measured(finished, in_process, capsys, monkeypatch, tmp_path, noise, planted,
                                    passes):
    """Losses that differ a little each time, as on a GPU, are no fault.

    But such noise hides none, and it has a limit.
    """
    exact_score, rng = audit.Program.score, np.random.default_rng(0)

    def noisy_score(*args):
        rescore = exact_score(*args)
        losses = rescore.losses + noise * rng.standard_normal(len(rescore.losses))
        factor = losses.mean() / rescore.losses.mean()
        said = {name: factor * rescore.result[name] for name in ("val_loss", "val_bpb")}
        return rescore._replace(losses=losses, result={**rescore.result, **said})

    monkeypatch.setattr(audit.Program, "score", noisy_score)
    monkeypatch.setattr(audit, "on_gpu", lambda: True)
    script = copy_with(tmp_path, planted)
    skipped = "ours", "rest", "all"
    status, lines = verdicts_of(capsys, finished, "--script", script, "--seed", 0, "--skip", *skipped)
    assert status == (not passes), "\n".join(lines)
    assert passes or "documents independent" in failed(lines)


def test_noise_buys_no_surplus_of_probability(finished, in_process, capsys, monkeypatch):
    """It leaves room at each place, but not in the mean over all."""
    exact_score, rng = audit.Program.score, np.random.default_rng(0)

    def cheating_score(*args):
        rescore = exact_score(*args)
        noise = 0.01 * rng.standard_normal(len(rescore.losses))
        losses = np.maximum(0.0, rescore.losses - 0.01 + noise)
        factor = losses.mean() / rescore.losses.mean()
        said = {name: factor * rescore.result[name] for name in ("val_loss", "val_bpb")}
        return rescore._replace(losses=losses, result={**rescore.result, **said})

    monkeypatch.setattr(audit.Program, "score", cheating_score)
    monkeypatch.setattr(audit, "on_gpu", lambda: True)
    skipped = OPTIONAL - {"reversed", "rest"}
    _, lines = verdicts_of(capsys, finished, "--seed", 0, "--skip", *skipped)
    (line,) = [line for line in lines if "in the mean over" in line and "places" in line]
    assert line.startswith("FAIL         full distribution"), "\n".join(lines)


def test_honest_sums_of_probabilities_pass():
    """Those of logs/2026-11-26_4xH200_full/audit.txt."""
    text = (ROOT / "logs/2026-11-26_4xH200_full/audit.txt").read_text()
    sums = [float(figure) for figure in re.findall(r"sum of p is ([\d.]+),", text)]
    trial = audit.Audit(run=None, data=None, program=None, sets=None, gpu=True)
    trial.surplus(sums)
    assert len(sums) == 5 and trial.by_rule()["full distribution"] == "pass"


def test_what_counts_as_noise():
    rng = np.random.default_rng(0)
    before = [rng.uniform(1, 5, count) for count in (50, 80, 120, 60)]  # losses by document

    def moved(change):
        return audit.Moved.of([(losses, losses + change(len(losses))) for losses in before])

    assert moved(lambda n: 0.0).little(None) and moved(lambda n: 1e-6).little(None)
    assert not moved(lambda n: 1e-4).little(None)
    nothing = audit.Moved.of([])
    assert nothing.little(None) is None and nothing.little(0.01) is None, "nothing was compared"
    noise = moved(lambda n: 0.002 * rng.standard_normal(n))
    limit = 4 * noise.rms
    assert not noise.little(None) and noise.little(limit)
    assert not moved(lambda n: 0.1 * rng.standard_normal(n)).little(limit), "it spreads too widely"
    assert not moved(lambda n: 0.003 + 0.0001 * rng.standard_normal(n)).little(limit), "it drifts"
    assert not moved(lambda n: np.where(np.arange(n) == 3, np.nan, 0.0)).little(limit), "it is no number"


def test_noise_that_all_comparisons_share_is_no_drift():
    """They compare with the same losses, so that more of them make the mean no more certain."""
    noise = np.random.default_rng(0).standard_normal(64)
    noise = (noise - noise.mean()) / noise.std()  # by document
    for mean, spread, passes in ((8e-4, 0.004, True), (8e-4, 0.001, False), (3e-3, 0.04, False)):
        trial = audit.Audit(run=None, data=None, program=None, sets=None, gpu=True)
        for number, offset in enumerate(mean + spread * noise):
            trial.pairs[number] = [(np.zeros(50), np.full(50, offset))] * 5
        trial.all_comparisons(readable=[])
        assert (trial.by_rule()["no drift"] == "pass") == passes, "there is a limit to what noise excuses"
        assert f"+- {spread / 8:.0e}" in trial.verdicts[0].figures


# Alterations


def alterations(data: Path, **settings) -> altered.Alterations:
    few = dict(vocab_size=VOCAB_SIZE, ttt_chunk_size=8, ttt_batch_size=4)
    settings = {**audit.RECORD, **few, **settings}
    validation = altered.Data.read(data, settings)
    return altered.Alterations(validation, [*range(len(validation.starts))], settings, seed=0)


def test_what_weighs_most_in_the_headline_is_chosen(data):
    validation = altered.Data.read(data, {**audit.RECORD, "vocab_size": VOCAB_SIZE})
    lengths = np.diff(validation.starts, append=len(validation.tokens))
    longest, shortest = int(lengths.argmax()), int(lengths.argmin())
    losses = [np.full(length, 3.0) for length in lengths]
    losses[shortest][:5] = 0.0
    for seed in range(20):
        chosen = altered.choose(validation, losses, 4, seed)
        assert {longest, shortest} < {*chosen} and len({*chosen}) == 4 and chosen == sorted(chosen)
        assert longest in altered.choose(validation, [], 4, seed)
    everybody = {number for seed in range(20) for number in altered.choose(validation, [], 4, seed)}
    assert len(everybody) == len(lengths)


@pytest.mark.parametrize("chunk,growth", [(2, 0.0), (16, 0.0), (48, 0.0), (8, 0.2)])
def test_places_lie_inside_chunks_that_are_learned_from(data, chunk, growth):
    sets = alterations(data, ttt_chunk_size=chunk, ttt_chunk_growth=growth, ttt_eval_seq_len=200)
    ends = tg.chunk_ends(500, tg.Config(ttt_chunk_size=chunk, ttt_chunk_growth=growth, ttt_eval_seq_len=200))
    assert sets.ends.tolist() == ends[: len(sets.ends)].tolist(), "the script learns at other places"
    for length in [*range(1, 100)] * 5:
        place = sets.place(sets.documents[0][:length])
        if place:
            assert 2 <= place < length and place - 1 not in ends
            assert length <= chunk or np.searchsorted(ends, place) < np.searchsorted(ends, length)
        else:
            assert length < 3


@pytest.mark.parametrize("chunk", [1, 2, 48])
def test_other_places_lie_anywhere(data, chunk):
    """Also where no token lies inside a chunk, and at the first target of every chunk."""
    sets = alterations(data, ttt_chunk_size=chunk, ttt_chunk_growth=0.0)
    document = max(sets.documents, key=len)
    places = [sets.anywhere(document) for _ in range(30 * len(document))]
    assert {*places} == {*range(2, len(document))}
    firsts = np.isin(np.array(places) - 1, sets.ends).mean()
    assert chunk == 1 or 0.45 < firsts < 0.9
    assert [sets.anywhere(document[:length]) for length in (1, 2, 3)] == [0, 0, 2]
    tails = [case.change for case in sets.tails() if case.change not in ("", "added")]
    assert tails.count("tail anywhere") == (4 if chunk == 1 else 2) and len(tails) == 4


def test_places_and_what_comes_there_lie_inside_words_too(data):
    sets = alterations(data)
    spaced, document = sets.pieces.spaced, max(sets.documents, key=len)
    at_words = spaced[document[[sets.place(document) for _ in range(300)]]].mean()
    begin = [sets.ending(3, document[9])[0] for _ in range(300)]
    assert 0.55 < at_words < 0.8 and 0.4 < spaced[begin].mean() < 0.6
    assert document[9] not in begin or spaced[document[9]]


def sets_of(sets: altered.Alterations) -> dict[str, list[altered.Case]]:
    rest = sets.rest(sets.beginnings([30], [np.full(len(tokens), 2.0) for tokens in sets.documents]))
    names = "unaltered", "reversed", "tails", "lengths"
    return {**{name: getattr(sets, name)() for name in names}, "rest": rest}


def test_altered_documents_are_as_they_were_up_to_there(data):
    sets = alterations(data)
    bos, unknown = sets.pieces.bos, sets.pieces.unknown
    by_name = sets_of(sets)
    changes = {name: {case.change for case in cases} for name, cases in by_name.items()}
    assert changes == {"unaltered": {""}, "reversed": {""}, "tails": {"", "tail", "tail anywhere", "added"},
                       "lengths": {"", "cut", "continued", "added"},
                       "rest": {"", "added", "random", "repeating", "random end", "next"}}
    for case in (case for cases in by_name.values() for case in cases):
        assert case.tokens[0] == bos and bos not in case.tokens[1:]
        if case.number >= 0:
            before = sets.documents[case.number]
            assert (case.tokens[: case.kept + 1] == before[: case.kept + 1]).all()
            assert bool(case.change) == (case.tokens.tolist() != before.tolist())
    variants = [case for case in by_name["rest"] if case.change == "next"]
    (_, first), (_, last) = sets.beginnings([], [])[-2:]
    lengths = {case.beginning: case.kept + 1 for case in variants}
    assert lengths == {0: 9, 1: 30, 2: 10, 3: first, 4: last}
    tokens = [[token] for token in range(VOCAB_SIZE) if token not in (bos, unknown)]
    assert sorted(case.tokens[case.kept + 1 :].tolist() for case in variants) == sorted(5 * [[], *tokens])
    targets = sets.targets([30])
    for name, cases in by_name.items():
        assert 0.7 < sum(len(case.tokens) for case in cases) / targets[name] < 1.4, name


def test_the_place_of_a_likely_token_is_chosen(data):
    sets = alterations(data)
    losses = [np.full(len(tokens), 3.0) for tokens in sets.documents]
    losses[4][[4, 17, 20, 60]] = 0.4, 0.2, 0.45, 0.4  # the first is in a chunk of 8, the last beyond three
    *_, beginning, _, _ = sets.beginnings([], losses)  # the last are where a phrase comes again
    assert beginning == (4, 21)


def test_the_place_where_a_phrase_comes_again_is_chosen(data):
    sets = alterations(data)
    again = np.array([1, 9, 20, 21, 22, 23, 24, 30, 21, 22, 23, 24, 20, 21, 22, 23, 24, 20])
    once = np.arange(1, 100)
    sets.documents, sets.bases = [once, again], [once, again, again]
    assert sets.beginnings([], [])[-2:] == [(1, 16), (2, 17)], "20 to 24 again, and 21 to 24 and 20"
    sets.documents, sets.bases = [once], [once, once]
    assert sets.beginnings([], []) == [(0, 9)], "no phrase comes again"


def test_random_tokens_are_as_probable_as_said(data):
    """A model whose probabilities add up to 1 has a mean p / chance of 1: here one that repeats."""
    sets = alterations(data)
    for draw in (sets.random, sets.repeating):
        ratios = []
        for case in (draw(200) for _ in range(100)):
            assert len(case.tokens) == len(case.chances) == 201
            assert not sets.pieces.special[case.tokens[1:]].any()
            for place in range(2, 200):
                before = np.flatnonzero(case.tokens[: place - 1] == case.tokens[place - 1])
                p = 0.5 * sets.frequencies
                p[case.tokens[before[-1] + 1] if len(before) else case.tokens[place - 1]] += 0.5
                ratios.append(p[case.tokens[place]] / case.chances[place])
        assert abs(np.mean(ratios) - 1) < 4 * np.std(ratios) / len(ratios) ** 0.5


def test_a_discount_does_not_hide_behind_its_own_error():
    """Ratios of an honest script pass, and 0.2 nats less do not, even if some tokens cost nothing at all."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        honest = rng.lognormal(-0.5, 1.0, 20_000)  # of mean 1
        assert audit.at_most_1(honest)[0]
        discounted = np.exp(0.2) * honest
        assert not audit.at_most_1(discounted)[0]
        discounted[rng.random(20_000) < 3e-4] = 3000
        assert not audit.at_most_1(discounted)[0]


def test_random_ends_follow_documents_up_to_any_place(data):
    sets = alterations(data)
    kept = []
    for number, document in 50 * [*enumerate(sets.documents)]:
        case = sets.random_end(number)
        assert case.number == number and case.kept == np.isnan(case.chances).sum() - 1
        kept.append(int(np.isnan(case.chances).sum()))
        assert (case.tokens[: kept[-1]] == document[: kept[-1]]).all()
        assert len(case.tokens) == len(case.chances) == kept[-1] + 16 and (case.chances[kept[-1] :] > 0).all()
    lengths = np.array([len(document) for document in 50 * sets.documents])
    assert (np.array(kept) > lengths - 8).mean() > 0.4 and (np.array(kept) < lengths / 2).mean() > 0.15


def test_phrases_come_again_in_the_document_for_that(data):
    assert altered.ends_of_repeated_phrases(alterations(data).most_repeating.tokens)


def message(*fields: tuple[int, bytes]) -> bytes:
    """A message of protobuf of short fields of bytes."""
    return b"".join(bytes([8 * number + 2, len(value)]) + value for number, value in fields)


@pytest.mark.parametrize("hidden,found", [
    (message((7, b"data")), "a field 7"),
    (message((4, b"data")), "a field 4"),  # which SentencePiece knows, and no tokenizer needs
    (message((3, b"")), "settings more than once"),
    (message((2, b"")), "settings more than once"),
    (message((1, message((1, b"piece"), (9, b"d" * 20)) + b"\x15" + bytes(4))), "more than a short text, sc"),
    (b"\x0a\x84\x01" + message((1, b"d" * 123)) + b"\x15" + bytes(4) + b"\x18\x03", "more than a short text"),
    (message((1, message((1, b"piece")) + b"\x15" + np.float32(-0.5).tobytes())), "scores that are no ranks"),
    (message((1, b"\xff")), "a field of another form"),
    (b"\x0a", "a field of another form"),
    (b"\x38\x01", "a field 7"),  # a number
    (b"\x10\x01", "a field of another form"),
])
def test_what_a_tokenizer_needs_not_is_named(data, hidden, found):
    model = (data / f"tokenizers/fineweb_{VOCAB_SIZE}_bpe.model").read_bytes()
    assert altered.hiding_places(model) == []
    assert found in ", ".join(altered.hiding_places(model + hidden))


@pytest.mark.parametrize("number,field,found", [
    (2, (2, b"x" * 600), "bytes of settings of its training"),
    (3, (1, b"x" * 120), "bytes of settings of normalisation"),
    (3, (2, b"table"), "a table of normalisation that is not published")])
def test_long_settings_of_a_tokenizer_are_named(number, field, found):
    size = len(field[1])
    value = bytes([8 * field[0] + 2, size % 128 + 128, size // 128]) + field[1]
    long = bytes([8 * number + 2, len(value) % 128 + 128, len(value) // 128]) + value
    assert found in ", ".join(altered.hiding_places(long))


def test_a_tokenizer_that_hides_something_is_not_passed(finished, data, in_process, capsys, monkeypatch):
    monkeypatch.setattr(audit, "hiding_places", lambda model: ["a field 7"])
    _, lines = verdicts_of(capsys, finished, "--skip", *OPTIONAL)
    (line,) = [line for line in lines if "the tokenizer holds" in line]
    assert line.startswith("NOT CHECKED  confined") and "a field 7" in line


def test_random_texts_hold_nothing_but_text(data):
    """Padding before a space would be no text that decoding gives back."""
    sets = alterations(data)
    drawn = [case.tokens[1:] for case in sets_of(sets)["rest"] if case.change == "random"]
    assert drawn and not sets.pieces.special[np.concatenate(drawn)].any()


def test_documents_shorter_than_a_chunk_are_audited(data, in_process, capsys, tmp_path):
    """Other cases of `rest` are no tries of a next token, however short they are."""
    settings = {**TINY, **SHALLOW, "VOCAB_SIZE": VOCAB_SIZE, "ITERATIONS": 3, "TTT_CHUNK_SIZE": 64,
                "TTT_EVAL_SEQ_LEN": 96, "TTT_BATCH_SIZE": 32}
    assert tg.main(as_environment({**settings, "DATA_DIR": data, "ARTIFACT_DIR": tmp_path / "run"})) == 0
    capsys.readouterr()
    assert min(map(len, alterations(data).documents)) < 64
    status, lines = verdicts_of(capsys, tmp_path / "run", "--seed", 0, "--skip", *OPTIONAL - {"rest"})
    assert status == 0, lines


def test_altered_documents_are_text_of_their_tokenizer(data):
    """All of them where the script looks for that; it decodes and encodes the first 64 again."""
    tokenizer = tg.load_tokenizer(data / f"tokenizers/fineweb_{VOCAB_SIZE}_bpe.model", VOCAB_SIZE)
    for cases in sets_of(alterations(data)).values():
        tokenizer.check_source([case.tokens for case in cases][:64], data)


def test_bytes_are_counted_as_the_script_counts_them(data):
    sets = alterations(data)
    tokenizer = tg.load_tokenizer(data / f"tokenizers/fineweb_{VOCAB_SIZE}_bpe.model", VOCAB_SIZE)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 5000)
    assert (sets.pieces.target_bytes(tokens) == tokenizer.target_bytes(tokens)).all()


# Case operations


@pytest.fixture(scope="module")
def case_data(tmp_path_factory) -> Path:
    """Of a tokenizer that gives texts back."""
    return make_data(tmp_path_factory.mktemp("case"), "--case-ops", "v2")


@pytest.fixture(scope="module")
def sidecar_data(tmp_path_factory) -> Path:
    """Of a tokenizer that normalises, with side-cars, which count a byte more a document than its pieces."""
    folder = tmp_path_factory.mktemp("sidecar")
    with open(SMOKE / "smoke.jsonl", encoding="utf-8") as lines:
        texts = [case_ops.encode(json.loads(line)["text"], "v1") for line in lines]
    model = io.BytesIO()
    tg.lazy_import("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:200]), model_writer=model, vocab_size=VOCAB_SIZE, model_type="bpe",
        byte_fallback=True, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False,
        user_defined_symbols=list(case_ops.MARKERS), pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2)
    (folder / "a.model").write_bytes(model.getvalue())
    make_data(folder, "--case-ops", "v1", "--tokenizer", folder / "a.model", one_line=True)
    (path,) = folder.rglob("fineweb_val_000000.bin")
    tokens = altered.read_shard(path).astype(np.int64)
    sizes = np.append(0, load_tokenizer(folder).target_bytes(tokens))
    starts = np.flatnonzero(tokens == 1)
    sizes[np.append(starts[1:], len(tokens)) - 1] += 1
    altered.write_shard(altered.sidecar_of(path), sizes)
    return folder


def load_tokenizer(data: Path) -> tg.Tokenizer:
    return tg.load_tokenizer(data / f"tokenizers/fineweb_{VOCAB_SIZE}_bpe.model", VOCAB_SIZE)


@pytest.mark.parametrize("form", ["case_data", "sidecar_data"])
def test_an_honest_run_with_case_operations_passes(request, in_process, monkeypatch, capsys, tmp_path, form):
    """All comparisons, and the headline by the bytes of the raw text."""
    data = request.getfixturevalue(form)
    monkeypatch.setenv("DATA_DIR", str(data))
    run = finish_run(data, tmp_path / "run")
    capsys.readouterr()
    status, lines = verdicts_of(capsys, run, "--seed", 0, "--depth", 12)
    not_checked = "NOT CHECKED: raw text" if form == "sidecar_data" else "NOT CHECKED: none"
    assert status == 0 and failed(lines) == "none" and not_checked in lines, lines
    counted = json.loads((run / "result.json").read_text())["bytes"]
    (manifest,) = data.rglob("manifest.json")
    val = json.loads(manifest.read_text())["val"]
    more = val["documents"] if form == "sidecar_data" else -val["begin_with_space"]
    assert counted == val["text_bytes"] + more


def test_documents_whose_bytes_are_miscounted_are_found(case_data):
    data = altered.Data.read(case_data, {**audit.RECORD, "vocab_size": VOCAB_SIZE})
    assert data.miscounted() == 0
    more = data.token_bytes.copy()
    more[[data.starts[1], data.starts[2] - 2]] += 1  # the first and the last target of a document
    more[-1] -= 1
    assert data._replace(token_bytes=more).miscounted() == 2


@pytest.mark.parametrize("form", ["case_data", "sidecar_data"])
def test_bytes_with_case_operations_are_counted_as_the_script_counts_them(request, form):
    """Of tokens half of which are markers, a BOS first."""
    data = request.getfixturevalue(form)
    pieces = altered.Data.read(data, {**audit.RECORD, "vocab_size": VOCAB_SIZE}).pieces
    tokenizer = load_tokenizer(data)
    assert pieces.markers == list(tokenizer.markers) and pieces.exact == (form == "case_data")
    rng = np.random.default_rng(0)
    markers, others = rng.integers(4, 8, 20_000), rng.integers(0, VOCAB_SIZE, 20_000)
    tokens = np.where(rng.random(20_000) < 0.5, markers, others)
    tokens[0] = tokenizer.bos
    assert (pieces.target_bytes(tokens) == tokenizer.target_bytes(tokens)).all()
    escaped = np.isin(tokens, pieces.markers) & ~pieces.operations(tokens)
    assert escaped.sum() > 500


def test_altered_documents_of_a_tokenizer_that_drops_a_first_space_are_its_text(sidecar_data):
    """As the published tokenizers do: words at random need something in front."""
    tokenizer = load_tokenizer(sidecar_data)
    assert tokenizer.processor.encode(" a") == tokenizer.processor.encode("a")
    for cases in sets_of(alterations(sidecar_data)).values():
        tokenizer.check_source([case.tokens for case in cases][:64], sidecar_data)


@pytest.mark.parametrize("change", [
    lambda sizes: sizes[:-1], lambda sizes: sizes + 1, lambda sizes: np.append(sizes[:-1], sizes[-1] + 50)])
def test_side_cars_of_something_else_end_an_audit(sidecar_data, change):
    (path,) = sidecar_data.rglob("fineweb_val_bytes_000000.bin")
    honest = path.read_bytes()
    altered.write_shard(path, change(altered.read_shard(path)))
    with pytest.raises(altered.AuditError, match="does not hold the bytes of its shard"):
        altered.Data.read(sidecar_data, {**audit.RECORD, "vocab_size": VOCAB_SIZE})
    path.write_bytes(honest)


def test_seconds_of_a_re_score_are_foretold():
    """A run on two GPUs. Its audit on one took 140.1 s for all documents, 74.3 s for 9 % of their targets."""
    result = json.loads((ROOT / "logs/2026-11-27_2xH200_audit/result.json").read_text())
    run = SimpleNamespace(result=result, phases=result["phases"])
    assert audit.seconds_expected(run, 1.0, 1) == pytest.approx(140.1, rel=0.1)
    assert audit.seconds_expected(run, 156_666 / 1_772_312, 1) == pytest.approx(74.3, rel=0.1)
