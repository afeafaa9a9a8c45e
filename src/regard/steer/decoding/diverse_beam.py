"""Diverse beam search: groups of beams, one after the other, each losing for what the groups before it chose.

    group g at step t keeps the best B / G of   sum log p(y) - diversity * #{beams of groups < g that chose y_t at t}

Departs from the authors' code, fairseq and the version that transformers dropped: these add the penalty to the score that is
carried on (`accumulate_penalty=True` does); here it steers the choice alone, and hypotheses are ranked by log-likelihood over
length. Ends are never penalised, groups keep what they finished apart, and a group that is done stands in nobody's way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.contract.card import DecodingCard
from regard.contract.errors import OptionError, Unsupported, near
from regard.contract.optional import need
from regard.primitives.beam import (
    Beams,
    Hypothesis,
    Penalty,
    beam_step,
    bigrams,
    cumulative,
    finish_beams,
    hamming,
    start_beams,
)
from regard.steer.decoding.beams import write_beams

CARD = DecodingCard(
    slug="diverse_beam",
    title="Diverse beam search",
    paper="Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models",
    exports=("DiverseBeam", "diverse_beam_search"),
    options={"num_groups": 3, "diversity": 2.0},
    generate={"num_beams": 6, "num_return_sequences": 6},
    off={"num_groups": 1},
    padding=True,
)

_PENALTIES: dict[str, Penalty] = {"hamming": hamming, "cumulative": cumulative, "ngram": bigrams}


@dataclass(frozen=True)
class DiverseBeam:
    """A way of writing: `model.generate(**inputs, num_beams=6, custom_generate=DiverseBeam(num_groups=3))`.

    num_groups: divides num_beams; as many as beams is most diverse. diversity: the strength, 0 or more; the paper has 0.2 to
    0.8 for Hamming. penalty: "hamming", tokens chosen at the same step; "cumulative", less so for hypotheses that have gone
    other ways; "ngram", pairs of tokens written anywhere; or a function (what earlier groups hold (B, P, t), own hypotheses
    (B, K, t - 1), V) -> what continuations lose, (B, K, V). accumulate_penalty: what was lost is lost for good.
    generate's length_penalty, early_stopping, end tokens and processors hold; num_return_sequences takes the best of all
    groups. Raises OptionError, also for sampling; Unsupported for other stopping criteria.
    """

    num_groups: int
    diversity: float = 0.5
    penalty: Literal["hamming", "cumulative", "ngram"] | Penalty = "hamming"
    accumulate_penalty: bool = False

    def __post_init__(self) -> None:
        if self.num_groups < 1:
            raise OptionError(f"there is at least one group, not {self.num_groups}")
        if self.diversity < 0:
            raise OptionError(f"diversity is 0 or more, not {self.diversity}: below 0 groups would copy each other")
        if not callable(self.penalty) and self.penalty not in _PENALTIES:
            raise OptionError(f"{self.penalty!r} is no penalty{near(self.penalty, _PENALTIES)}; give one of "
                              f"{', '.join(_PENALTIES)}, or a function")  # fmt: skip

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        """What generate calls, and what it then returns: ids (B R, P + T), or its output class with the scores."""
        found = self._search(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
        count, width = generation_config.num_return_sequences, generation_config.num_beams
        best = [hypothesis for row in found.hypotheses() for hypothesis in _filled(row, count)]
        fill = _fill(generation_config)
        longest = max(len(hypothesis.tokens) for hypothesis in best)
        written = torch.tensor([[*h.tokens, *[fill] * (longest - len(h.tokens))] for h in best], dtype=input_ids.dtype)
        prompts = input_ids[::width].repeat_interleave(count, 0)
        sequences = torch.cat((prompts, written.to(input_ids.device)), 1)
        if not generation_config.return_dict_in_generate:
            return sequences
        scores = torch.tensor([hypothesis.score for hypothesis in best], device=input_ids.device)
        output: Any = need("transformers.generation", "hf").GenerateBeamDecoderOnlyOutput
        return output(sequences=sequences, sequences_scores=scores)

    def _search(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Beams:
        """The search as generate sets it up, to its end."""
        width, length_penalty = generation_config.num_beams, generation_config.length_penalty
        _refuse(generation_config, stopping_criteria, self.num_groups)
        given: Any = _PENALTIES.get(self.penalty, self.penalty) if isinstance(self.penalty, str) else self.penalty
        ends = generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

        def step(log_p: Tensor, beams: Beams) -> Beams:
            return beam_step(
                log_p, beams, width=width, groups=self.num_groups, ends=ends, length_penalty=length_penalty,
                penalty=lambda *hypotheses: self.diversity * given(*hypotheses), accumulate=self.accumulate_penalty,
                early=generation_config.early_stopping is True,
            )  # fmt: skip

        start = start_beams(input_ids.shape[0] // width, width, self.num_groups, device=input_ids.device)
        most = generation_config.max_length - input_ids.shape[1]
        return finish_beams(
            write_beams(model, input_ids, start, step, most, model_kwargs, logits_processor),
            length_penalty=length_penalty,
        )


def diverse_beam_search(
    model: Any, input_ids: Tensor, num_beams: int, num_groups: int, diversity: float = 0.5, *,
    penalty: Literal["hamming", "cumulative", "ngram"] | Penalty = "hamming", accumulate_penalty: bool = False,
    max_new_tokens: int = 20, length_penalty: float = 1.0, num_return_sequences: int | None = None,
    attention_mask: Tensor | None = None,
) -> list[list[Hypothesis]]:  # fmt: skip
    """For each prompt what was written, best first, with log-likelihoods and groups (algorithm 1).

    input_ids: int64 (B, P), pads on the left, where attention_mask (B, P) is 0. num_return_sequences: None for all num_beams.
    The rest is said at `DiverseBeam`. Raises OptionError.
    """
    settings = DiverseBeam(num_groups, diversity, penalty, accumulate_penalty)
    count = num_beams if num_return_sequences is None else num_return_sequences
    if not 1 <= count <= num_beams:
        raise OptionError(f"of {num_beams} beams {count} sequences cannot be returned")
    found = model.generate(
        input_ids, attention_mask=attention_mask, num_beams=num_beams, max_new_tokens=max_new_tokens, do_sample=False,
        length_penalty=length_penalty, early_stopping=False, num_return_sequences=1,
        custom_generate=lambda model, ids, **given: settings._search(model, ids, **given),
    )  # fmt: skip
    return [row[:count] for row in found.hypotheses()]


def _refuse(config: Any, criteria: Any, groups: int) -> None:
    if config.do_sample:
        raise OptionError("groups of beams do not sample: give do_sample=False")
    if config.num_beams % groups:
        raise OptionError(f"num_beams={config.num_beams} does not fall into {groups} groups of equal size")
    if config.early_stopping not in (True, False):
        raise Unsupported(f"early_stopping is True or False here, not {config.early_stopping!r}")
    known = ("MaxLengthCriteria", "EosTokenCriteria")
    strange = [type(one).__name__ for one in criteria or () if type(one).__name__ not in known]
    if strange:
        raise Unsupported(f"beams end at end tokens or at the greatest length, not by {', '.join(strange)}")
    wanted = [name for name in ("attentions", "hidden_states", "logits") if getattr(config, f"output_{name}")]
    if config.return_dict_in_generate and wanted:
        raise Unsupported(f"{', '.join(wanted)} are not returned; record them: with regard.recording(model, ...)")


def _filled(row: list[Hypothesis], count: int) -> list[Hypothesis]:
    """So many, the last again where a small vocabulary left fewer."""
    if not row:
        raise Unsupported("nothing can be written: the processors leave no token a chance")
    return [row[min(i, len(row) - 1)] for i in range(count)]


def _fill(config: Any) -> int:
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = config.eos_token_id
    return 0 if ends is None else int(ends if isinstance(ends, int) else ends[0])
