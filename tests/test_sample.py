"""tools/sample.py draws from the distribution that the model is scored by."""
import itertools
import json
import sys

import numpy as np
import pytest
import torch

import train_gpt as tg
from conftest import ROOT, SMOKE, TINY

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "data")]
import sample

import case_ops
import prepare

TOKENIZER = SMOKE / "tokenizers/fineweb_1024_bpe.model"
BEGINNING = [1, 500, 600, 700]


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("sampled") / "run"
    env = {**TINY, "DATA_DIR": tiny_data, "ARTIFACT_DIR": folder, "TTT_ENABLED": 0}
    assert tg.main({name: str(value) for name, value in env.items()}) == 0
    return folder


@pytest.fixture(scope="module", params=["final_model.int6.ptz", "final_model.pt"])
def sampler(finished, request):
    return sample.Sampler(finished / request.param)


def test_probabilities_are_those_of_the_score(sampler):
    """Minus their logarithm is the loss of every token that could come next."""
    p = sampler.probabilities(BEGINNING, temperature=1.0, top_p=1.0)
    batches = []
    for token in (4, 77, 1023):
        tokens = np.array(BEGINNING)
        targets = np.append(tokens[1:], token)
        batches.append(tg.make_batch(tokens, targets, np.array([0, len(tokens)]), 1, 64))
    losses = torch.stack([sampler.model(batch, sampler.plan)[-1].detach() for batch in batches]).double()
    torch.testing.assert_close(p[[4, 77, 1023]], (-losses).exp(), rtol=1e-5, atol=0)
    assert p.sum().item() == pytest.approx(1)


def test_temperature_and_top_p(sampler):
    p = sampler.probabilities(BEGINNING, temperature=1.0, top_p=1.0)
    sharper = sampler.probabilities(BEGINNING, temperature=0.5, top_p=1.0)
    torch.testing.assert_close(sharper, p.square() / p.square().sum())
    greedy = sampler.probabilities(BEGINNING, temperature=0, top_p=0.5)
    assert greedy.nonzero().tolist() == [[p.argmax().item()]]
    few = sampler.probabilities(BEGINNING, temperature=1.0, top_p=0.3)
    kept = few > 0
    assert p[kept].sum() >= 0.3 > p[kept].sum() - p[kept].min(), "as few of them as make up top_p"
    assert p[kept].min() >= p[~kept].max(), "and the most probable ones"


def test_a_seed_makes_a_text_and_another_seed_another(sampler):
    def draw(seed):
        return list(sampler.continue_text(BEGINNING, 1, 20, 1.0, 1.0, seed))

    assert draw(0) == draw(0) != draw(1)
    assert all(token != 1 for token in draw(0) + draw(1)), "a BOS ends the document"


def test_the_window_slides(sampler):
    """What lies further back than the window does not matter, and a text may grow longer than it."""
    long = [1, *range(4, 4 + 100)]
    other = [1, *range(104, 104 + 40), *long[41:]]
    short = sample.Sampler.__new__(sample.Sampler)
    short.__dict__ = {**sampler.__dict__, "window": 20}
    assert torch.equal(short.probabilities(long, 1.0, 1.0), short.probabilities(other, 1.0, 1.0))
    assert not torch.equal(sampler.probabilities(long, 1.0, 1.0), sampler.probabilities(other, 1.0, 1.0))
    assert len(list(short.continue_text(long, -1, 30, 1.0, 1.0, 0))) == 30


def test_the_command_prints_the_text_and_its_continuation(finished, capfd):
    model, tokenizer = str(finished / "final_model.int6.ptz"), ["--tokenizer", str(TOKENIZER)]
    command = [model, "The café", "--tokens", "12", *tokenizer]
    assert sample.main(command) == 0
    out, err = capfd.readouterr()
    assert out.startswith("The café") and len(out) > len("The café") and not err
    assert sample.main(command) == 0 and capfd.readouterr().out == out, "the same again"
    assert sample.main([model, "The café", "--tokens", "0", *tokenizer]) == 0
    assert capfd.readouterr().out == "The café\n"


@pytest.mark.parametrize("transform", case_ops.VERSIONS)
def test_text_with_case_operations_is_read_as_it_was(transform):
    """Token by token, nothing is shown that changes later, and no marker."""
    with open(SMOKE / "smoke.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"][:600] for line in itertools.islice(lines, 40)]
    written = (case_ops.encode(text, transform) for text in texts)
    model = prepare.train_tokenizer(written, 400, 10**6, case_ops.MARKERS)
    language = sample.Language(prepare.open_tokenizer(model, "the tokenizer"), transform)
    for text in ("The NASA launch. iPhone it is.\nÉ \ue001 end", *texts[:5]):
        tokens = language.encode(text)
        for count in range(len(tokens)):
            shown = language.decode(tokens[:count])
            assert shown is None or text.startswith(shown), (shown, text[: len(shown) + 5])
        assert language.decode(tokens) == text.rstrip(" ")
    operation = language.processor.piece_to_id(case_ops.TITLE)
    assert language.decode([operation, language.processor.piece_to_id(".")]) is None, "no text is written so"


def test_a_transform_belongs_to_its_tokenizer(finished, capfd):
    model = str(finished / "final_model.int6.ptz")
    assert sample.main([model, "--tokenizer", str(TOKENIZER), "--case-ops", "v2"]) == 2
    assert "--case-ops 'v2'" in capfd.readouterr().err


@pytest.fixture(scope="module")
def foreign(finished, tmp_path_factory):
    """Files that are not what they are given for."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "no.model").write_bytes(b"text")
    changed = bytearray(TOKENIZER.read_bytes())
    changed[-1] ^= 1
    (folder / "changed.model").write_bytes(changed)
    (folder / "no.pt").write_bytes(b"text")
    checkpoint = torch.load(finished / "final_model.pt", weights_only=True)
    checkpoint["weights"].popitem()
    torch.save(checkpoint, folder / "other.pt")
    return folder


@pytest.mark.parametrize("options,said", [
    (["{model}", "--file", "{foreign}/latin.txt"], "{foreign}/latin.txt is not UTF-8"),
    (["{model}", "caf\udce9"], "the text is not UTF-8"),
    (["{model}", "--tokenizer", "{foreign}/no.model"], "{foreign}/no.model"),
    (["{model}", "--tokenizer", "{foreign}/changed.model"], "{foreign}/changed.model is not the tokenizer"),
    (["{foreign}/no.pt"], "{foreign}/no.pt"), (["{foreign}/other.pt"], "{foreign}/other.pt"),
    (["\udcff\n.pt"], r"\udcff\n.pt: No such file"),
    (["{model}", "--window", "9999", "--tokenizer", str(TOKENIZER)], "--window 9999"),
    (["/nowhere.pt"], "/nowhere.pt"),
    (["{model}", "--tokenizer", "/nowhere.model"], "/nowhere.model"),
    (["{model}", "--file", "/nowhere.txt", "--tokenizer", str(TOKENIZER)], "/nowhere.txt")])
def test_mistakes_end_in_one_line(finished, foreign, capfd, options, said):
    model = str(finished / "final_model.int6.ptz")
    assert sample.main([option.format(model=model, foreign=foreign) for option in options]) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    assert said.format(foreign=foreign) in err


@pytest.mark.parametrize("options", [["--temperature", "-1"], ["--top-p", "0"], ["--tokens", "x"],
                                     ["--seed", str(2**63)]])
def test_impossible_options_are_refused(options, capfd):
    with pytest.raises(SystemExit) as end:
        sample.main(["model.pt", *options])
    assert end.value.code == 2 and options[0] in capfd.readouterr().err
