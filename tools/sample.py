#!/usr/bin/env python3
"""Continue a text with a trained model: an artifact or a checkpoint, on a GPU or a CPU.

    DATA_DIR=data/smoke-v3 python tools/sample.py runs/x/final_model.int6.ptz "The city of"
    python tools/sample.py runs/x/final_model.pt --file text.txt --temperature 0.8 --top-p 0.9 --tokens 500

The text begins a document, and the continuation ends with the document or after --tokens. The model reads the
last --window tokens, by default as many as it was trained with. Adapters are off: nothing is learned from the
text. Without --tokenizer the tokenizer is that of DATA_DIR. If that is for case operations, its manifest.json
or --case-ops says of which form.
"""
import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any, Iterator

import command

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
with command.imports():
    import numpy as np
    import torch

    import case_ops
    import train_gpt as tg


class Sampler:
    """A trained model that draws one token after another."""

    def __init__(self, path: Path, window: int = 0):
        saved = tg.read_saved(path)
        self.tokenizer_sha256 = saved.tokenizer_sha256
        env = {**os.environ, "EVAL_ONLY_PATH": str(path)}
        self.cfg = cfg = tg.Config.from_env(env, saved.settings)
        self.device = tg.Ranks.join().device
        self.backend = tg.Backend.for_machine(cfg, self.device)
        self.plan = tg.depth_plan(cfg, cfg.loops_at_end)
        self.window = window or cfg.train_seq_len
        longest = max(cfg.train_seq_len, cfg.eval_seq_len, cfg.ttt_eval_seq_len)
        if not 0 < self.window <= longest:
            raise tg.UserError(f"--window {self.window} is out of range, from 1 to {longest}")
        model = tg.GPT(cfg).to(self.device)
        if saved.artifact:
            _, tensors = tg.unpack_artifact(saved.artifact, path)
            self.model = tg.restore(model, tensors)
        else:
            with tg.parsing(str(path)):
                self.model = model.with_weights(saved.weights)

    @torch.no_grad()
    def probabilities(self, tokens: list[int], temperature: float, top_p: float) -> torch.Tensor:
        """Distribution of the token that comes next, (vocab_size,) fp64 on the CPU.

        Of the most probable tokens as many as make up top_p; with a temperature of 0, the first alone.
        """
        logits = self.logits(tokens[-self.window :]).double().cpu()
        if temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
        p = (logits / temperature).softmax(0)
        sorted_p, order = p.sort(descending=True)
        before = sorted_p.cumsum(0) - sorted_p
        p[order[before >= top_p]] = 0
        return p / p.sum()

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits after the last of these tokens, softcap included, (vocab_size,)."""
        found = []

        def hook(site, x, y, scale=None):
            if site == "head":
                found.append(y[-1].float())
            return y

        array = np.array(tokens)
        batch = tg.make_batch(array, array, np.array([0, len(array)]), 1, len(array))
        self.model(tg.to_device(batch, self.device), self.plan, self.backend, lambda visit, layer: hook)
        softcap = self.cfg.logit_softcap
        return softcap * torch.tanh(found[0] / softcap)

    def continue_text(self, tokens: list[int], bos: int, count: int, temperature: float, top_p: float,
                      seed: int) -> Iterator[int]:
        """At most `count` further tokens, until the document ends, which is where a BOS is drawn."""
        tokens = list(tokens)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            p = self.probabilities(tokens, temperature, top_p)
            token = int(torch.multinomial(p, 1, generator=generator))
            if token == bos:
                return
            tokens.append(token)
            yield token


class Language:
    """A tokenizer, and the transform of the text before it, if there is one."""

    def __init__(self, processor: Any, transform: str):
        self.processor = processor  # sentencepiece's
        self.transform = transform

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(case_ops.encode(text, self.transform) if self.transform else text)

    def decode(self, tokens: list[int]) -> str | None:
        """Their text, as far as it cannot change with what follows; None where it is none yet, or no text."""
        written = self.processor.decode(tokens).rstrip("\ufffd")  # of a character some bytes may be to come
        if not self.transform:
            return written
        with contextlib.suppress(case_ops.CaseError):
            return case_ops.decode(written.rstrip(case_ops.MARKERS + " "), self.transform)
        return None


def open_language(args: argparse.Namespace, sampler: Sampler) -> tuple[Language, int]:
    """(language, BOS). UserError if the tokenizer is not the model's, or of another transform."""
    path, transform = args.tokenizer, args.case_ops
    if not path:
        files = tg.find_data(sampler.cfg, need_train=False)
        path = files.tokenizer
        transform = transform or tg.Manifest.read(files.manifest, lambda *line: None).case_ops
    tokenizer = tg.load_tokenizer(path, sampler.cfg.vocab_size)
    if sampler.tokenizer_sha256 not in ("", tokenizer.sha256):  # older models do not name theirs
        raise tg.UserError(f"{path} is not the tokenizer that {args.model} was trained with")
    if bool(tokenizer.markers) != bool(transform) or transform not in ("", *case_ops.VERSIONS):
        wanted = f"one of {', '.join(case_ops.VERSIONS)}" if tokenizer.markers else "none"
        raise tg.UserError(f"--case-ops {transform!r}: for {path} it has to be {wanted}")
    return Language(tokenizer.processor, transform), tokenizer.bos


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def whole(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise ValueError
    return value


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="final_model.int6.ptz or final_model.pt of a run")
    parser.add_argument("text", nargs="?", default="", help="how the document begins (empty)")
    parser.add_argument("--file", type=Path, help="read the text from this file")
    parser.add_argument("--tokens", type=whole, default=200, help="most tokens to draw (200)")
    parser.add_argument("--temperature", type=not_negative, default=1.0,
                        help="divides the logits; 0: always the most probable token (1)")
    parser.add_argument("--top-p", type=fraction, default=1.0,
                        help="draw from the most probable tokens that make up this much (1)")
    parser.add_argument("--seed", type=whole, default=0, help="of the draws (0)")
    parser.add_argument("--window", type=whole, default=0, help="tokens to read; default: TRAIN_SEQ_LEN")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model; default: that of DATA_DIR")
    parser.add_argument("--case-ops", default="", help="v1, v2 or v3; default: as DATA_DIR's manifest says")
    return parser.parse_args(argv)


def text_to_continue(args: argparse.Namespace) -> str:
    """That of --file or of the command line; UserError if it is no text."""
    try:
        if args.file:
            return tg.read_file(args.file).decode()
        args.text.encode()
        return args.text
    except UnicodeError as error:
        raise tg.UserError(f"{args.file or 'the text'} is not UTF-8: {error}") from error


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        text = text_to_continue(args)
        sampler = Sampler(args.model, args.window)
        language, bos = open_language(args, sampler)
        tokens = language.encode(text)
        shown = language.decode(tokens) or ""
        shown = text if text.startswith(shown) else shown  # a tokenizer may change text
        print(text, end="", flush=True)
        draws = args.temperature, args.top_p, args.seed
        for token in sampler.continue_text([bos, *tokens], bos, args.tokens, *draws):
            tokens.append(token)
            decoded = language.decode(tokens) or ""
            if len(decoded) > len(shown):
                print(decoded[len(shown) :], end="", flush=True)
                shown = decoded
        print()
    except tg.UserError as error:
        return command.report(error)
    return 0


if __name__ == "__main__":
    command.run(main)
