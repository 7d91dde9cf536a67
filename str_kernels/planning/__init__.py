"""What a training step will take, counted on tensors without storage before it runs."""

from str_kernels.planning.levers import Levers
from str_kernels.planning.plan import Plan, plan

__all__ = ["Levers", "Plan", "plan"]
