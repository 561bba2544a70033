"""Our own answers to the questions, in float32, and how far an engine's are from them.

Legend: N sequences, T tokens, R rows of several sequences, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.core.activations import InputQuantizer
from pocketlm.core.errors import ArtifactError
from pocketlm.core.views import ModelView
from pocketlm.evaluate.engines.ask import Answer
from pocketlm.evaluate.engines.questions import Questions
from pocketlm.models.adapter import Model

TIE = 0.1  # nats between our two best tokens: below it either may win


@dataclass(frozen=True)
class Distance:
    """How far an engine's answers are from ours.

    Attributes:
        kl: KL(ours ‖ theirs) in nats, mean over positions.
        kl_largest: At one position.
        same_top: Share of positions with the same likeliest token.
        positions: How many were compared.
        greedy: Tokens that the engine chose greedily.
        different: Of them, where our likeliest token is another one.
        wrong: Of these, where it leads our second by `TIE` nats or more.
    """

    kl: float
    kl_largest: float
    same_top: float
    positions: int
    greedy: int
    different: int
    wrong: int


def our_hidden(view: ModelView, tokens_NT: Tensor) -> Tensor:
    """What the head reads [N, T, D], block by block as one batch."""
    with torch.no_grad():
        hidden_NTD, call = view.begin(tokens_NT.to(view.device))
        for index in range(len(view.block_paths)):
            with view.block(index) as block:
                hidden_NTD = block.forward(hidden_NTD, call)
        return view.finish(hidden_NTD)


def our_logits(view: ModelView, hidden_TD: Tensor) -> Tensor:
    """float32 logits [T, V] of some rows."""
    with torch.no_grad():
        return view.logits(hidden_TD).float().cpu()


def divergence(ours_TV: Tensor, theirs_TV: Tensor) -> Tensor:
    """KL(ours ‖ theirs) in nats at each position [T], of logits or log-probabilities."""
    ours, theirs = (x.double().log_softmax(-1) for x in (ours_TV, theirs_TV))
    share = ours.exp()
    return torch.where(share > 0, share * (ours - theirs), 0.0).sum(-1)


def distance(view: ModelView, questions: Questions, answer: Answer) -> Distance:
    """Compares an engine's answers with ours.

    The engine's own greedy tokens are read back through our model: wherever it chose another token
    than we would after the same ones, that is a difference.

    Args:
        view: The model as we read it, in float32.
        questions: What was asked.
        answer: What the engine said.

    Raises:
        ArtifactError: If the engine's vocabulary is of another size.
    """
    hidden_NTD = our_hidden(view, questions.sequences_NT)
    kls, same = [], 0
    for hidden_TD, theirs_TV in zip(hidden_NTD, answer.rows_NTV, strict=True):
        ours_TV = our_logits(view, hidden_TD[:-1])
        if ours_TV.shape != theirs_TV.shape:
            raise ArtifactError(
                f"gives {theirs_TV.shape[-1]} log-probabilities a token, not {ours_TV.shape[-1]}.",
                where=answer.version,
            )
        kls.append(divergence(ours_TV, theirs_TV))
        same += int((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).sum())
    kl_N = torch.cat(kls)
    different = wrong = greedy = 0
    if answer.generated:
        prompts = torch.tensor(questions.prompts)
        chosen_NT = torch.tensor(answer.generated)
        hidden_NTD = our_hidden(view, torch.cat((prompts, chosen_NT), dim=1))
        first = prompts.shape[1] - 1
        for hidden_TD, chosen_T in zip(hidden_NTD, chosen_NT, strict=True):
            ours_TV = our_logits(view, hidden_TD[first:-1])
            best_T2, ids_T2 = ours_TV.topk(2)
            other_T = ids_T2[:, 0] != chosen_T
            different += int(other_T.sum())
            wrong += int((other_T & (best_T2[:, 0] - best_T2[:, 1] >= TIE)).sum())
        greedy = chosen_NT.numel()
    return Distance(
        kl=float(kl_N.mean()),
        kl_largest=float(kl_N.max()),
        same_top=same / kl_N.numel(),
        positions=kl_N.numel(),
        greedy=greedy,
        different=different,
        wrong=wrong,
    )


@dataclass(frozen=True)
class Moved:
    """How far our own run is from itself with its inputs rounded, after the same tokens; at most.

    Attributes:
        kl: KL(as it is ‖ rounded) in nats, mean over positions.
        wrong: Of the tokens an engine chose, where the rounded run's likeliest is another one and
            the first run's leads its second by `TIE` nats or more.
    """

    kl: float
    wrong: int


def moved(
    view: Model,
    roundings: Sequence[Mapping[str, InputQuantizer]],
    questions: Questions,
    answer: Answer,
) -> Moved:
    """Runs our model several times over what an engine was asked and what it chose.

    Args:
        view: The model as we read it, in float32.
        roundings: Of each further run: module path → how its inputs are rounded.
        questions: What was asked.
        answer: What the engine said; its tokens alone are used.
    """
    batches = [(questions.sequences_NT, 0)]
    if answer.generated:
        prompts = torch.tensor(questions.prompts)
        chosen_NT = torch.tensor(answer.generated)
        batches.append((torch.cat((prompts, chosen_NT), dim=1), prompts.shape[1] - 1))
    plain = [_logits(view, tokens_NT, first) for tokens_NT, first in batches]
    kls, wrongs, kept = [0.0], [0], view.quantizers
    for rounding in roundings:
        view.quantizers = rounding
        try:
            rounded = [_logits(view, tokens_NT, first) for tokens_NT, first in batches]
        finally:
            view.quantizers = kept
        kls.append(float(divergence(plain[0], rounded[0]).mean()))
        for ours_RV, other_RV in zip(plain[1:], rounded[1:], strict=True):
            best_R2, ids_R2 = ours_RV.topk(2)
            leads_R = best_R2[:, 0] - best_R2[:, 1] >= TIE
            wrongs.append(int((leads_R & (ids_R2[:, 0] != other_RV.argmax(-1))).sum()))
    return Moved(max(kls), max(wrongs))


def _logits(view: ModelView, tokens_NT: Tensor, first: int) -> Tensor:
    """What follows each token from the first on, all sequences' rows one after the other."""
    hidden_NTD = our_hidden(view, tokens_NT)
    return torch.cat([our_logits(view, hidden_TD[first:-1]) for hidden_TD in hidden_NTD])
