"""The figures against transformers' own loss and against a plain computation of the formulas."""

import math

import pytest
import torch

from pocketlm.calibration.windows import Windows
from pocketlm.core.errors import CalibrationError, ConfigError, NumericError
from pocketlm.evaluate import quality
from pocketlm.evaluate.quality import evaluate_model, score_original
from pocketlm.evaluate.results import QualityReport


def whole_logits(view, windows):
    with torch.no_grad():
        return view.model(windows.tokens_NT).logits[:, :-1].double()


def test_perplexity_is_transformers_own_loss(original, windows) -> None:
    report = evaluate_model(original, windows)
    with torch.no_grad():
        losses = [original.model(row[None], labels=row[None]).loss for row in windows.tokens_NT]
    expected = torch.stack(losses).mean().item()
    assert report.log_perplexity.value == pytest.approx(expected, abs=1e-5)
    assert report.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert report.window_losses == pytest.approx([float(loss) for loss in losses], abs=1e-5)
    assert report.divergence is None
    assert report.notes == ("a note",)


def test_divergence_follows_its_formulas(original, changed, windows, monkeypatch) -> None:
    # chunks of 5 positions and batches of 2 windows must not matter
    monkeypatch.setattr(quality, "LOGIT_BYTES", 5 * 4 * quality.LOGIT_COPIES * 97)
    monkeypatch.setattr(quality.hidden, "BATCH_TOKENS", 48)
    report = evaluate_model(changed, windows, original)
    assert changed.largest_logits == 5
    assert changed.blocks_loaded == 2
    logp, logq = (torch.log_softmax(whole_logits(v, windows), -1) for v in (original, changed))
    kl = (logp.exp() * (logp - logq)).sum(-1)
    following = windows.tokens_NT[:, 1:, None]
    loss = (logp.gather(2, following) - logq.gather(2, following)).mean()
    found = report.divergence
    assert found is not None
    assert found.kl_mean.value == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_median.value == pytest.approx(kl.quantile(0.5).item(), rel=0.02)
    assert found.kl_p99_9.value == pytest.approx(kl.max().item(), rel=1e-4)
    assert found.kl_median.value < found.kl_p90.value < found.kl_p99.value <= found.kl_p99_9.value
    assert found.loss_over_original.value == pytest.approx(loss.item(), abs=1e-5)
    agreement = (logp.argmax(-1) == logq.argmax(-1)).double().mean().item()
    assert found.top1_agreement.value == pytest.approx(agreement, abs=1e-9)
    for interval in (found.kl_mean, found.loss_over_original, found.top1_agreement):
        assert interval.low < interval.value < interval.high
    worst = found.worst_tokens[0]
    assert len(found.worst_tokens) == 10
    assert worst.kl == pytest.approx(kl.max().item(), rel=1e-4)
    assert (worst.window, worst.position - 1) == divmod(int(kl.argmax()), kl.shape[1])


def test_a_model_against_itself_is_at_zero(original, windows) -> None:
    found = evaluate_model(original, windows, original).divergence
    assert found is not None
    assert found.kl_p99_9.high < 1e-6
    assert found.loss_over_original.value == 0
    assert found.top1_agreement.low == 1


def test_the_original_runs_once_for_several_models(original, changed, windows) -> None:
    base = score_original(original, windows)
    reports = [evaluate_model(changed, windows, base) for _ in range(2)]
    assert original.blocks_loaded == 2
    direct = evaluate_model(changed, windows, original)
    for report in reports:
        assert report.divergence == direct.divergence
    other = Windows(windows.tokens_NT[:4], "random", "0" * 64, False, None)
    with pytest.raises(ConfigError, match="other windows"):
        evaluate_model(changed, other, base)
    base.close()


def test_activations_beyond_the_budget_go_to_a_file(original, changed, windows) -> None:
    in_ram = quality.hidden.stream(original, windows.tokens_NT, lambda: None)
    on_disk = quality.hidden.stream(original, windows.tokens_NT, lambda: None, 1000)
    assert torch.equal(in_ram.read(3, 9), on_disk.read(3, 9))
    on_disk.close()
    in_ram.close()


def test_progress_reaches_its_total(original, changed, windows) -> None:
    seen = []
    evaluate_model(changed, windows, original, on_progress=lambda d, t: seen.append((d, t)))
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))
    assert len({total for _, total in seen}) == 1


def test_worst_tokens_are_shown_as_text(original, changed, windows) -> None:
    class Names:
        def decode(self, token_ids):
            return " ".join(f"t{i}" for i in token_ids)

    found = evaluate_model(changed, windows, original, tokenizer=Names()).divergence
    assert found is not None
    for worst in found.worst_tokens:
        row = windows.tokens_NT[worst.window]
        assert worst.token == f"t{row[worst.position]}"
        assert str(worst.context).split()[-1] == f"t{row[worst.position - 1]}"


def test_the_protocol_names_everything_and_survives_json(original, changed, windows) -> None:
    report = evaluate_model(changed, windows, original)
    protocol = report.protocol
    assert (protocol.windows, protocol.seq_len, protocol.stride) == (12, 24, 24)
    assert protocol.tokens_scored == 12 * 23
    assert protocol.windows_sha256 == windows.sha256
    assert protocol.versions["torch"] == torch.__version__
    assert "no BOS" in protocol.sentence()
    assert QualityReport.model_validate_json(report.model_dump_json()) == report


def test_what_cannot_be_compared_is_refused(original, changed, windows) -> None:
    original.vocabulary = 90
    with pytest.raises(ConfigError, match="97 tokens, the original 90"):
        evaluate_model(changed, windows, original)
    with pytest.raises(CalibrationError, match="outside the model's vocabulary of 90"):
        evaluate_model(original, windows)


def test_a_broken_model_is_an_error(changed, windows) -> None:
    with torch.no_grad():
        changed.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericError, match="not finite in 12 of 12"):
        evaluate_model(changed, windows)
