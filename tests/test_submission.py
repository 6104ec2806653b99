"""submission.json says what the log says, and the log holds the source that made it.

The results are read here from the logs directly, not by tools/submission.py, which made the file.
"""
import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUBMISSION = json.loads((ROOT / "submission.json").read_text(encoding="utf-8"))


def result_of(log: Path) -> dict:
    last_line = log.read_text(encoding="utf-8").splitlines()[-1]
    return json.loads(last_line.removeprefix("RESULT "))


def test_submission_has_the_fields_of_the_field():
    assert set(SUBMISSION) >= {
        "author", "github_id", "name", "date", "track", "val_loss", "val_bpb", "seeds", "seed_results",
        "artifact_bytes", "compliance", "hardware", "versions"}


def test_submission_claims_no_record():
    assert SUBMISSION["record"] is False
    assert SUBMISSION["track"].startswith("non-record")
    assert "not FineWeb" in SUBMISSION["corpus"]


def test_submission_follows_from_its_logs():
    seeds = SUBMISSION["seed_results"]
    assert [str(seed) for seed in SUBMISSION["seeds"]] == list(seeds)
    for seed, row in seeds.items():
        result = result_of(ROOT / row["log"])
        assert result["seed"] == int(seed)
        assert result["total_bytes"] == row["artifact_bytes"] <= 16_000_000
        for name in ("val_loss", "val_bpb", "val_bpb_quantized", "val_bpb_unquantized", "steps"):
            assert row[name] == result[name]
        assert row["training_seconds"] == result["clocks"]["training"]["seconds"]
        assert row["scoring_seconds"] == result["clocks"]["scoring"]["seconds"]
        for name in ("code_sha256", "code_bytes", "model_bytes", "hardware", "versions", "caveats"):
            assert SUBMISSION[name] == result[name]


def test_headline_follows_from_the_seeds():
    rows = SUBMISSION["seed_results"].values()
    for name in ("val_loss", "val_bpb"):
        assert SUBMISSION[name] == sum(row[name] for row in rows) / len(rows)
    assert SUBMISSION["artifact_bytes"] == max(row["artifact_bytes"] for row in rows)


def test_compliance_follows_from_the_result():
    rules = SUBMISSION["compliance"]
    row, *_ = SUBMISSION["seed_results"].values()
    assert rules["training_under_600s"] == (row["training_seconds"] <= 600)
    assert rules["scoring_under_600s"] == (row["scoring_seconds"] <= 600)
    assert rules["artifact_under_16000000_bytes"] == (row["artifact_bytes"] <= 16_000_000)
    assert rules["eight_gpus"] == ("not on 8 GPUs" not in SUBMISSION["caveats"])
    assert rules["three_seeds"] == (len(SUBMISSION["seeds"]) >= 3)
    read_early = any("VAL_LOSS_EVERY" in why for why in SUBMISSION["caveats"])
    assert rules["validation_read_only_after_export"] != read_early


def test_rules_that_no_log_can_show_are_claimed_of_this_script_or_of_audited_runs():
    """Today's tests hold today's script to them; when it has changed, the log's source is another one."""
    own = SUBMISSION["code_sha256"] == hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    audits = [ROOT / Path(row["log"]).parent / "audit.json" for row in SUBMISSION["seed_results"].values()]
    found = [json.loads(path.read_bytes())["rules"] if path.exists() else {} for path in audits]
    for rule in ("score_before_update", "documents_independent", "every_target_once", "full_distribution"):
        audited = all(rules.get(rule.replace("_", " ")) == "pass" for rules in found)
        assert SUBMISSION["compliance"][rule] is (True if own or audited else None)


def test_every_log_holds_the_source_that_made_it():
    logs = sorted((ROOT / "logs").rglob("log.txt"))
    assert logs
    for log in logs:
        source = log.read_text(encoding="utf-8").split("=" * 100 + "\n")[1][:-1]
        assert hashlib.sha256(source.encode()).hexdigest() == result_of(log)["code_sha256"]
        assert json.loads((log.parent / "result.json").read_text(encoding="utf-8")) == result_of(log)
