"""What the schema cannot know about the `model` section: registered names, and the fields that each of them reads."""

from __future__ import annotations

from collections.abc import Mapping

from configs.schema import Fault, ModelConfig, Section
from model.attention.faults import attention_faults
from model.positions.registry import position_faults
from model.registry import kind_faults


def model_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """For `load_config`: all faults of a section that is valid by the schema."""
    model = sections.get("model")
    if not isinstance(model, ModelConfig):
        return []
    faults = [*kind_faults(model), *attention_faults(model), *position_faults(model)]
    return [Fault(f"model.{fault.key}", fault.value, fault.allowed) for fault in faults]
