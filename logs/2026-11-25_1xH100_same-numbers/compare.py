"""Old and new file on one GPU: kernels bit for bit, 20 steps, micro-batches in turn, each by the tool of its commit."""
import importlib.util, sys, time, statistics
from pathlib import Path
import numpy as np, torch
ROOT = Path(__file__).resolve().parents[1]
def module(name, path):
    spec = importlib.util.spec_from_file_location(name, path); m = sys.modules[name] = importlib.util.module_from_spec(spec); spec.loader.exec_module(m); return m
old_bench, new_bench = module("old_bench_step", ROOT / ".old/tools/bench_step.py"), module("bench_step", ROOT / "tools/bench_step.py")
old, new = module("old_tg", ROOT / ".old/train_gpt.py"), module("new_tg", ROOT / "train_gpt.py")
dev = torch.device("cuda")
g = torch.Generator().manual_seed(0)
def draw(*shape, dtype=torch.bfloat16): return torch.randn(*shape, generator=g).to(dev, dtype)
def bits(name, a, b):
    a, b = (x if isinstance(x, (tuple, list)) else (x,) for x in (a, b))
    same = len(a) == len(b) and all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.view(torch.uint8) if x.numel() else x, y.view(torch.uint8) if y.numel() else y) for x, y in zip(a, b))
    print(f"bits {name:24} {'equal' if same else 'DIFFER'}  {[tuple(x.shape) for x in a]}", flush=True); return same
ok = True
for T in (98_304, 1000, 129):
    x, a, up, down, depth = draw(T, 512), draw(T, 512), draw(2048, 512) / 22, draw(512, 2048) / 45, torch.tensor(.5, device=dev)
    for add in (a, None):
        o, n = old.fused_mlp(x, add, up, down, depth), new.fused_mlp(x, add, up, down, depth)
        ok &= bits(f"fused_mlp {T} {add is not None}", o, n)
    dout = draw(T, 512)
    ok &= bits("mlp_grad", old.mlp_grad(dout, down, o[3]), new.mlp_grad(dout, down, o[3]))
    ok &= bits("join_grad", old.join_grad(dout, a, depth, o[1], o[2]), new.join_grad(dout, a, depth, o[1], o[2]))
    qkv, gain, cos, sin, pos = draw(T, 1024), draw(8).abs(), draw(2048, 1, 8, dtype=torch.float32), draw(2048, 1, 8, dtype=torch.float32), torch.arange(T, device=dev) % 2048
    ho, hn = old.fused_heads(qkv, gain, cos, sin, pos, 4), new.fused_heads(qkv, gain, cos, sin, pos, 4)
    ok &= bits("fused_heads", ho, hn)
    dh = [draw(*h.shape) for h in ho]
    ok &= bits("fused_heads_grad", old.fused_heads_grad(dh, qkv, gain, cos, sin, pos), new.fused_heads_grad(dh, qkv, gain, cos, sin, pos))
    y, v, dz = draw(T, 8, 64), draw(T, 4, 64), draw(T, 8, 64)
    ok &= bits("fused_exclude", old.fused_exclude(y, v), new.fused_exclude(y, v))
    ok &= bits("fused_exclude_grad", old.fused_exclude_grad(dz, y, v), new.fused_exclude_grad(dz, y, v))
    for lanes in (False, True):
        for skip in ((None, None, None), (draw(T, 512), draw(512), draw(512))):
            inputs = [x, a, draw(2, 512), depth, *skip]
            ok &= bits(f"fused_entry {lanes} {skip[0] is not None}", old.fused_enter(*inputs[:4], lanes, *inputs[4:]), new.fused_entry(*inputs[:4], lanes, *inputs[4:]))
            for nxt in (None, draw(T, 512)):
                d1, d2 = draw(T, 512), draw(T, 512)
                ok &= bits(f"fused_entry_grad {nxt is not None}", old.fused_enter_grad(d1, d2, nxt, lanes, inputs), new.fused_entry_grad(d1, d2, nxt, lanes, inputs))
    targets = torch.randint(-1, 8192, (T,), generator=g).to(dev)
    ok &= bits("fused_loss", old.fused_nll(x, draw(8192, 512) / 4 if False else (e := draw(8192, 512) / 4), targets, 30.0), new.fused_loss(x, e, targets, 30.0))
    xs = [t.clone().requires_grad_() for t in (x, e)]; xn = [t.clone().requires_grad_() for t in (x, e)]
    old.FusedHead.apply(*xs, targets, 30.0).mean().backward(); new.FusedLoss.apply(*xn, targets, 30.0).mean().backward()
    ok &= bits("loss backward", [t.grad for t in xs], [t.grad for t in xn])
print("KERNELS", "ALL EQUAL TO THE BIT" if ok else "DIFFER", flush=True)
del x, a, o, n, ho, hn, dh, y, v, dz, inputs, xs, xn, qkv
torch.cuda.empty_cache()
shards = sorted(Path("/tmp/data").glob("**/fineweb_train_*.bin"))
ranks = new.Ranks.join()
began = time.perf_counter()
class OldRanks(old.Ranks): barrier = lambda self: None
pair = {}
for name, bench, path, r in (("old", old_bench, ".old/train_gpt.py", old.Ranks.join()), ("new", new_bench, "train_gpt.py", ranks)):
    c = bench.Candidate(str(ROOT / path), f"bench_{name}", shards, r)
    for looped in (False, True): c.step(looped)
    torch.cuda.synchronize(); pair[name] = c
    print(f"{name}: first steps after {time.perf_counter() - began:.1f} s", flush=True)
product, operations, copied = new_bench.ceilings(ranks)
print(f"product {operations / 1e12:.0f} TFLOP/s, copy {copied / 1e12:.2f} TB/s", flush=True)
# in turn, order changing from round to round
for looped in (False, True):
    times = {n: [] for n in pair}
    for r in range(10):
        for n in (list(pair) if r % 2 else list(pair)[::-1]):
            torch.cuda.synchronize()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(9)]
            marks[0].record()
            for m in marks[1:]:
                pair[n].micro_batch(looped); m.record()
            torch.cuda.synchronize()
            if r: times[n] += [x.elapsed_time(y) for x, y in zip(marks, marks[1:])]
    med = {n: statistics.median(v) for n, v in times.items()}
    print(f"micro-batch looped={looped}: old {med['old']:.3f} ms, new {med['new']:.3f} ms, new/old {med['new'] / med['old']:.4f}", flush=True)
# twenty steps
def steps(c, t):
    torch.manual_seed(0)
    cfg, dev_ranks = c.cfg, t.Ranks.join()
    model = t.GPT(cfg).to(dev)
    lines = []
    run = t.Run(cfg, dev_ranks, lambda *a, **k: lines.append(a), t.Ops.choose(cfg, dev) if hasattr(t, "Ops") else t.Backend.for_machine(cfg, dev))
    loader = t.PackedLoader(shards, int(t.open_shard(shards[0])[0]), cfg, t.split_step(cfg, 1)[1])
    trainer = t.Trainer(run, model, loader)
    batches, losses = loader.buffers(trainer.own_buffers(), dev), []
    import itertools
    for n in range(20):
        losses.append(trainer.step(itertools.islice(batches, trainer.local_buffers), trainer.plans[n >= 7], 1.0, .95))
    return np.array([l.item() for l in losses]), torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()
modules = {"old": pair["old"].t, "new": pair["new"].tg}
runs = {}
for label, name in (("old 1", "old"), ("new 1", "new"), ("old 2", "old"), ("new 2", "new")):
    c, t = pair[name], modules[name]
    runs[label] = steps(c, t); torch.cuda.empty_cache()
    print(label, np.round(runs[label][0], 5).tolist(), flush=True)
for a, b in (("old 1", "old 2"), ("new 1", "new 2"), ("old 1", "new 1"), ("old 2", "new 2"), ("old 1", "new 2")):
    d = np.abs(runs[a][0] - runs[b][0]); w = (runs[a][1] - runs[b][1]).norm() / runs[a][1].norm()
    print(f"20 steps {a} v {b}: losses differ by at most {d.max():.6f}, mean {d.mean():.6f}; weights {w:.2e}", flush=True)
print("memory", torch.cuda.max_memory_allocated() / 1e9)
