"""Training both re-rankers, on the decoder and the inputs that inference uses."""

from .recipes import CompensateTraining, DistillTraining, RankLLaMATraining

__all__ = ["CompensateTraining", "DistillTraining", "RankLLaMATraining"]
