"""For tools/audit.py: a validation set, read without the audited script, and altered sets made from it."""
import re
import struct
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple

import confined
import numpy as np
import sentencepiece

from finished_runs import fineweb_cut, has_fineweb_bytes, sha256

TOKENIZED_AGAIN = 64  # so many first documents the script tokenizes again, to know its tokenizer
RANDOM_TOKENS = 40_000  # at least so many are drawn, to see whether probabilities add up to 1 on average
PASSAGE_BEGINS, PASSAGE_GOES_ON = 0.125, 0.75  # probabilities, at each token of a repeating document
REPEATING_TOKENS = 100  # of the one in which places are tried
LIKELY = 0.4  # nats: the loss of a token with p = 2/3
PHRASE_TOKENS = 5
MOST_DEPTH = 200  # most tokens before a tried place; does not depend on the chunk size of the artifact
MARKERS = "\ue001\ue002\ue003\ue004"  # of case operations, the last of which escapes
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
KNOWN_NORMALIZATIONS = {  # SHA-256 of the tables by which tokenizers normalise text
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",  # none
    "79372c41389c2b9b29bc171017ab5400e352debd686b02670a42bec709015074",  # of the published plain tokenizer
    "51d3684747b35ef99cd4802f37cc1ee0c6bec4d060814f774efb1066d3c167f2",  # of that with case operations
    "1e2c7b43d3ee9755ceaa2ac335e253d8703604e0249ee1e81156c92b46423844",  # nmt_nfkc of SentencePiece 0.2.3
    "2c03512e62f9ed965ec90d85314211b63b5b8aa0395311ea2147eec9ff738907",  # its nmt_nfkc_cf
    "7e46d9e08af4b6a37991b04fb8388644c1595a0abcd0f26d6a5d575e2a3663ea",  # its nfkc
    "d8dfef3d6db0eef0742f8b55a73aee7fce6c1e21d26a09b8d3d4b52c42a791cb",  # its nfkc_cf
}


class AuditError(Exception):
    """Why there can be no verdict."""


def read(path: Path) -> bytes:
    """The bytes of a file, which a link may lead to, but no pipe or device."""
    try:
        return confined.read_regular(path.resolve())
    except OSError as error:
        raise AuditError(f"cannot read {path}: {error.strerror}") from error


def read_shard(path: Path) -> np.ndarray:
    data = read(path)
    magic, version, count = np.frombuffer(data[:12].ljust(12, b"\0"), dtype="<i4").tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or len(data) != HEADER_BYTES + 2 * count or not count:
        raise AuditError(f"{path} is not a token shard, or damaged")
    return np.frombuffer(data, dtype="<u2", offset=HEADER_BYTES)


def write_shard(path: Path, tokens: np.ndarray):
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def sidecar_of(shard: Path) -> Path:
    """The file that holds the bytes of every token of a validation shard, in the form of a shard."""
    return shard.with_name(shard.name.replace("_val_", "_val_bytes_"))


def message_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message of protobuf, (number, value); ValueError or IndexError if it is none."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            shift += 7
            at += 1
            if data[at - 1] < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}.get(kind, len(data) + 1)
            if at + size > len(data):
                raise ValueError("it is cut off")
            yield number, data[at : at + size]
            at += size


def hiding_places(model: bytes) -> list[str]:
    """What a tokenizer's file holds that BPE does not need: anything could be hidden in it.

    SentencePiece writes the rank of a piece as its score, and in the settings of its training a path or two.
    """
    faults_of = {1: piece_faults, 2: trainer_faults, 3: normalizer_faults}
    found, numbers, ranks = [], [], []
    try:
        for number, value in message_fields(model):
            numbers.append(number)
            if number in faults_of:
                fields = dict(message_fields(value))
                found += faults_of[number](len(value), fields)
            else:
                found.append(f"a field {number}")
            if number == 1 and is_learned(fields):
                ranks.append(-score(fields))
    except (ValueError, IndexError, KeyError, TypeError, struct.error):
        found.append("a field of another form")
    if numbers.count(2) > 1 or numbers.count(3) > 1:
        found.append("settings more than once")
    if ranks != [*range(len(ranks))]:
        found.append("scores that are no ranks")
    return [*dict.fromkeys(found)]


def is_learned(piece: dict[int, Any]) -> bool:
    return piece.get(3, 1) == 1  # its kind; others are control, unknown, byte and user-defined pieces


def score(piece: dict[int, Any]) -> float:
    return struct.unpack("<f", piece[2])[0]


def piece_faults(size: int, fields: dict[int, Any]) -> Iterator[str]:
    most = min(len(fields[1]), 100) + 10  # 16 characters; tags, lengths, score and kind take at most 10 bytes
    if set(fields) - {1, 2, 3} or size > most or (score(fields) and not is_learned(fields)):
        yield "more than a short text, score and kind in a piece"


def trainer_faults(size: int, fields: dict[int, Any]) -> Iterator[str]:
    if size > 500:
        yield f"{size} bytes of settings of its training"


def normalizer_faults(size: int, fields: dict[int, Any]) -> Iterator[str]:
    table = fields.get(2, b"")
    if sha256(table) not in KNOWN_NORMALIZATIONS:
        yield "a table of normalisation that is not published"
    if size - len(table) > 100:
        yield f"{size - len(table)} bytes of settings of normalisation"


class Pieces(NamedTuple):
    """What the tokenizer's pieces stand for; arrays are (pieces,)."""
    bos: int
    unknown: int
    special: np.ndarray  # whether it is no text
    spaced: np.ndarray  # whether it begins with a space
    size: np.ndarray  # UTF-8 bytes without that space
    words: np.ndarray  # ids of pieces that begin with a space and come back when their text is tokenized
    first: list[int]  # what has to stand before words at a text's start; none if its first space is kept
    markers: list[int]  # ids of MARKERS, or none
    exact: bool  # whether it gives texts back

    @classmethod
    def read(cls, path: Path, vocab_size: int) -> "Pieces":
        data = read(path)
        try:
            sp = sentencepiece.SentencePieceProcessor(model_proto=data)
            pieces = [sp.id_to_piece(i) for i in range(len(sp))]
        except (RuntimeError, ValueError, IndexError) as error:
            raise AuditError(f"{path} is not a SentencePiece model") from error
        if len(pieces) != vocab_size or sp.bos_id() < 0:
            raise AuditError(f"{path} has {len(pieces)} pieces, the run's {vocab_size}, or it has no BOS")
        ids = range(vocab_size)
        special = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
        texts = [piece.removeprefix("\u2581") for piece in pieces]
        size = np.array([1 if sp.is_byte(i) else len(texts[i].encode()) for i in ids]) * ~special
        spaced = np.array([texts[i] != pieces[i] for i in ids]) & ~special
        with_space = np.flatnonzero(spaced & (size > 0)).tolist()
        first = sp.encode("a") if sp.encode(" a") == sp.encode("a") else []
        words = [i for i in with_space if sp.encode(sp.decode([*first, i])) == [*first, i]]
        markers = [i for i in map(sp.piece_to_id, MARKERS) if not special[i] and sp.get_score(i) == 0]
        exact = all(sp.decode(sp.encode(text)) == text for text in ("a  b", "a\nb", "a ", "\ufb01 \u00bd"))
        return cls(sp.bos_id(), sp.unk_id(), special, spaced, size,
                   np.array(words or np.flatnonzero(~special)), first,
                   markers if len(markers) == len(MARKERS) else [], exact)

    @property
    def tokens(self) -> np.ndarray:
        """All ids that may follow in a document: neither BOS nor the unknown piece, which no text has."""
        return np.setdiff1d(np.arange(len(self.size)), [self.bos, self.unknown])

    @property
    def texts(self) -> np.ndarray:
        """All ids that stand for text, or for operations on it."""
        return np.flatnonzero(~self.special)

    @property
    def parts(self) -> np.ndarray:
        """All ids of text that go on in a word."""
        return np.setdiff1d(np.flatnonzero(~self.special & ~self.spaced & (self.size > 0)), self.markers)

    @property
    def needs_sidecars(self) -> bool:
        """Whether the bytes of a text do not follow from its tokens."""
        return bool(self.markers) and not self.exact

    def operations(self, tokens: np.ndarray) -> np.ndarray:
        """Whether a token is a marker that no other escapes, and so no text."""
        if not self.markers:
            return np.zeros(len(tokens), dtype=bool)
        place = np.arange(len(tokens))
        last_other = np.maximum.accumulate(np.where(tokens == self.markers[-1], -1, place))
        escapes = (place - last_other) % 2 == 1  # of ESC in a row the first, the third ...
        return np.isin(tokens, self.markers) & ~np.append(False, escapes[:-1])

    def target_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of text that every token but the first adds, by the challenge's rule; operations add none."""
        operation = self.operations(tokens)
        last_text = np.maximum.accumulate(np.where(operation, 0, np.arange(len(tokens))))
        before, target = tokens[last_text[:-1]], tokens[1:]
        sizes = self.size[target] + (self.spaced[target] & ~self.special[before])
        return np.where(operation[1:], 0, sizes)


class Data(NamedTuple):
    """A validation set. Target j is token j + 1."""
    tokenizer: Path
    shards: list[Path]
    pieces: Pieces
    tokens: np.ndarray  # of the documents that were scored: all, unless VAL_DOC_FRACTION says otherwise
    token_bytes: np.ndarray  # of text, of every target
    starts: np.ndarray  # of these documents
    available: int  # documents that there are
    sha256: str  # of the tokens in all shards

    def known(self) -> bool:
        """Whether this is FineWeb's validation set, by documents, targets and bytes."""
        targets = len(self.token_bytes)
        at_cut = int(self.token_bytes[: fineweb_cut(targets)].sum())
        return has_fineweb_bytes(len(self.starts), targets, int(self.token_bytes.sum()), at_cut)

    @classmethod
    def read(cls, root: Path, settings: dict[str, Any]) -> "Data":
        vocab_size = settings["vocab_size"]
        folder = root / f"datasets/fineweb10B_sp{vocab_size}"
        shards = sorted(folder.glob("fineweb_val_[0-9]*.bin"))
        if not shards:
            raise AuditError(f"DATA_DIR={root}: there is no {folder}/fineweb_val_*.bin")
        tokenizer = root / f"tokenizers/fineweb_{vocab_size}_bpe.model"
        pieces = Pieces.read(tokenizer, vocab_size)
        stream = np.concatenate([read_shard(path) for path in shards])
        tokens = stream.astype(np.int64)
        starts = np.flatnonzero(tokens == pieces.bos)
        if tokens.max() >= vocab_size or not len(starts) or starts[0] != 0:
            raise AuditError(f"{folder} does not hold documents of {tokenizer}")
        token_bytes = pieces.target_bytes(tokens)
        if pieces.needs_sidecars:
            token_bytes = cls.read_sidecars(shards, pieces, tokens, int(token_bytes.sum()))
        if not token_bytes.any():
            raise AuditError(f"{folder} holds no text")
        count = max(1, round(settings["val_doc_fraction"] * len(starts)))
        end = starts[count] if count < len(starts) else len(tokens)
        return cls(tokenizer, shards, pieces, tokens[:end], token_bytes[: end - 1], starts[:count],
                   len(starts), sha256(stream.tobytes()))

    @staticmethod
    def read_sidecars(shards: list[Path], pieces: Pieces, tokens: np.ndarray, counted: int) -> np.ndarray:
        """The bytes of all targets by side-cars; AuditError if tokens or the table's count are others."""
        sizes = np.concatenate([read_shard(sidecar_of(path)) for path in shards]).astype(np.int64)
        fits = len(sizes) == len(tokens)
        fits = fits and not sizes[pieces.operations(tokens) | (tokens == pieces.bos)].any()
        if not fits or abs(sizes.sum() - counted) > 0.01 * counted:
            raise AuditError(f"{sidecar_of(shards[0])} or another does not hold the bytes of its shard")
        return sizes[1:]

    def miscounted(self) -> int:
        """How many documents have other bytes of text, as it is decoded, than are counted.

        A space that begins one does not count. Broken UTF-8 has bytes that no text has, and is left out.
        """
        counted = np.add.reduceat(np.append(0, self.token_bytes), self.starts).tolist()
        documents = [self.document(number)[1:].tolist() for number in range(len(self.starts))]
        texts = sentencepiece.SentencePieceProcessor(model_file=str(self.tokenizer)).decode(documents)
        if self.pieces.markers:
            texts = [re.sub(f"{MARKERS[-1]}(.)|[{MARKERS}]", r"\1", text, flags=re.DOTALL) for text in texts]
        return sum(size != len(text.encode()) - text.startswith(" ")
                   for size, text in zip(counted, texts) if "\ufffd" not in text)

    def document(self, number: int) -> np.ndarray:
        """A document from its BOS on."""
        return self.tokens[self.starts[number] : np.append(self.starts, len(self.tokens))[number + 1]]


class Case(NamedTuple):
    """A document of an altered set."""
    number: int  # of the document that it was made from; negative: of none that is compared
    tokens: np.ndarray
    kept: int  # so many of its first targets are as they were
    change: str = ""  # none; tail, tail anywhere, cut, continued, random end; added, random, repeating, next
    chances: np.ndarray | None = None  # with which its tokens were drawn, if they are random
    beginning: int | None = None  # of which beginning it tries a next token


def choose(data: Data, losses: list[np.ndarray], count: int, seed: int) -> list[int]:
    """The numbers of so many documents: the longest, some by length, some at random.

    With the losses of all documents a quarter are those that lower the mean the most.
    """
    rng, lengths = np.random.default_rng(seed), np.diff(data.starts, append=len(data.tokens))
    chosen = np.argsort(-lengths)[: min(2, count // 4)].tolist()
    if losses:
        mean = np.concatenate(losses).mean()
        chosen += np.argsort([(document - mean).sum() for document in losses])[: count // 4].tolist()
    by_length = rng.choice(len(lengths), count, replace=False, p=lengths / lengths.sum())
    chosen += [*by_length[: count // 4].tolist(), *rng.permutation(len(lengths)).tolist()]
    return sorted([*dict.fromkeys(chosen)][:count])


def chunk_ends(longest: int, settings: dict[str, Any]) -> np.ndarray:
    """Where the chunks of a document end, in targets, up to at least `longest`; each is learned from."""
    ends = [settings["ttt_chunk_size"]]
    while ends[-1] < longest:
        size = max(settings["ttt_chunk_size"], int(ends[-1] * settings["ttt_chunk_growth"]))
        ends.append(ends[-1] + min(size, settings["ttt_eval_seq_len"]))
    return np.array(ends)


def ends_of_repeated_phrases(tokens: np.ndarray) -> list[int]:
    """Where PHRASE_TOKENS tokens have come before: the places of the last of them."""
    seen, places = set(), []
    for end in range(PHRASE_TOKENS, len(tokens)):
        phrase = tokens[end + 1 - PHRASE_TOKENS : end + 1].tobytes()
        if phrase in seen:
            places.append(end)
        seen.add(phrase)
    return places


class Alterations:
    """Sets of documents made from some documents, each by the method that is named like its re-score.

    What comes in place of text could be text of this tokenizer, but where it begins inside a word, for random
    documents and tries of a next token: words at random, one passage again and again, a mosaic of passages.
    To learn from these is worth much, or little, so a choice by later losses differs.
    """

    def __init__(self, data: Data, numbers: list[int], settings: dict[str, Any], seed: int):
        documents, pieces = [data.document(i) for i in numbers], data.pieces
        self.numbers, self.documents, self.pieces, self.settings = numbers, documents, pieces, settings
        self.rng = np.random.default_rng(seed)
        self.ends = chunk_ends(max(map(len, documents)), settings)
        counts = (np.bincount(np.concatenate(documents), minlength=len(pieces.size)) + 1) * ~pieces.special
        self.frequencies = counts / counts.sum()  # of all pieces, 0 for those that are no text
        candidates = [self.repeating(REPEATING_TOKENS) for _ in range(8)]
        most = max(candidates, key=lambda case: len(ends_of_repeated_phrases(case.tokens)))
        self.most_repeating = most._replace(change="added", chances=None)  # chosen, and so not random
        self.bases = [*documents, self.most_repeating.tokens]  # what `beginnings` are from

    def targets(self, depths: list[int]) -> dict[str, int]:
        """About how many targets each set will have, by its name."""
        chunk, count = self.settings["ttt_chunk_size"], sum(map(len, self.documents))
        repetitions = [place for _, place in self.beginnings_of_repetitions()]
        tries = len(self.pieces.size) * sum((chunk, 2 * chunk, *depths, *repetitions))
        before, texts = (2 * chunk * number for number in (self.settings["ttt_batch_size"], TOKENIZED_AGAIN))
        return dict(unaltered=count, ours=count, reversed=count, tails=count + max(before, texts),
                    lengths=7 * count // 4 + texts, rest=5 * count // 2 + max(count, RANDOM_TOKENS) + tries)

    def words(self, count: int) -> np.ndarray:
        return self.rng.choice(self.pieces.words, count)

    def passage(self, count: int) -> np.ndarray:
        return np.resize(self.words(12), count)

    def ending(self, count: int, other_than: int) -> np.ndarray:
        """Text in place of the end of a document. In half of cases it begins inside a word."""
        text = self.words(count) if self.rng.random() < 0.5 else self.passage(count)
        parts = np.setdiff1d(self.pieces.parts, [other_than])
        if len(parts) and self.rng.random() < 0.5:
            text[0] = self.rng.choice(parts, p=self.frequencies[parts] / self.frequencies[parts].sum())
        return text

    def mosaic(self, count: int) -> np.ndarray:
        """Passages of a chunk from here and there in the documents: little of one helps in the next."""
        text, chunk = [], self.settings["ttt_chunk_size"]
        while len(text) < count:
            tokens = self.documents[int(self.rng.integers(len(self.documents)))]
            begin = np.flatnonzero(self.pieces.spaced[tokens])  # where words begin
            if len(begin):
                first = int(self.rng.choice(begin))
                text.extend(tokens[first : min(begin[begin >= first + chunk], default=len(tokens))])
            else:
                text.extend(self.words(chunk))
        return np.array(text)

    def added(self, text: np.ndarray) -> Case:
        return Case(-1, np.concatenate([[self.pieces.bos], self.pieces.first, text]).astype(int), 0, "added")

    def random(self, count: int) -> Case:
        """Tokens drawn one by one, by frequency: the mean of p / chance is at most 1 if all p add up to 1."""
        tokens = np.append(self.pieces.bos, self.rng.choice(len(self.frequencies), count, p=self.frequencies))
        return Case(-1, tokens, 0, "random", self.frequencies[tokens])

    def repeating(self, count: int) -> Case:
        """Random tokens in which passages come again: what adapters learn, and a discount on it, is in p."""
        _, tokens, _, _, chances, _ = self.random(count)
        source = 0  # where the token stands that would come again next; 0: nowhere
        for place in range(2, len(tokens)):
            if not source and self.rng.random() < PASSAGE_BEGINS:
                source = int(self.rng.integers(1, place))
            if source:
                expected = tokens[source]
                if self.rng.random() < PASSAGE_GOES_ON:
                    tokens[place] = expected
                goes_on = tokens[place] == expected
                by_frequency = self.frequencies[tokens[place]]
                chances[place] = PASSAGE_GOES_ON * goes_on + (1 - PASSAGE_GOES_ON) * by_frequency
                source = source + 1 if goes_on else 0
        return Case(-1, tokens, 0, "repeating", chances)

    def random_end(self, number: int) -> Case:
        """A beginning of a document, often all but its last tokens, and then tokens drawn by frequency."""
        document, chunk = self.documents[number], self.settings["ttt_chunk_size"]
        kept = self.anywhere(document) if self.rng.random() < 0.5 else 0
        kept = kept or int(self.rng.integers(max(1, len(document) - chunk), len(document) + 1))
        end = self.random(2 * chunk)
        tokens = np.append(document[:kept], end.tokens[1:])
        return Case(number, tokens, kept - 1, "random end", np.append(np.full(kept, np.nan), end.chances[1:]))

    def place(self, tokens: np.ndarray) -> int:
        """A token of a document to alter, 0 if it is too short; target j is token j + 1.

        The target that it is lies inside a chunk, not first in it and, if it can be, in one that is learned
        from. If it can be, it begins a word, and in a third of cases it does not.
        """
        length = len(tokens)
        learned = self.learned_targets(tokens)
        last = learned if learned > 1 else length - 1
        places = 1 + np.setdiff1d(np.arange(1, last), self.ends)
        wanted = self.pieces.spaced[tokens[places]] == (self.rng.random() < 2 / 3)
        places = places[wanted] if wanted.any() else places
        return int(self.rng.choice(places)) if len(places) else 0

    def anywhere(self, tokens: np.ndarray) -> int:
        """A token of a document to alter, wherever it stands, 0 if it is too short.

        In half of cases it is the first target of a chunk, if there is one.
        """
        firsts = 1 + self.ends[self.ends < len(tokens) - 1]
        if len(firsts) and self.rng.random() < 0.5:
            return int(self.rng.choice(firsts))
        return int(self.rng.integers(2, len(tokens))) if len(tokens) > 2 else 0

    def learned_targets(self, tokens: np.ndarray) -> int:
        """So many first targets of a document are in chunks that are learned from."""
        return max((end for end in self.ends.tolist() if end < len(tokens)), default=0)

    def late_place(self, tokens: np.ndarray) -> int:
        """A token of a document to alter that stands in its last chunk, which nothing is learned from."""
        places = np.arange(self.learned_targets(tokens) + 2, len(tokens))
        return int(self.rng.choice(places)) if len(places) else self.place(tokens)

    def half(self) -> int:
        """So many documents stay in `rest`."""
        return -(-len(self.documents) // 2)

    def roles(self) -> list[int]:
        """A number for each document, in random order: nobody knows which ones a set alters."""
        return self.rng.permutation(len(self.documents)).tolist()

    def unaltered(self) -> list[Case]:
        return [Case(i, tokens, len(tokens)) for i, tokens in enumerate(self.documents)]

    def reversed(self) -> list[Case]:
        return self.unaltered()[::-1]

    def texts_before(self, count: int) -> list[Case]:
        """Short documents that come first. The script tokenizes the first ones again, which alters words."""
        length = 2 * self.settings["ttt_chunk_size"] + 2
        return [self.added(self.words(length)) for _ in range(max(count, TOKENIZED_AGAIN))]

    def tails(self) -> list[Case]:
        """Every second document ends otherwise, half of these from any place on.

        So many short documents come first that no slot is new.
        """
        cases = self.texts_before(self.settings["ttt_batch_size"])
        for case, role in zip(self.unaltered(), self.roles()):
            inside = self.place(case.tokens) if role % 4 == 0 else 0
            at = inside or (self.anywhere(case.tokens) if role % 2 == 0 else 0)
            if at:
                end = self.ending(len(case.tokens) - at, case.tokens[at])
                tokens = np.append(case.tokens[:at], end)
                case = Case(case.number, tokens, at - 1, "tail" if inside else "tail anywhere")
            cases.append(case)
        return cases

    def lengths(self) -> list[Case]:
        """Of four documents one is cut, one goes on, one stays, and four others come instead of one."""
        cases = self.texts_before(0)
        for number, (tokens, role) in enumerate(zip(self.documents, self.roles())):
            place = self.rng.choice([self.anywhere, self.anywhere, self.place, self.late_place])
            at = place(tokens)
            if role % 4 == 0 and at:
                cases.append(Case(number, tokens[:at], at - 1, "cut"))
            elif role % 4 == 1:
                more = self.words(int(self.rng.integers(1, 3 * self.settings["ttt_chunk_size"])))
                cases.append(Case(number, np.append(tokens, more), len(tokens) - 1, "continued"))
            elif role % 4 == 2:
                cases.extend(self.added(self.mosaic(len(tokens))) for _ in range(4))
            else:
                cases.append(Case(number, tokens, len(tokens)))
        return cases

    def beginnings(self, depths: Iterable[int], losses: list[np.ndarray]) -> list[tuple[int, int]]:
        """Beginnings of `bases`, for `rest`: (which one, how many tokens of it).

        One is exactly a chunk long: its variants differ only after that chunk, so that a choice between
        passes by a document's loss can depend on the tried token alone. With it come those of the depths, in
        tokens; then one whose next token is likely, by the losses of the documents, if there are any; and
        those whose next token ends a phrase that has come before. If they can be, they are of the half that
        is absent there, so that nothing tells the true next token.
        """
        chunk = self.settings["ttt_chunk_size"]
        longest = max(map(len, self.documents))
        absent = range(self.half(), len(self.documents))
        found = []
        for length in sorted({min(depth, longest - 1) for depth in (chunk + 1, *depths)}):
            long = [number for number, tokens in enumerate(self.documents) if len(tokens) > length]
            found.append((int(self.rng.choice([*set(long) & set(absent)] or long)), length))
        near = range(chunk + 1, 3 * chunk)
        candidates = [(abs(losses[number][target] - LIKELY), number, target) for number in absent if losses
                      for target in near if target < len(losses[number])]
        if candidates:
            _, number, target = min(candidates)
            found.append((number, target + 1))
        return found + self.beginnings_of_repetitions()

    def beginnings_of_repetitions(self) -> list[tuple[int, int]]:
        """Those that end just before the last token of a phrase that has come before.

        They are the shortest one of a document, and the longest one of the repeating document.
        """
        *places, last_places = [ends_of_repeated_phrases(tokens[:MOST_DEPTH]) for tokens in self.bases]
        earliest = sorted((found[0], number) for number, found in enumerate(places)
                          if found and number >= self.half())[:1]
        found = [(number, place) for place, number in earliest]
        return found + [(len(places), place) for place in last_places[-1:]]

    def rest(self, beginnings: list[tuple[int, int]]) -> list[Case]:
        """The first half stays, and all that comes later is replaced, also by documents of random tokens.

        After these comes each beginning with every token in turn as its next: BOS first, as a beginning alone
        is followed by a BOS; the unknown one is left out.
        """
        half = self.half()
        length = 2 * self.settings["ttt_chunk_size"]
        cases = self.unaltered()[:half]
        cases += [self.added(self.words(length)) for _ in range(TOKENIZED_AGAIN - half)]
        repeats = -(-RANDOM_TOKENS // sum(map(len, self.documents)))
        # What follows is no text: the script tokenizes the first documents again.
        cases.append(self.most_repeating)
        cases += [self.random_end(number) for number in 3 * [*range(len(self.documents))]]
        for number, document in enumerate(self.documents * repeats):
            cases.append((self.repeating if number % 2 else self.random)(len(document)))
        for number, (document, length) in enumerate(beginnings):
            beginning = self.bases[document][:length]
            variants = [beginning, *(np.append(beginning, token) for token in self.pieces.tokens)]
            cases += [Case(-1, variant, length - 1, "next", beginning=number) for variant in variants]
        return cases
