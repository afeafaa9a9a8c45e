"""Interventions on a transformers model: attention through the library's registries, all else through hooks.

A model under sessions has one `Attached`, which knows its modules and the effects in force; leaving the last session
takes it away, and the model is as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from regard.contract import attach
from regard.contract.errors import Unsupported
from regard.hosts.transformers.anatomy import Anatomy, anatomy
from regard.hosts.transformers.attached import Attached

# parameters that stand before the patches of an image, a token in each row
_BEFORE_GRID = {"cls_token", "class_embedding", "distillation_token", "register_tokens"}


class TransformersSession(attach.Session):
    """Interventions at work on a transformers model; `attached` is what the sessions of one model share."""

    attached: Attached
    _open = False

    def __enter__(self) -> TransformersSession:
        if self._open:
            raise Unsupported(
                "this session is open: for the same interventions once more, write steer(model, ...) again"
            )
        self._open, self.attached = True, Attached.of(self.model)
        try:
            self.attached.add(self)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        if self._open:
            self._open = False
            self.attached.remove(self)

    def change(self, thing: Any, name: str, value: Any) -> None:
        """Set an attribute, of a config say, until this session ends; one that was not there is taken away again."""
        self.attached.changes.set(self, thing, name, value)

    @property
    def anatomy(self) -> Anatomy:
        """The model's stacks and layers, inside the block and outside."""
        return self.attached.anatomy if self._open else anatomy(self.model)

    def facts(self) -> dict[str, Any]:
        """What a tape says of the model: heads, key_heads, head_dim, rotary_base (of layers that see all; None without
        rotation), layer_types, and the grid of an image model."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        facts = {"heads": heads, "key_heads": getattr(config, "num_key_value_heads", None) or heads}
        # models whose stages differ have a list of heads, and no one width
        whole = config.hidden_size // heads if isinstance(heads, int) else None
        facts["head_dim"] = getattr(config, "head_dim", None) or whole
        rope = getattr(config, "rope_parameters", None) or {}
        facts["rotary_base"] = rope.get("full_attention", rope).get("rope_theta")
        facts["layer_types"] = getattr(config, "layer_types", None)
        facts["image_token"] = getattr(self.model.config, "image_token_id", None)
        image, patch = (sides(getattr(config, name, None)) for name in ("image_size", "patch_size"))
        if image is not None and patch is not None:
            names = self.model.named_parameters()
            before = sum(p.numel() // p.shape[-1] for name, p in names if name.rpartition(".")[2] in _BEFORE_GRID)
            facts["grid"] = (image[0] // patch[0], image[1] // patch[1], before)
        return facts

    def report(self) -> list[dict[str, Any]]:
        """Of every layer whose cache can give up keys: tokens seen, keys held by each head (the mean over rows), bytes."""
        rows = []
        for layer in range(len(self.anatomy.main.layers)):
            kept = self.attached.passes.kept(layer)
            if kept is None or not kept.is_initialized:
                continue
            held = (kept.positions_of_all() >= 0).sum(-1).float().mean(0)
            rows.append({"layer": layer, "seen": kept.seen, "kept": held.tolist(), "bytes": kept.nbytes})
        return rows


def sides(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size in a config: a number, two of them, or names with numbers; None for anything else."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    return tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def open_session(model: PreTrainedModel, interventions: Sequence[Any]) -> TransformersSession:
    """A session on a model of transformers."""
    return TransformersSession(model, interventions)
