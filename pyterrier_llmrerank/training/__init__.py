"""Training of both rerankers, with the decoder and the inputs of inference."""

from .recipes import CompensateTraining, DistillTraining, RankLLaMATraining

__all__ = ["CompensateTraining", "DistillTraining", "RankLLaMATraining"]
