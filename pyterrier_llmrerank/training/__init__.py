"""Training of both rerankers, with the decoder and the inputs of inference."""

from .matroyshka import CompensateTraining, DistillTraining
from .rankllama import RankLLaMATraining
from .teacher_scores import join_titles, teach

__all__ = ["CompensateTraining", "DistillTraining", "RankLLaMATraining", "join_titles", "teach"]
