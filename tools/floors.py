"""The least time that each part of a micro-batch can take: by its bytes, or by its operations.

Bytes are those that have to be read and written once; they are counted in rows, a row being a bf16 tensor of
(tokens, model_dim). Operations are those of matrix products, 2 for each multiplication and addition.
"""
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

PARTS = {  # of a micro-batch, by what the names of their kernels contain; the first that fits
    "attention": r"flash",
    "heads": r"heads_program",
    "entry": r"ent(er|ry)_program",
    "join": r"join_program",
    "exclusion": r"exclude_program",
    "lanes": r"lanes_program",
    "loss": r"(nll|loss)_program",
    "to FP8": r"fp8_program",
    "matrix products": r"mlp_program|nvjet|splitKreduce|gemm|cutlass",
    "all else": r"",
}
ENTRY_ROWS, SKIP_ROWS = (4, 8), (1, 2)  # of the entry kernel forward and backward; more of them with a skip
LANES_ROWS, NORM_ROWS = (6, 10), (3, 3)  # of the lanes kernel; of the join kernel as it norms two lanes


class Work(NamedTuple):
    """What a part has to do, forward and backward."""
    rows: float = 0.0
    operations: float = 0.0

    def ms(self, row_bytes: float, copied: float, operations: float) -> float:
        """Milliseconds on a GPU that copies so many bytes and does so many operations in a second."""
        return 1e3 * max(self.rows * row_bytes / copied, self.operations / operations)


def part_of(kernel: str) -> str:
    return next(part for part, pattern in PARTS.items() if re.search(pattern, kernel))


def table(spent: Mapping[str, float], floors: Mapping[str, float]) -> list[str]:
    """Lines "part, ms, floor, share of it", of milliseconds by kernel and of floors by part; last, of all."""
    took = dict.fromkeys(PARTS, 0.0)
    for kernel, ms in spent.items():
        took[part_of(kernel)] += ms
    rows = [(part, ms, floors.get(part, 0.0)) for part, ms in took.items()]
    rows.append(("all", sum(took.values()), sum(floors.values())))
    return [f"{ms:9.3f} ms  {part:16} floor {floor:7.3f} ms" + (f" {floor / ms:5.0%}" if ms else "")
            for part, ms, floor in rows]


def heads_rows(cfg: Any) -> tuple[float, float]:
    """Rows of the heads kernel forward and backward: qkv, the heads with repeated k and v, v once more."""
    shared = cfg.num_kv_heads / cfg.num_heads
    qkv, heads = 1 + 2 * shared, 3 + shared
    return qkv + heads, heads + 2 * qkv  # backward, qkv is read and its gradient written


def exclusion_rows(cfg: Any) -> tuple[float, float]:
    shared = cfg.num_kv_heads / cfg.num_heads
    return 2 + shared, 3 + 2 * shared


def work_of(cfg: Any, visits: int, skips: int, lanes: int, span_lengths: Any, fp8: bool) -> dict[str, Work]:
    """What the parts of a micro-batch have to do, by name.

    Of its visits `skips` merge a skip and `lanes` have two lanes; span_lengths (spans,) are in tokens. A
    backward pass has twice the products of the forward one, that of attention 2.5 times. Of a causal square
    half is needed. With fp8 the MLP's products count as half, and its input and the gradient of its output
    are written in FP8, twice.
    """
    tokens, D, V = int(span_lengths.sum()), cfg.model_dim, cfg.vocab_size
    attention = D * (2 * D + 2 * cfg.kv_dim)
    mlp = 2 * D * cfg.mlp_dim
    squares = float((span_lengths.astype(float) ** 2).sum())
    return {
        "attention": Work(operations=3.5 * visits * 4 * D * squares / 2),
        "heads": Work(rows=visits * sum(heads_rows(cfg))),
        # No later gradient arrives of x0 in the last visit, of x if it is no skip or the first to be merged.
        "entry": Work(rows=visits * sum(ENTRY_ROWS) + skips * sum(SKIP_ROWS) - 1 - (visits - skips + 1)),
        "join": Work(rows=8 * visits - 2 * lanes + 7 + sum(NORM_ROWS)),  # 7: the embedding's norm, in fp32
        "exclusion": Work(rows=visits * sum(exclusion_rows(cfg))),
        "lanes": Work(rows=lanes * sum(LANES_ROWS)),
        "loss": Work(rows=2 * V / D),  # logits are read, their gradient is written
        "to FP8": Work(rows=visits * 2 * 2 * fp8),
        "matrix products": Work(operations=3 * 2 * tokens * (visits * (attention + mlp / (1 + fp8)) + D * V)),
    }
