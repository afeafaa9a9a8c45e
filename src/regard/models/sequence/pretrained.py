"""Our sequence models as models of transformers: saved, loaded, and written with by `generate`.

    model = RegardForCausalLM.of(regard.SequenceModel(settings));   model.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder).generate(ids, num_beams=4)

The state of the mixers takes the place of the cache. Importing this file makes the classes known to transformers' Auto
classes.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.errors import OptionError
from regard.contract.optional import need
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from regard.primitives.state import StackState

_hf: Any = need("transformers", "hf")
_outputs: Any = need("transformers.modeling_outputs", "hf")


class RegardConfig(_hf.PreTrainedConfig):
    """The settings of a sequence model, as transformers keeps them: `SequenceSettings` by name, in `sequence`."""

    model_type = "regard_sequence"

    def __init__(self, sequence: dict[str, Any] | None = None, **kwargs: Any):
        self.sequence = sequence or asdict(SequenceSettings(vocab=1))
        settings = self.settings
        self.vocab_size, self.hidden_size = settings.vocab, settings.dim
        self.num_hidden_layers, self.num_attention_heads = settings.depth, settings.heads
        kwargs.setdefault("tie_word_embeddings", settings.tied)
        super().__init__(**kwargs)

    @property
    def settings(self) -> SequenceSettings:
        """The settings of the model."""
        given = dict(self.sequence)
        if isinstance(given["mixer"], list):
            # json knows no tuples
            given["mixer"] = tuple(given["mixer"])
        return SequenceSettings(**given)


class Held:
    """What `generate` hands from step to step: the state of every mixer."""

    is_compileable = False

    def __init__(self, state: StackState):
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens were read."""
        return self.state.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.state = self.state.select(beam_idx)


class RegardForCausalLM(_hf.PreTrainedModel, _hf.GenerationMixin):
    """A causal sequence model of ours behind the interface of transformers. Raises OptionError for an encoder."""

    config_class = RegardConfig
    base_model_prefix = "sequence"
    _is_stateful = True
    _tied_weights_keys = {"sequence.head.weight": "sequence.embed.weight"}  # noqa: RUF012

    def __init__(self, config: RegardConfig):
        super().__init__(config)
        if not config.settings.is_causal:
            raise OptionError("an encoder writes nothing: is_causal must be True")
        self.sequence = SequenceModel(config.settings)
        self.post_init()

    @classmethod
    def of(cls, model: SequenceModel) -> RegardForCausalLM:
        """A model that holds this one, the same weights."""
        made = cls(RegardConfig(asdict(model.settings)))
        made.sequence = model
        return made

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        # the model has drawn its own
        return

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.sequence.embed

    def get_output_embeddings(self) -> nn.Module:
        """What makes logits."""
        return self.sequence.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Held | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, N, V), the loss of the next tokens where labels (B, N; -100 is none) are given, and the state.

        attention_mask: (B, tokens so far), 0 = padding.
        """
        padding = None if attention_mask is None else attention_mask.bool()[:, -input_ids.shape[1] :]
        held = None
        if past_key_values is None and not use_cache:
            logits = self.sequence(input_ids, padding=padding)
        else:
            state = (
                self.sequence.init_state(len(input_ids), device=input_ids.device)
                if past_key_values is None
                else past_key_values.state
            )
            if input_ids.shape[1] == 1 and state.seen:
                logits, state = self.sequence.step(input_ids, state)
            else:
                logits, state = self.sequence.prefill(input_ids, state, padding=padding)
            held = Held(state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return _outputs.CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=held)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Held | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the state has not read."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
        }


_hf.AutoConfig.register(RegardConfig.model_type, RegardConfig, exist_ok=True)
_hf.AutoModelForCausalLM.register(RegardConfig, RegardForCausalLM, exist_ok=True)
