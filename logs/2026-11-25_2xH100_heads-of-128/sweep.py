"""sweep.py GPU SECONDS: one model after another in one process on one GPU, until SECONDS of wall time are over.

Fixed steps and data order; prints last and average bits per byte, training loss of the last 40 steps, ms a step. Losses by
document are kept beside it and compared, paired by document, with the base of the same seed at the end of the list.
"""
import json, os, sys, time
from pathlib import Path
gpu, limit = sys.argv[1], float(sys.argv[2])
os.environ["CUDA_VISIBLE_DEVICES"] = gpu
import numpy as np, torch
sys.path.insert(0, str(Path(__file__).resolve().parent))
import train_gpt as tg
BEGAN, OUT = time.perf_counter(), Path(os.environ.get("SWEEP_OUT", "/tmp/sweep"))
OUT.mkdir(exist_ok=True, parents=True)
SMOKE = os.environ.get("SWEEP_SMOKE")
STEPS = int(os.environ.get("SWEEP_STEPS", 400))
if not SMOKE:
    tg.BUFFERS_PER_STEP = 2
    BASE = dict(DATA_DIR="/tmp/data", TRAIN_BATCH_TOKENS=196608, VAL_BATCH_TOKENS=196608, ITERATIONS=STEPS, MAX_WALLCLOCK_SECONDS=0,
                MATRIX_LR=.013, TIED_EMBED_LR=.015, SCALAR_LR=.01, WARMUP_STEPS=2, TRAIN_LOG_EVERY=100, VAL_LOSS_EVERY=1000000)
else:
    BASE = dict(PRESET="smoke", ITERATIONS=STEPS, VAL_LOSS_EVERY=1000000)
VARIANTS = dict(base={}, heads42=dict(NUM_HEADS=4, NUM_KV_HEADS=2, ROPE_DIMS=32), minlr0=dict(MIN_LR=0.0), lr108=dict(MATRIX_LR=.014),
                qk525=dict(QK_GAIN_INIT=5.25), heads42qk=dict(NUM_HEADS=4, NUM_KV_HEADS=2, ROPE_DIMS=32, QK_GAIN_INIT=7.0),
                cap20=dict(LOGIT_SOFTCAP=20.0), heads44=dict(NUM_HEADS=4, NUM_KV_HEADS=4, ROPE_DIMS=32), noloop=dict(ENABLE_LOOPING_AT=1.0))
if SMOKE:
    VARIANTS["heads42"] = dict(NUM_HEADS=2, NUM_KV_HEADS=1, ROPE_DIMS=16)
LIST = [item.split(":") for item in os.environ["SWEEP_LIST"].split(",")]
class Log(tg.RunLog):
    def __init__(self, ranks):
        self.ranks, self.phases, self.rows = ranks, [], []
    def __call__(self, line, console=True):
        if "train_loss" not in line and "bpb" not in line: print("   ", line, flush=True)
    def metrics(self, kind, **values):
        if kind == "step": self.rows.append(values)
def one(name, seed):
    env = {k: str(v) for k, v in {**BASE, **VARIANTS[name], "SEED": seed}.items()}
    cfg, ranks = tg.Config.from_env(env), tg.Ranks.join()
    log = Log(ranks)
    run = tg.Run(cfg, ranks, log, tg.Ops.choose(cfg, ranks.device))
    files = tg.find_data(cfg, train=True)
    tokenizer = tg.load_tokenizer(files.tokenizer, cfg.vocab_size)
    val = tg.load_validation(files.val, tokenizer, cfg)
    model = tg.GPT(cfg).to(ranks.device)
    loader = tg.PackedLoader(files.train, tokenizer.bos, cfg, tg.split_step(cfg, 1)[1])
    plan, losses = tg.depth_plan(cfg, cfg.loops_at_end), {}
    def validate(p):
        losses["last"] = tg.evaluate(run, model, val, p)
        return tg.Score.of(losses["last"], val)
    began = time.perf_counter()
    trainer = tg.Trainer(run, model, loader)
    trainer.warm_up(); ranks.synchronize()
    warm = time.perf_counter() - began
    trainer.train(validate)
    seconds = log.phases[-1].seconds
    losses["average"] = tg.evaluate(run, model, val, plan)
    score = {k: tg.Score.of(v, val).bpb for k, v in losses.items()}
    nats = {k: np.add.reduceat(v.double().numpy(), val.starts) for k, v in losses.items()}
    np.savez(OUT / f"{name}-{seed}.npz", size=np.add.reduceat(val.token_bytes, val.starts), **nats)
    row = dict(name=name, seed=int(seed), gpu=gpu, **{k: round(v, 6) for k, v in score.items()}, warm=round(warm, 1), train_s=round(seconds, 1),
               ms=round(1e3 * seconds / trainer.steps, 1), loss40=round(float(np.mean([r["loss"] for r in log.rows[-40:]])), 5))
    print(json.dumps(row), flush=True)
    with open(OUT / "rows.jsonl", "a") as f: f.write(json.dumps(row) + "\n")
    return time.perf_counter() - began
took = 0
for name, seed in LIST:
    if time.perf_counter() - BEGAN + took > limit: print("left out", name, seed, flush=True); continue
    took = one(name, seed); torch.cuda.empty_cache() if torch.cuda.is_available() else None
print("gpu", gpu, "done after", round(time.perf_counter() - BEGAN), flush=True)
