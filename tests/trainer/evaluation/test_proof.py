"""The proof's arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stagecoach_trainer.evaluation.proof import StoredLogProbs, kl_divergence, proof_rows
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.evaluation.makers import lively_model


def test_the_divergence_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(5, 7, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(after, before, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(before, after), expected)
    assert float(kl_divergence(before, before).abs().max()) == 0.0


def test_the_input_is_fixed_by_its_seed_and_reaches_the_whole_vocabulary() -> None:
    rows = proof_rows(50, 600, seed=3, positions=100)
    assert sum(len(row) for row in rows) == 600
    assert max(len(row) for row in rows) == 100
    assert torch.cat(rows).unique().tolist() == list(range(50))
    assert torch.equal(torch.cat(rows), torch.cat(proof_rows(50, 600, seed=3, positions=None)))
    assert not torch.equal(torch.cat(rows), torch.cat(proof_rows(50, 600, seed=4, positions=100)))


def test_a_model_agrees_with_itself_and_not_with_another(tmp_path: Path) -> None:
    model, other = lively_model(60), lively_model(60, seed=1)
    rows = proof_rows(60, 300, seed=0, positions=256)
    witness = StoredLogProbs(model, rows, tmp_path)
    same = witness.compare(model)
    assert (same.mean_kl, same.max_kl, same.same_first) == (0.0, 0.0, 1.0)
    found = witness.compare(other)
    with torch.no_grad():
        logs = [
            torch.cat([one(input_ids=row[None]).logits[0] for row in rows]).log_softmax(-1) for one in (model, other)
        ]
    expected = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(-1)
    assert found.mean_kl == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found.max_kl == pytest.approx(float(expected.max()), rel=1e-4)
    assert found.same_first < 0.9


def test_another_vocabulary_or_broken_logits_are_refused(tmp_path: Path) -> None:
    model, rows = lively_model(60), proof_rows(50, 20, seed=0, positions=256)
    witness = StoredLogProbs(model, rows, tmp_path / "a")
    with pytest.raises(UserError, match="had 60 rows before and has 61 now"):
        witness.compare(lively_model(61))
    model.lm_head.weight.data[3].fill_(float("nan"))
    with pytest.raises(UserError, match="logits of the released model are NaN or infinite"):
        witness.compare(model)
    with pytest.raises(UserError, match="logits of the model before its release are NaN or infinite"):
        StoredLogProbs(model, rows, tmp_path / "b")
